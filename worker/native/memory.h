// Large blocks of zeroed memory.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace tps {

constexpr size_t kHugePage = size_t(2) << 20;

class Memory {
  public:
    Memory() = default;
    // `huge_pages`: read faster, but taken two mebibytes at a time.
    explicit Memory(size_t bytes, bool huge_pages = true) : bytes_(bytes) {
        if (bytes == 0) return;
        data_ = static_cast<uint8_t*>(take(bytes, huge_pages));
    }
    Memory(Memory&& other) noexcept { *this = static_cast<Memory&&>(other); }
    Memory& operator=(Memory&& other) noexcept {
        if (this != &other) {
            release();
            data_ = other.data_;
            bytes_ = other.bytes_;
            other.data_ = nullptr;
            other.bytes_ = 0;
        }
        return *this;
    }
    ~Memory() { release(); }

    uint8_t* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    void release() {
        if (data_ != nullptr) give_back(data_, bytes_);
        data_ = nullptr;
    }

#if defined(__SANITIZE_ADDRESS__)  // on the heap, where the sanitizer sees what goes beyond the end
    static void* take(size_t bytes, bool) { return memset(operator new(bytes, kCacheLine), 0, bytes); }
    static void give_back(void* at, size_t) { operator delete(at, kCacheLine); }
    static constexpr std::align_val_t kCacheLine{64};
#else
    static void* take(size_t bytes, bool huge_pages) {
        // Pages are taken when they are touched.
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        if (huge_pages && bytes >= kHugePage) madvise(at, bytes, MADV_HUGEPAGE);
        return at;
    }
    static void give_back(void* at, size_t bytes) { munmap(at, bytes); }
#endif

    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
};

// Memory for things that live and die together, in few large pieces: one by one, weights of a few
// mebibytes would get ordinary pages for what lies before and behind their whole huge pages.
class Arena {
  public:
    uint8_t* take(size_t bytes) {
        if (bytes == 0) return nullptr;
        bytes = (bytes + 63) / 64 * 64;
        if (bytes > left_) {
            left_ = bytes > kPiece ? (bytes + kHugePage - 1) / kHugePage * kHugePage : kPiece;
            pieces_.emplace_back(left_ + kHugePage);
            const size_t start = reinterpret_cast<size_t>(pieces_.back().data());
            at_ = pieces_.back().data() + (kHugePage - start % kHugePage) % kHugePage;
        }
        uint8_t* taken = at_;
        at_ += bytes;
        left_ -= bytes;
        return taken;
    }

  private:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kPiece = 0;  // each for itself, so that the sanitizer sees its borders
#else
    static constexpr size_t kPiece = size_t(64) << 20;  // pages that nobody touches cost nothing
#endif
    std::vector<Memory> pieces_;
    uint8_t* at_ = nullptr;
    size_t left_ = 0;
};

}  // namespace tps
