// What sampling needs of rows of logits. Part of kernels.cpp: compiled once for each instruction set.
//
// The definitions are those of worker/sampling/, which does the same in numpy where there is no library.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "simd.h"
#include "tensors.h"

namespace tps::TPS_LEVEL {
namespace {

// The highest logit and its column, the first among equals; NaN counts as the highest. Goes on with the
// columns from `first` on, and `best` of those before: (-inf, 0) of none.
inline void best(const float* logits, int size, int first, double best[2]) {
    if (std::isnan(best[0])) return;
    f32x16 most = set1(-INFINITY), zeros = zero();
    int i = 0;
    for (; i + 16 <= size; i += 16) {
        const f32x16 x = load(logits + i);
        most = max(x, most);
        zeros = fma(x, zero(), zeros);  // not 0 any more after NaN or infinity
    }
    float highest = max_of(most), rest = sum(zeros);
    for (; i < size; ++i) {
        highest = logits[i] > highest ? logits[i] : highest;
        rest += logits[i] * 0.0f;
    }
    if (rest == 0 && !(double(highest) > best[0])) return;
    int at = 0;
    if (rest == 0) {
        while (logits[at] != highest) ++at;
    } else {
        for (i = 0; i < size && !std::isnan(logits[at]); ++i)
            if (!(logits[i] <= logits[at])) at = i;
        if (double(logits[at]) <= best[0]) return;
    }
    best[0] = double(logits[at]);
    best[1] = double(first + at);
}

// Goes on with the columns from `first` on, which have to be higher than all before: equals of what is
// held come too late. Leaves out NaN and infinity. What is held is cut down to the best when there is
// no more room.
inline void add_to_top(const float* logits, int size, int first, Top& top) {
    const auto better = [](const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.column < b.column);
    };
    for (int begin = 0; begin < size; begin += 16) {
        const int end = std::min(begin + 16, size);
        if (top.full && end - begin == 16 && !(max_of(load(logits + begin)) > top.least)) continue;
        for (int i = begin; i < end; ++i) {
            if (!(logits[i] < INFINITY) || (top.full && !(logits[i] > top.least))) continue;
            top.pool[top.held++] = {logits[i], first + i};
            if (top.held < 4 * top.count) continue;
            std::nth_element(top.pool, top.pool + top.count - 1, top.pool + top.held, better);
            top.held = top.count;
            top.least = top.pool[top.count - 1].logit;
            top.full = true;
        }
    }
}

// The highest logit, and the sum of exp((logit - highest) / temperature); 0 where there is only -inf.
// At most kVocabularyChunk logits: more would be too many for a sum in floats.
inline void softmax_sum(const float* logits, int size, double temperature, double out[2]) {
    float highest = -INFINITY;
    f32x16 most = set1(-INFINITY);
    int i = 0;
    for (; i + 16 <= size; i += 16) most = max(load(logits + i), most);
    for (highest = max_of(most); i < size; ++i) highest = std::max(highest, logits[i]);
    const float anchor = highest == -INFINITY ? 0.0f : highest;
    // A temperature close to 0 must not turn the 0 of the highest into NaN.
    const float inverse = float(std::min(1.0 / temperature, 1e30));
    f32x16 total = zero();
    for (i = 0; i < size; i += 16) {
        f32x16 x;
        if (i + 16 <= size) {
            x = load(logits + i);
        } else {
            float rest[16];
            for (int k = 0; k < 16; ++k) rest[k] = i + k < size ? logits[i + k] : -INFINITY;
            x = load(rest);
        }
        total = add(total, exp(mul(sub(x, set1(anchor)), set1(inverse))));
    }
    out[0] = double(highest);
    out[1] = double(sum(total));
}

// Token t's Gumbel noise is -log(-log(u)) with u in (0, 1) from SplitMix64 (Steele et al. 2014), begun
// at `key`; the highest logit / temperature + noise and its column. Goes on with the columns from
// `first` on, the first of them token `first_id`, and `best` of those before: (-inf, 0) of none. Most
// tokens are told from their logit and a bound on their noise, without logarithms.
inline void gumbel_best(const float* logits, int size, double temperature, uint64_t key, uint64_t first_id,
                        int first, double best[2]) {
    constexpr int kChunk = 256, kBits = 52;
    // Noise is at most most_noise[k] if the binary digits of u begin with k ones; a little is added for
    // what is rounded.
    static const std::array<double, kBits + 1> most_noise = [] {
        std::array<double, kBits + 1> most;
        for (int k = 0; k <= kBits; ++k)
            most[k] = 1e-6 - std::log(-std::log1p(-std::ldexp(1.0, -1 - k)));
        return most;
    }();
    const auto number = [key](uint64_t id) {
        uint64_t z = (id + 1) * 0x9E3779B97F4A7C15u + key;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return (z ^ (z >> 31)) >> (64 - kBits);
    };
    float enough[kBits + 1];  // what a logit must be, for each bound; rounded down to be on the safe side
    const auto raise = [&](double highest) {
        for (int k = 0; k <= kBits; ++k) {
            enough[k] = float((highest - most_noise[k]) * temperature);
            enough[k] -= std::fabs(enough[k]) * 1e-6f;
        }
    };
    double highest = best[0];
    int at = int(best[1]);
    raise(highest);
    uint64_t numbers[kChunk];
    for (int begin = 0; begin < size; begin += kChunk) {
        const int count = std::min(kChunk, size - begin);
        for (int i = 0; i < count; ++i) numbers[i] = number(first_id + begin + i);
        for (int i = 0; i < count; ++i) {
            const uint64_t zeros = ~(numbers[i] << (64 - kBits));  // its last bits end the count
            if (logits[begin + i] < enough[__builtin_clzll(zeros)]) continue;
            const double u = (double(numbers[i]) + 0.5) * 0x1p-52;
            const double found = double(logits[begin + i]) / temperature - std::log(-std::log(u));
            if (found > highest) {  // equals have higher columns
                highest = found;
                at = first + begin + i;
                raise(highest);
            }
        }
    }
    best[0] = highest;
    best[1] = double(at);
}

}  // namespace
}  // namespace tps::TPS_LEVEL
