// What sampling needs of rows of logits. Part of kernels.cpp: compiled once for each instruction set.
//
// The definitions are those of worker/sampling/, which does the same in numpy where there is no library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace tps::TPS_LEVEL {
namespace {

// The highest of some logits and its column, the first among equals; NaN counts as the highest.
inline void best(const float* logits, int count, double best[2]) {
    constexpr int kChunk = 256;
    int chunk = 0, regular = 1;
    float highest = -INFINITY;
    for (int first = 0; first < count; first += kChunk) {
        const int end = std::min(first + kChunk, count);
        f32x16 most = set1(-INFINITY), zeros = zero();
        int i = first;
        for (; i + 16 <= end; i += 16) {
            const f32x16 x = load(logits + i);
            most = max(x, most);
            zeros = fma(x, zero(), zeros);  // not 0 any more after NaN or infinity
        }
        float of_chunk = max_of(most), rest = sum(zeros);
        for (; i < end; ++i) {
            of_chunk = logits[i] > of_chunk ? logits[i] : of_chunk;
            rest += logits[i] * 0.0f;
        }
        if (rest != 0) regular = 0;
        if (of_chunk > highest) {
            highest = of_chunk;
            chunk = first;
        }
    }
    int at = chunk;
    if (!regular) {
        at = 0;
        for (int i = 0; i < count; ++i) {
            if (std::isnan(logits[i])) {
                highest = logits[i];
                at = i;
                break;
            }
            if (logits[i] > logits[at]) at = i;
        }
    } else {
        while (at < count && logits[at] != highest) ++at;
    }
    best[0] = double(count > 0 ? logits[at] : -INFINITY);
    best[1] = double(at);
}

// The `count` highest logits and their columns, which ascend; among equals the lowest columns. No NaN.
// `pool` has room for 4 * count columns. What is kept in it is cut down to the best whenever it is full.
inline void top(const float* logits, int size, int count, float* values, int64_t* columns, int32_t* pool) {
    const int room = 4 * count;
    int held = 0;
    float least = -INFINITY;  // of the best `count` so far; later equals have higher columns
    bool full = false;
    const auto better = [logits](int32_t a, int32_t b) {
        return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    const auto cut_down = [&] {
        std::nth_element(pool, pool + count - 1, pool + held, better);
        held = count;
        least = logits[pool[count - 1]];
        full = true;
    };
    for (int first = 0; first < size; first += 16) {
        const int end = std::min(first + 16, size);
        if (full && end - first == 16 && !(max_of(load(logits + first)) > least)) continue;
        for (int i = first; i < end; ++i) {
            if (full && !(logits[i] > least)) continue;
            pool[held++] = i;
            if (held == room) cut_down();
        }
    }
    if (held > count) cut_down();
    std::sort(pool, pool + held);
    for (int i = 0; i < held; ++i) {
        columns[i] = pool[i];
        values[i] = logits[pool[i]];
    }
}

// The highest logit, and the sum of exp((logit - highest) / temperature); 0 where there is only -inf.
inline void softmax_sum(const float* logits, int size, double temperature, double out[2]) {
    constexpr int kChunk = 1024;
    float highest = -INFINITY;
    f32x16 most = set1(-INFINITY);
    int i = 0;
    for (; i + 16 <= size; i += 16) most = max(load(logits + i), most);
    for (highest = max_of(most); i < size; ++i) highest = std::max(highest, logits[i]);
    const float anchor = highest == -INFINITY ? 0.0f : highest;
    // A temperature close to 0 must not turn the 0 of the highest into NaN.
    const float inverse = float(std::min(1.0 / temperature, 1e30));
    double total = 0;
    for (int first = 0; first < size; first += kChunk) {
        const int end = std::min(first + kChunk, size);
        f32x16 part = zero();
        for (i = first; i < end; i += 16) {
            f32x16 x;
            if (i + 16 <= end) {
                x = load(logits + i);
            } else {
                float rest[16];
                for (int k = 0; k < 16; ++k) rest[k] = i + k < end ? logits[i + k] : -INFINITY;
                x = load(rest);
            }
            part = add(part, exp(mul(sub(x, set1(anchor)), set1(inverse))));
        }
        total += double(sum(part));
    }
    out[0] = double(highest);
    out[1] = total;
}

// Token t's Gumbel noise is -log(-log(u)) with u in (0, 1) from SplitMix64 (Steele et al. 2014), begun
// at `key`; the highest logit / temperature + noise and its column. `start` is a column with a high
// logit: most others are then told from their logit and a bound on their noise, without logarithms.
inline void gumbel_best(const float* logits, int size, double temperature, uint64_t key, uint64_t first_id,
                        int start, double best[2]) {
    constexpr int kChunk = 256;
    constexpr double kUsualNoise = 6.907756;  // a little more than that of u = 0.999
    constexpr uint64_t kUsual = uint64_t(0.999 * 0x1p52) - 1;
    const auto number = [key](uint64_t id) {
        uint64_t z = (id + 1) * 0x9E3779B97F4A7C15u + key;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return (z ^ (z >> 31)) >> 12;
    };
    const auto score = [&](int column, uint64_t n) {
        const double u = (double(n) + 0.5) * 0x1p-52;
        return double(logits[column]) / temperature - std::log(-std::log(u));
    };
    double highest = score(start, number(first_id + start));
    int at = start;
    uint64_t numbers[kChunk];
    for (int first = 0; first < size; first += kChunk) {
        const int count = std::min(kChunk, size - first);
        for (int i = 0; i < count; ++i) numbers[i] = number(first_id + first + i);
        // What a logit must be so that usual noise may be enough; rounded down to be on the safe side.
        float enough = float((highest - kUsualNoise) * temperature);
        enough -= std::fabs(enough) * 1e-6f;
        for (int i = 0; i < count; ++i) {
            if (numbers[i] < kUsual && logits[first + i] < enough) continue;
            const double found = score(first + i, numbers[i]);
            if (found > highest || (found == highest && first + i < at)) {
                highest = found;
                at = first + i;
                enough = float((highest - kUsualNoise) * temperature);
                enough -= std::fabs(enough) * 1e-6f;
            }
        }
    }
    best[0] = highest;
    best[1] = double(at);
}

}  // namespace
}  // namespace tps::TPS_LEVEL
