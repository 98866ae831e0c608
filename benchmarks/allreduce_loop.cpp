// An all-reduce as a program of the native library does it, over and over: a client of the library's
// C API for benchmarks/allreduce.py, because a loop in Python would measure Python.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

extern "C" {
void* tps_collective_next_buffer(void* collective);
const void* tps_collective_posted_buffer(void* collective, int32_t rank);
int32_t tps_collective_exchange(void* collective);
}

namespace {

constexpr int kLanes = 16, kMaxRoots = 64;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

void add_tree(float* into, const float* const* roots, int count, const int32_t (*additions)[2],
              int addition_count, int length) {
    Lanes values[kMaxRoots], sum;
    for (int i = 0; i < length; i += kLanes) {
        for (int n = 0; n < count; ++n) memcpy(&values[n], roots[n] + i, sizeof(Lanes));
        for (int n = 0; n < addition_count; ++n) values[additions[n][0]] += values[additions[n][1]];
        memcpy(&sum, into + i, sizeof(Lanes));
        sum += values[0];
        memcpy(into + i, &sum, sizeof(Lanes));
    }
}

}  // namespace

// Each round writes this rank's roots into its buffer, exchanges, and adds the total of all ranks to
// x [length], a multiple of 16. seconds: [rounds]. Returns -1, or the rank that stayed silent.
extern "C" __attribute__((visibility("default"))) int32_t all_reduce_rounds(
    void* collective, int32_t rank, int32_t world, const int32_t* roots_per_rank,
    const int32_t (*additions)[2], int32_t addition_count, float* x, int32_t length, int32_t rounds,
    double* seconds) {
    using Clock = std::chrono::steady_clock;
    for (int round = 0; round < rounds; ++round) {
        const auto began = Clock::now();
        float* mine = static_cast<float*>(tps_collective_next_buffer(collective));
        for (int root = 0; root < roots_per_rank[rank]; ++root)
            for (int i = 0; i < length; ++i) mine[size_t(root) * length + i] = x[i] * 0.5f;
        const int silent = tps_collective_exchange(collective);
        if (silent >= 0) return silent;
        const float* roots[kMaxRoots];
        int count = 0;
        for (int peer = 0; peer < world; ++peer) {
            const auto* posted = static_cast<const float*>(tps_collective_posted_buffer(collective, peer));
            for (int root = 0; root < roots_per_rank[peer]; ++root)
                roots[count++] = posted + size_t(root) * length;
        }
        add_tree(x, roots, count, additions, addition_count, length);
        seconds[round] = std::chrono::duration<double>(Clock::now() - began).count();
    }
    return -1;
}
