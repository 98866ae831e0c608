// Large blocks of zeroed memory.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace tps {

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
    static constexpr size_t kHugePage = size_t(2) << 20;

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

}  // namespace tps
