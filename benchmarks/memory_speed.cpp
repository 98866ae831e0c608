// How fast this process reads memory: the limit of anything that has to read its weights.
//
//     memory_speed MEBIBYTES
//
// Says "ready" once it has its memory. For each line of input, a number of seconds, it reads all of
// that memory over and over for so long and answers with the bytes per second.

#include <sys/mman.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLine = 64;
// Places that are read in turn. The hardware prefetches each by itself, so that more lines are on
// their way at once than with a single one; more than eight gain nothing.
constexpr size_t kStreams = 8;

typedef uint64_t Line __attribute__((vector_size(kLine)));

uint64_t read_all(const Line* lines, size_t count) {
    const size_t stride = count / kStreams;
    Line sums[kStreams] = {};
    for (size_t i = 0; i < stride; ++i) {
        for (size_t stream = 0; stream < kStreams; ++stream) {
            sums[stream] += lines[stream * stride + i];
        }
    }
    uint64_t total = 0;
    for (const Line& sum : sums) {
        for (size_t i = 0; i < kLine / sizeof(uint64_t); ++i) {
            total += sum[i];
        }
    }
    return total;
}

}  // namespace

int main(int argc, char** argv) {
    const size_t bytes = argc == 2 ? std::strtoull(argv[1], nullptr, 10) << 20 : 0;
    if (bytes == 0) {
        std::fprintf(stderr, "usage: memory_speed MEBIBYTES\n");
        return 2;
    }
    void* memory = std::aligned_alloc(kHugePage, bytes);
    if (memory == nullptr) {
        std::perror("memory_speed");
        return 1;
    }
    madvise(memory, bytes, MADV_HUGEPAGE);  // fewer address translations where the kernel grants it
    std::memset(memory, 1, bytes);
    std::puts("ready");
    std::fflush(stdout);

    double seconds = 0;
    uint64_t sum = 0;
    while (std::scanf("%lf", &seconds) == 1) {
        size_t passes = 0;
        const auto began = Clock::now();
        double passed = 0;
        do {
            sum += read_all(static_cast<const Line*>(memory), bytes / sizeof(Line));
            ++passes;
            passed = std::chrono::duration<double>(Clock::now() - began).count();
        } while (passed < seconds);
        std::printf("%.0f\n", static_cast<double>(passes) * static_cast<double>(bytes) / passed);
        std::fflush(stdout);
    }
    // Nothing may be left out on the ground that nobody looks at the sum.
    volatile uint64_t seen = sum;
    (void)seen;
    std::free(memory);
    return 0;
}
