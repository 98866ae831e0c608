// Large blocks of zeroed memory, in huge pages where the system gives them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

namespace tps {

class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t bytes) : bytes_(bytes) {
        if (bytes == 0) return;
        // Pages are taken when they are touched.
        void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) throw std::bad_alloc();
        if (bytes >= kHugePage) madvise(at, bytes, MADV_HUGEPAGE);
        data_ = static_cast<uint8_t*>(at);
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
        if (data_ != nullptr) munmap(data_, bytes_);
        data_ = nullptr;
    }

    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace tps
