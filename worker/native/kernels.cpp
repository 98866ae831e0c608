// The arithmetic. Compiled once for each instruction set, with TPS_LEVEL as the namespace.
//
// One arithmetic: what is computed for a token, and in which order, depends on that token's data only,
// never on how many tokens, rows, threads or ranks there are. So tiles (how many tokens and rows share
// a pass over the weights) may be chosen freely, and differ from level to level.

#include <algorithm>

#include "sampling.h"
#include "simd.h"
#include "tensors.h"
#include "tile_attention.h"
#include "tile_linear.h"

namespace tps::TPS_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kTileTokens = 6, kTileBlocks = 2;  // 24 of 32 registers hold sums
constexpr int kMostStreams = 4;
#else
constexpr int kTileTokens = 3, kTileBlocks = 1;  // 12 of 16
constexpr int kMostStreams = 2;
#endif
constexpr int kStackDepth = 9;             // log2(kMaxSegments) + 1
constexpr float kSmallest = 0x1p-100f;     // less than that is 0 in int8, as 127 over it may be infinite

template <Format format>
constexpr size_t kGroupBytes = format == kF32 ? 2048 : format == kI8 ? 512 : format == kI4 ? 256 : 1024;
template <Format format>
constexpr bool kQuantized = format == kI8 || format == kI4;

// How far ahead lines of weights are asked for, and how many row blocks one token reads side by side
// (more lines on their way): see `Prefetch`.
template <Prefetch prefetch>
constexpr int kPrefetchBytes = prefetch == kNear ? 4096 : 1024;
template <Prefetch prefetch, Format format, int MT>
constexpr bool kPrefetches = prefetch == kNear ? kQuantized<format> || MT <= 2
                                               : kQuantized<format> && MT == 1;
// Whether the next chunk comes into the L2 cache while all tiles pass over the one that is there.
template <Prefetch prefetch, Format format>
constexpr bool kFetchesChunks = prefetch == kFar && kQuantized<format>;
template <Prefetch prefetch, Format format>
constexpr int kChunkBytes = kFetchesChunks<prefetch, format> ? 192 << 10 : 384 << 10;
template <Prefetch prefetch, Format format>
constexpr int kStreams = prefetch == kFar && kQuantized<format> ? kMostStreams : 2;

template <Prefetch prefetch, Format format, int MT>
TPS_INLINE void fetch_ahead(const uint8_t* line) {
    if constexpr (kPrefetches<prefetch, format, MT>)
        __builtin_prefetch(line, 0, prefetch == kNear ? 3 : 2);  // into L1, or into L2
}

// One group of each row block.
template <Prefetch prefetch, Format format, int NB, int MT>
TPS_INLINE void fetch_groups_ahead(const uint8_t* const (&w)[NB]) {
    for (int b = 0; b < NB; ++b)
        for (size_t line = 0; line < kGroupBytes<format>; line += 64)
            fetch_ahead<prefetch, format, MT>(w[b] + kPrefetchBytes<prefetch> + line);
}

// --- linear ---------------------------------------------------------------------------------------

template <int NB, int MT>
TPS_INLINE void clear(f32x16 (&sums)[NB][MT]) {
    for (int b = 0; b < NB; ++b)
        for (int m = 0; m < MT; ++m) sums[b][m] = zero();
}

template <int NB, int MT>
TPS_INLINE void add_all(f32x16 (&sums)[NB][MT], const f32x16 (&others)[NB][MT]) {
    for (int b = 0; b < NB; ++b)
        for (int m = 0; m < MT; ++m) sums[b][m] = add(sums[b][m], others[b][m]);
}

// Weights in floats: even and odd columns are summed apart, which halves the waiting for sums.
template <Prefetch prefetch, Format format, int NB, int MT>
TPS_INLINE void accumulate_floats(f32x16 (&acc)[NB][MT], const uint8_t* (&w)[NB], const float* x,
                                  size_t stride, int groups) {
    f32x16 odd[NB][MT];
    clear(odd);
    for (int g = 0; g < groups; ++g, x += kGroup) {
        fetch_groups_ahead<prefetch, format, NB, MT>(w);
#pragma GCC unroll 4
        for (int k = 0; k < kGroup; k += 2) {
            f32x16 w0[NB], w1[NB];
            for (int b = 0; b < NB; ++b) {
                if constexpr (format == kF32) {
                    w0[b] = load((const float*)w[b] + k * 16);
                    w1[b] = load((const float*)w[b] + (k + 1) * 16);
                } else if constexpr (format == kBF16) {
                    load_bf16_pairs(w[b] + k * 32, w0[b], w1[b]);
                } else {
                    w0[b] = load_f16((const uint16_t*)w[b] + k * 16);
                    w1[b] = load_f16((const uint16_t*)w[b] + (k + 1) * 16);
                }
            }
            for (int m = 0; m < MT; ++m) {
                const f32x16 x0 = set1(x[m * stride + k]), x1 = set1(x[m * stride + k + 1]);
                for (int b = 0; b < NB; ++b) {
                    acc[b][m] = fma(w0[b], x0, acc[b][m]);
                    odd[b][m] = fma(w1[b], x1, odd[b][m]);
                }
            }
        }
        for (int b = 0; b < NB; ++b) w[b] += kGroupBytes<format>;
    }
    add_all(acc, odd);
}

#if defined(__AVX512BF16__)
// bf16 weights where the processor multiplies pairs of bf16: activations are rounded to bf16, sums stay
// floats. Pairs with even and odd numbers are summed apart.
template <Prefetch prefetch, int NB, int MT>
TPS_INLINE void accumulate_pairs(f32x16 (&acc)[NB][MT], const uint8_t* (&w)[NB], const float* x,
                                 size_t stride, int groups) {
    constexpr int kRounded = 4;  // groups at once: what is rounded is not read back at once
    f32x16 odd[NB][MT];
    clear(odd);
    alignas(64) uint16_t rounded[kRounded][MT][kGroup];
    for (int first = 0; first < groups; first += kRounded) {
        const int count = std::min(kRounded, groups - first);
        for (int g = 0; g < count; ++g)
            for (int m = 0; m < MT; ++m)
                store_bf16(rounded[g][m], x + m * stride + size_t(first + g) * kGroup);
        for (int g = 0; g < count; ++g) {
            fetch_groups_ahead<prefetch, kBF16, NB, MT>(w);
#pragma GCC unroll 4
            for (int k = 0; k < kGroup; k += 4) {
                bytes64 w0[NB], w1[NB];
                for (int b = 0; b < NB; ++b) {
                    w0[b] = load_bytes(w[b] + k * 32);
                    w1[b] = load_bytes(w[b] + k * 32 + 64);
                }
                for (int m = 0; m < MT; ++m)
                    for (int b = 0; b < NB; ++b) {
                        acc[b][m] = dot_bf16(acc[b][m], w0[b], rounded[g][m] + k);
                        odd[b][m] = dot_bf16(odd[b][m], w1[b], rounded[g][m] + k + 2);
                    }
            }
            for (int b = 0; b < NB; ++b) w[b] += kGroupBytes<kBF16>;
        }
    }
    add_all(acc, odd);
}
#endif

// Quantised weights: the products of a group are summed in integers, exactly; then scaled. `left` are
// the groups of the row blocks from the first one here on: what is fetched ahead skips what lies
// between the numbers, or the scales, of a row block and those of the next one. next_chunk: as for
// linear_tile.
template <Prefetch prefetch, Format format, int NB, int MT>
TPS_INLINE void accumulate_quantized(f32x16 (&acc)[NB][MT], const uint8_t* (&w)[NB],
                                     const uint16_t* (&scales)[NB], const int8_t* x,
                                     const float* x_scales, const int32_t* offsets, int groups,
                                     int left, int all_groups, size_t next_chunk) {
    constexpr int kBytes = kPrefetchBytes<prefetch>, kAhead = kBytes / kGroupBytes<format>;
    constexpr int kScalesAhead = 32;
    for (int g = 0; g < groups; ++g, --left) {
        const size_t ahead =
            kBytes + (left > kAhead ? 0 : size_t(all_groups) * kRowBlock * sizeof(uint16_t));
        const size_t scales_ahead = (kScalesAhead * kRowBlock) * sizeof(uint16_t) +
                                    (left > kScalesAhead ? 0 : size_t(all_groups) * kGroupBytes<format>);
        for (int b = 0; b < NB; ++b) __builtin_prefetch((const uint8_t*)scales[b] + scales_ahead);
        if (kFetchesChunks<prefetch, format> && MT > 1 && next_chunk)
            for (int b = 0; b < NB; ++b)
                for (size_t line = 0; line < kGroupBytes<format>; line += 64)
                    __builtin_prefetch(w[b] + next_chunk + line, 0, 2);
        i32x16 dot[NB][MT];
        for (int b = 0; b < NB; ++b)
            for (int m = 0; m < MT; ++m) dot[b][m] = set1_i32(offsets[m]);
        if constexpr (format == kI8) {
#pragma GCC unroll 8
            for (int k = 0; k < 8; ++k) {
                bytes64 v[NB];
                for (int b = 0; b < NB; ++b) {
                    v[b] = load_bytes(w[b] + 64 * k);
                    fetch_ahead<prefetch, format, MT>(w[b] + ahead + 64 * k);
                }
                for (int m = 0; m < MT; ++m)
                    for (int b = 0; b < NB; ++b)
                        dot[b][m] = dot_u8(dot[b][m], v[b], x + m * kGroup + 4 * k);
            }
        } else {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) {
                bytes64 low[NB], high[NB];
                for (int b = 0; b < NB; ++b) {
                    const bytes64 both = load_bytes(w[b] + 64 * k);
                    fetch_ahead<prefetch, format, MT>(w[b] + ahead + 64 * k);
                    low[b] = low_nibbles(both);
                    high[b] = high_nibbles(both);
                }
                for (int m = 0; m < MT; ++m)
                    for (int b = 0; b < NB; ++b) {
                        dot[b][m] = dot_u8(dot[b][m], low[b], x + m * kGroup + 4 * k);
                        dot[b][m] = dot_u8(dot[b][m], high[b], x + m * kGroup + 16 + 4 * k);
                    }
            }
        }
        for (int b = 0; b < NB; ++b) {
            const f32x16 scale = load_f16(scales[b]);
            for (int m = 0; m < MT; ++m)
                acc[b][m] = fma(to_float(dot[b][m]), mul(scale, set1(x_scales[m])), acc[b][m]);
            w[b] += kGroupBytes<format>;
            scales[b] += kRowBlock;
        }
        x += MT * kGroup;
        x_scales += MT;
        offsets += MT;
    }
}

// Row blocks block, block + apart, ... and MT tokens from `token` on. next_chunk: bytes to the same row
// block of the next chunk, if this is the tile that fetches it; else 0.
template <Prefetch prefetch, Format format, int NB, int MT>
void linear_tile(const Weight& weight, const Activations& x, const Output& out, int block, int apart,
                 int token, size_t next_chunk) {
    const uint8_t* w[NB];
    const uint16_t* scales[NB];
    const size_t block_bytes = row_block_bytes(format, weight.groups);
    for (int b = 0; b < NB; ++b) {
        w[b] = weight.data + (block + b * apart) * block_bytes;
        scales[b] = (const uint16_t*)(w[b] + weight.groups * kGroupBytes<format>);
    }
    alignas(64) float stack[kStackDepth][NB][MT][16];
    int top = 0, group = 0;
    for (int s = 0; s < weight.segments; ++s) {
        f32x16 acc[NB][MT];
        clear(acc);
        const int groups = weight.segment_groups[s];
        if constexpr (kQuantized<format>) {
            const size_t first = size_t(token) * x.groups + size_t(group) * MT;
            accumulate_quantized<prefetch, format>(
                acc, w, scales, x.quantized.numbers + first * kGroup, x.quantized.scales + first,
                x.quantized.offsets + first, groups, weight.groups - group, weight.groups, next_chunk);
        } else {
            const size_t stride = size_t(x.groups) * kGroup;
            const float* floats = x.floats + token * stride + group * kGroup;
#if defined(__AVX512BF16__)
            if constexpr (format == kBF16)
                accumulate_pairs<prefetch>(acc, w, floats, stride, groups);
            else
#endif
                accumulate_floats<prefetch, format>(acc, w, floats, stride, groups);
        }
        group += groups;
        for (int n = 0; n < weight.additions[s]; ++n) {
            --top;
            for (int b = 0; b < NB; ++b)
                for (int m = 0; m < MT; ++m) acc[b][m] = add(load(stack[top][b][m]), acc[b][m]);
        }
        for (int b = 0; b < NB; ++b)
            for (int m = 0; m < MT; ++m)
                if (weight.root[s] >= 0)
                    store(out.y + weight.root[s] * out.root_stride +
                              (token + m) * out.token_stride + (block + b * apart) * kRowBlock -
                              out.first_row,
                          acc[b][m]);
                else
                    store(stack[top][b][m], acc[b][m]);
        if (weight.root[s] < 0) ++top;
    }
}

template <Prefetch prefetch, Format format, int MT>
void linear_tokens(const Weight& weight, const Activations& x, const Output& out, int begin, int end,
                   int token, size_t next_chunk) {
    int block = begin;
    if constexpr (MT == 1) {
        // Each stream goes through neighbouring row blocks, so that what is fetched ahead at the end of
        // one is the beginning of its next.
        constexpr int streams = kStreams<prefetch, format>;
        const int length = (end - begin) / streams;
        for (; block < begin + length; ++block)
            linear_tile<prefetch, format, streams, 1>(weight, x, out, block, length, token, next_chunk);
        block = begin + length * streams;
    } else if constexpr (kTileBlocks > 1) {
        for (; block + kTileBlocks <= end; block += kTileBlocks)
            linear_tile<prefetch, format, kTileBlocks, MT>(weight, x, out, block, 1, token, next_chunk);
    }
    for (; block < end; ++block)
        linear_tile<prefetch, format, 1, MT>(weight, x, out, block, 1, token, next_chunk);
}

template <Prefetch prefetch, Format format, int MT = kTileTokens>
void linear_tokens_of(int count, const Weight& weight, const Activations& x, const Output& out,
                      int begin, int end, int token, size_t next_chunk) {
    if (count == MT)
        return linear_tokens<prefetch, format, MT>(weight, x, out, begin, end, token, next_chunk);
    if constexpr (MT > 1)
        linear_tokens_of<prefetch, format, MT - 1>(count, weight, x, out, begin, end, token,
                                                   next_chunk);
}

template <Prefetch prefetch, Format format>
void linear_of(const Weight& weight, const Activations& x, const Output& out, int begin, int end) {
#if defined(__AMX_TILE__)
    if constexpr (format == kBF16) return linear_in_tiles(weight, x, out, begin, end);
#endif
    const Tiling tiling(x.tokens, kTileTokens);
    const size_t block_bytes = row_block_bytes(format, weight.groups);
    int chunk = end - begin;
    if (tiling.tiles > 1 && block_bytes > 0)
        chunk = std::max(kTileBlocks, int(kChunkBytes<prefetch, format> / block_bytes) / kTileBlocks *
                                          kTileBlocks);
    for (int first = begin; first < end; first += chunk) {
        const int last = std::min(first + chunk, end);
        const size_t next_chunk = last < end ? chunk * block_bytes : 0;
        for (int tile = 0; tile < tiling.tiles; ++tile)
            linear_tokens_of<prefetch, format>(tiling.size(tile), weight, x, out, first, last,
                                               tiling.begin(tile), tile == 0 ? next_chunk : 0);
    }
}

template <Prefetch prefetch>
void linear(const Weight& weight, const Activations& x, const Output& out, int begin, int end) {
    switch (weight.format) {
        case kF32: return linear_of<prefetch, kF32>(weight, x, out, begin, end);
        case kBF16: return linear_of<prefetch, kBF16>(weight, x, out, begin, end);
        case kF16: return linear_of<prefetch, kF16>(weight, x, out, begin, end);
        case kI8: return linear_of<prefetch, kI8>(weight, x, out, begin, end);
        case kI4: return linear_of<prefetch, kI4>(weight, x, out, begin, end);
    }
}

// --- between the linears --------------------------------------------------------------------------

void rms_norm(const float* x, const float* weight, int size, int count, float eps, float* out) {
    f32x16 even = zero(), odd = zero();
    for (int i = 0; i < size; i += 32) {
        const f32x16 a = load(x + i), b = i + 16 < size ? load(x + i + 16) : zero();
        even = fma(a, a, even);
        odd = fma(b, b, odd);
    }
    const float mean = sum(add(even, odd)) / float(count);
    const f32x16 factor = set1(1.0f / std::sqrt(mean + eps));
    for (int i = 0; i < size; i += 16)
        store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
}

void swiglu(const float* gate, const float* up, int count, float* out) {
    for (int i = 0; i < count; i += 16) {
        const f32x16 g = load(gate + i);
        const f32x16 silu = div(g, add(set1(1.0f), exp(sub(zero(), g))));
        store(out + i, mul(silu, load(up + i)));
    }
}

void quantize(const float* x, int token, int group_begin, int group_end, int groups,
              const Tiling& tiling, int weight_offset, const Quantized& out) {
    const int tile = tiling.of(token), first = tiling.begin(tile), count = tiling.size(tile);
    for (int g = group_begin; g < group_end; ++g) {
        const f32x16 a = load(x + g * kGroup), b = load(x + g * kGroup + 16);
        const float largest = max_of(max(abs(a), abs(b)));
        // NaN and infinity must reach the sums; integers cannot carry them, the scale can. A maximum
        // loses NaN, but 0 times either of them is NaN.
        const bool finite = sum(fma(a, zero(), mul(b, zero()))) == 0;
        const f32x16 inverse = set1(finite && largest >= kSmallest ? 127.0f / largest : 0.0f);
        const i32x16 qa = round_to_i32(mul(finite ? a : zero(), inverse));
        const i32x16 qb = round_to_i32(mul(finite ? b : zero(), inverse));
        const size_t at = size_t(first) * groups + size_t(g) * count + (token - first);
        int8_t* numbers = out.numbers + at * kGroup;
        store_i8(numbers, qa);
        store_i8(numbers + 16, qb);
        int32_t total = 0;
        for (int i = 0; i < kGroup; ++i) total += numbers[i];
        out.scales[at] = finite ? largest / 127.0f : NAN;
        out.offsets[at] = -weight_offset * total;
    }
}

void add_tree(float* into, const float* const* terms, int count, const int32_t (*additions)[2],
              int addition_count, int size) {
    f32x16 values[kMaxRoots];
    for (int i = 0; i < size; i += 16) {
        for (int n = 0; n < count; ++n) values[n] = load(terms[n] + i);
        for (int n = 0; n < addition_count; ++n)
            values[additions[n][0]] = add(values[additions[n][0]], values[additions[n][1]]);
        store(into + i, add(load(into + i), values[0]));
    }
}

void rope(float* x, const float* cos, const float* sin, int head_dim) {
    const int half = head_dim / 2;
    for (int i = 0; i < half; ++i) {
        const float left = x[i], right = x[i + half];
        x[i] = left * cos[i] - right * sin[i];
        x[i + half] = right * cos[i] + left * sin[i];
    }
}

template <Format format>
void embed_as(const uint8_t* table, int64_t row, int size, float* out) {
    for (int i = 0; i < size; ++i) {
        const size_t at = size_t(row) * size + i;
        if constexpr (format == kF32) {
            memcpy(out + i, table + 4 * at, 4);
        } else {
            uint16_t half;
            memcpy(&half, table + 2 * at, 2);
            out[i] = format == kBF16 ? float_of_bits(uint32_t(half) << 16) : float_of_f16(half);
        }
    }
}

void embed(const void* table, Format format, int64_t row, int size, float* out) {
    const uint8_t* bytes = (const uint8_t*)table;
    if (format == kF32) return embed_as<kF32>(bytes, row, size, out);
    if (format == kBF16) return embed_as<kBF16>(bytes, row, size, out);
    embed_as<kF16>(bytes, row, size, out);
}

// --- keys and values ------------------------------------------------------------------------------

template <typename Number, typename Convert>
TPS_INLINE void store_pair(const KVLayer& kv, size_t block, int offset, const float* key,
                           const float* value, Convert convert) {
    const int d = kv.head_dim;
    Number* keys = (Number*)kv.keys + block * d * kBlockTokens + offset;
    Number* values = (Number*)kv.values + (block * kBlockTokens + offset) * d;
    for (int i = 0; i < d; ++i) keys[i * kBlockTokens] = convert(key[i]);
    for (int i = 0; i < d; ++i) values[i] = convert(value[i]);
}

// Two rows [16] or [head_dim] become one of pairs.
void store_bf16_pair(const KVLayer& kv, size_t block, int offset, const float* key, const float* value) {
    const int d = kv.head_dim;
    uint16_t* keys = (uint16_t*)kv.keys + block * d * kBlockTokens + offset * 2;
    uint16_t* values = (uint16_t*)kv.values + (block * kBlockTokens + offset / 2 * 2) * d + offset % 2;
    for (int i = 0; i < d; ++i) keys[i / 2 * 2 * kBlockTokens + i % 2] = bf16_of(key[i]);
    for (int i = 0; i < d; ++i) values[i * 2] = bf16_of(value[i]);
}

TPS_INLINE float largest_of(const float* x, int count) {
    float largest = 0;
    for (int i = 0; i < count; ++i) {
        const float magnitude = std::fabs(x[i]);
        if (magnitude > largest || std::isnan(magnitude)) largest = magnitude;  // NaN is kept
    }
    return largest;
}

void store_kv(const KVLayer& kv, int kv_head, int block_index, int offset, const float* key,
              const float* value) {
    const size_t block = size_t(kv_head) * kv.blocks + block_index;
    switch (kv.format) {
        case kF32: return store_pair<float>(kv, block, offset, key, value, [](float f) { return f; });
        case kBF16: return store_bf16_pair(kv, block, offset, key, value);
        case kF16: return store_pair<uint16_t>(kv, block, offset, key, value, f16_of);
        default: break;
    }
    const int d = kv.head_dim;
    const size_t at = block * kBlockTokens + offset;
    int8_t* keys = (int8_t*)kv.keys + block * d * kBlockTokens + offset;
    int8_t* values = (int8_t*)kv.values + at * d;
    const float of_key = largest_of(key, d), of_value = largest_of(value, d);
    const float key_inverse = of_key >= kSmallest && of_key <= 3.4e38f ? 127.0f / of_key : 0.0f;
    const float value_inverse = of_value >= kSmallest && of_value <= 3.4e38f ? 127.0f / of_value : 0.0f;
    for (int i = 0; i < d; ++i) {
        keys[i * kBlockTokens] = key_inverse ? int8_t(std::nearbyint(key[i] * key_inverse)) : 0;
        values[i] = value_inverse ? int8_t(std::nearbyint(value[i] * value_inverse)) : 0;
    }
    kv.key_scales[at] = of_key <= 3.4e38f ? of_key / 127.0f : NAN;
    kv.value_scales[at] = of_value <= 3.4e38f ? of_value / 127.0f : NAN;
}

template <Format format>
TPS_INLINE f32x16 load_as(const uint8_t* base, size_t at) {
    if constexpr (format == kF32) return load((const float*)base + at);
    if constexpr (format == kF16) return load_f16((const uint16_t*)base + at);
    return load_i8((const int8_t*)base + at);
}

// One block as floats: keys [head_dim][16], values [16][head_dim].
template <Format format>
void load_block(const KVLayer& kv, size_t block, float* keys, float* values) {
    const int d = kv.head_dim;
    const size_t first = block * d * kBlockTokens;
    f32x16 scale = set1(1.0f);
    if constexpr (format == kI8) scale = load(kv.key_scales + block * kBlockTokens);
    for (int i = 0; i < d * kBlockTokens; i += 16) {
        f32x16 key = load_as<format>(kv.keys, first + i);
        if constexpr (format == kI8) key = mul(key, scale);
        store(keys + i, key);
    }
    for (int offset = 0; offset < kBlockTokens; ++offset) {
        if constexpr (format == kI8) scale = set1(kv.value_scales[block * kBlockTokens + offset]);
        for (int i = 0; i < d; i += 16) {
            f32x16 value = load_as<format>(kv.values, first + offset * d + i);
            if constexpr (format == kI8) value = mul(value, scale);
            store(values + offset * d + i, value);
        }
    }
}

// Rows of pairs [2 rows / 2][columns][2] -> [rows][columns].
void load_pairs(const uint8_t* pairs, int rows, int columns, float* to) {
    for (int row = 0; row < rows; row += 2)
        for (int i = 0; i < columns; i += 16) {
            f32x16 even, odd;
            load_bf16_pairs(pairs + (row * columns + 2 * i) * sizeof(uint16_t), even, odd);
            store(to + row * columns + i, even);
            store(to + (row + 1) * columns + i, odd);
        }
}

void load_block_of(const KVLayer& kv, size_t block, float* keys, float* values) {
    switch (kv.format) {
        case kF32: return load_block<kF32>(kv, block, keys, values);
        case kBF16: {
            const size_t first = block * kv.head_dim * kBlockTokens * sizeof(uint16_t);
            load_pairs(kv.keys + first, kv.head_dim, kBlockTokens, keys);
            return load_pairs(kv.values + first, kBlockTokens, kv.head_dim, values);
        }
        case kF16: return load_block<kF16>(kv, block, keys, values);
        default: return load_block<kI8>(kv, block, keys, values);
    }
}

// --- attention ------------------------------------------------------------------------------------
//
// Softmax over the keys so far, updated span by span (Milakov & Gimelshein 2018; FlashAttention, Dao
// 2022). Spans are the positions [64 n, 64 n + 64) for every query, and a span that is hidden from a
// query changes none of its bits: its maximum stays, so its sums are multiplied by e^0 = 1 and 0 is
// added. That is why queries may share a pass however a prompt was cut into chunks.

constexpr float kLowest = -1e30f;
constexpr int kSpanBlocks = kSpan / kBlockTokens;

struct QueryRow {
    int position;
    float highest;
};

// Scores of R queries [R][head_dim] against `blocks` blocks of keys -> [R][64].
template <int R>
TPS_INLINE void score_rows(const float* queries, const float* keys, int d, int blocks, float* scores) {
    int block = 0;
    for (; block + 2 <= blocks; block += 2) {
        f32x16 a[R], b[R];
        for (int r = 0; r < R; ++r) a[r] = b[r] = zero();
        const float *key_a = keys + size_t(block) * d * 16, *key_b = key_a + size_t(d) * 16;
        for (int i = 0; i < d; ++i) {
            const f32x16 ka = load(key_a + i * 16), kb = load(key_b + i * 16);
            for (int r = 0; r < R; ++r) {
                const f32x16 q = set1(queries[r * d + i]);
                a[r] = fma(q, ka, a[r]);
                b[r] = fma(q, kb, b[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            store(scores + r * kSpan + block * 16, a[r]);
            store(scores + r * kSpan + block * 16 + 16, b[r]);
        }
    }
    for (; block < blocks; ++block) {
        f32x16 a[R];
        for (int r = 0; r < R; ++r) a[r] = zero();
        const float* key = keys + size_t(block) * d * 16;
        for (int i = 0; i < d; ++i) {
            const f32x16 k = load(key + i * 16);
            for (int r = 0; r < R; ++r) a[r] = fma(set1(queries[r * d + i]), k, a[r]);
        }
        for (int r = 0; r < R; ++r) store(scores + r * kSpan + block * 16, a[r]);
    }
}

// mixed[r] = mixed[r] * decay[r] + sum over positions of weight * value, for 16 V columns at a time.
template <int R, int V>
TPS_INLINE void mix_rows(const float* weights, const float* values, int d, int positions,
                         const float* decay, float* mixed) {
    for (int i = 0; i < d; i += 16 * V) {
        f32x16 acc[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v)
                acc[r][v] = mul(load(mixed + r * d + i + 16 * v), set1(decay[r]));
        for (int p = 0; p < positions; ++p) {
            f32x16 value[V];
            for (int v = 0; v < V; ++v) value[v] = load(values + size_t(p) * d + i + 16 * v);
            for (int r = 0; r < R; ++r) {
                const f32x16 weight = set1(weights[r * kSpan + p]);
                for (int v = 0; v < V; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) store(mixed + r * d + i + 16 * v, acc[r][v]);
    }
}

// Turns a row's scores into weights relative to the highest score so far; returns the factor for what
// was summed up before.
TPS_INLINE float weigh(float* scores, int span_start, int blocks, int window, QueryRow& row,
                       f32x16& total) {
    f32x16 s[kSpanBlocks];
    for (int b = 0; b < blocks; ++b) {
        s[b] = load(scores + 16 * b);
        const int start = span_start + 16 * b;
        const bool late = start + 15 > row.position;
        const bool early = window && start <= row.position - window;
        if (late || early) {
            float lanes[16];
            unpack(s[b], lanes);
            for (int i = 0; i < 16; ++i)
                if (start + i > row.position || (window && start + i <= row.position - window))
                    lanes[i] = -INFINITY;
            s[b] = load(lanes);
        }
    }
    f32x16 highest = set1(row.highest);
    for (int b = 0; b < blocks; ++b) highest = max(highest, s[b]);
    const float next = max_of(highest);
    float decay_lanes[16];
    unpack(exp(set1(row.highest - next)), decay_lanes);
    f32x16 span_total = zero();
    for (int b = 0; b < blocks; ++b) {
        const f32x16 weight = exp(sub(s[b], set1(next)));
        span_total = add(span_total, weight);
        store(scores + 16 * b, weight);
    }
    total = add(mul(total, set1(decay_lanes[0])), span_total);
    row.highest = next;
    return decay_lanes[0];
}

// A span of up to four blocks of positions, as floats, against `rows` queries. Takes 2 * kSpan * head_dim
// floats of scratch.
class FloatSpan {
  public:
    FloatSpan(float* scratch, int head_dim, int rows)
        : d_(head_dim), rows_(rows), keys_(scratch), values_(scratch + size_t(kSpan) * head_dim) {}

    void take_queries(const float* queries) { queries_ = queries; }  // [rows][head_dim]
    // Block b of the span, whose first `written` positions hold something; what is behind may be anything,
    // and 0 times NaN is NaN.
    void take_block(int b, const KVLayer& kv, size_t block, int written) {
        float* values = values_ + size_t(b) * kBlockTokens * d_;
        load_block_of(kv, block, keys_ + size_t(b) * kBlockTokens * d_, values);
        std::fill(values + size_t(written) * d_, values + size_t(kBlockTokens) * d_, 0.0f);
    }
    void skip_block(int b) {
        const size_t numbers = size_t(kBlockTokens) * d_;
        std::fill_n(keys_ + b * numbers, numbers, 0.0f);
        std::fill_n(values_ + b * numbers, numbers, 0.0f);
    }
    // -> scores [rows][kSpan]
    void score(int blocks, float* scores) const {
        int r = 0;
        for (; r + 4 <= rows_; r += 4)
            score_rows<4>(queries_ + r * d_, keys_, d_, blocks, scores + r * kSpan);
        for (; r < rows_; ++r) score_rows<1>(queries_ + r * d_, keys_, d_, blocks, scores + r * kSpan);
    }
    // mixed [rows][head_dim] = mixed * decay + weights [rows][kSpan] times values
    void mix(int blocks, const float* weights, const float* decay, float* mixed) const {
        if (d_ % 64 == 0)
            mix_all<4>(blocks * kBlockTokens, weights, decay, mixed);
        else
            mix_all<1>(blocks * kBlockTokens, weights, decay, mixed);
    }

  private:
    template <int V>
    void mix_all(int positions, const float* weights, const float* decay, float* mixed) const {
        int r = 0;
        for (; r + 4 <= rows_; r += 4)
            mix_rows<4, V>(weights + r * kSpan, values_, d_, positions, decay + r, mixed + r * d_);
        for (; r < rows_; ++r)
            mix_rows<1, V>(weights + r * kSpan, values_, d_, positions, decay + r, mixed + r * d_);
    }

    const int d_, rows_;
    float *const keys_, *const values_;  // [blocks][head_dim][16], [positions][head_dim]
    const float* queries_ = nullptr;
};

// Queries of `tokens` consecutive tokens of a sequence, for the heads of one group.
template <typename Span>
void attend(const KVLayer& kv, const AttentionArgs& args, const HeadGroup& group,
            const Sequence& sequence, int first_token, int tokens, int first_head, int heads) {
    const int d = kv.head_dim, rows = tokens * heads;
    float* queries = args.scratch + size_t(2 * kSpan) * d;
    float* mixed = queries + size_t(kQueryRows) * d;
    float* scores = mixed + size_t(kQueryRows) * d;
    QueryRow row[kQueryRows];
    f32x16 total[kQueryRows];
    float decay[kQueryRows];
    for (int r = 0; r < rows; ++r) {
        const int token = first_token + r / heads, head = first_head + r % heads;
        const float* q = args.qkv + size_t(sequence.first + token) * args.token_stride + size_t(head) * d;
        for (int i = 0; i < d; ++i) queries[r * d + i] = q[i] * args.scale;
        for (int i = 0; i < d; ++i) mixed[r * d + i] = 0;
        row[r] = {sequence.start + token, kLowest};
        total[r] = zero();
    }
    Span span(args.scratch, d, rows);
    span.take_queries(queries);
    const int last = row[rows - 1].position;
    const int oldest = args.window ? std::max(0, row[0].position - args.window + 1) : 0;
    for (int start = oldest / kSpan * kSpan; start <= last; start += kSpan) {
        const int blocks = std::min(kSpanBlocks, (last - start) / kBlockTokens + 1);
        for (int b = 0; b < blocks; ++b) {
            const int position = start + b * kBlockTokens;
            if (position + kBlockTokens <= oldest)  // its memory may be another's by now
                span.skip_block(b);
            else
                span.take_block(b, kv,
                                size_t(group.kv_head) * kv.blocks + sequence.blocks[position / kBlockTokens],
                                std::min(kBlockTokens, last - position + 1));
        }
        span.score(blocks, scores);
        for (int r = 0; r < rows; ++r)
            decay[r] = weigh(scores + r * kSpan, start, blocks, args.window, row[r], total[r]);
        span.mix(blocks, scores, decay, mixed);
    }
    for (int r = 0; r < rows; ++r) {
        const int token = first_token + r / heads, head = first_head + r % heads;
        float* out = args.out + size_t(sequence.first + token) * args.out_stride + args.out_column[head];
        const f32x16 inverse = set1(1.0f / sum(total[r]));
        for (int i = 0; i < d; i += 16) store(out + i, mul(load(mixed + r * d + i), inverse));
    }
}

void attention(const KVLayer& kv, const AttentionArgs& args, int thread, int threads) {
    auto* attend_to = attend<FloatSpan>;
#if defined(__AMX_TILE__)
    if (kv.format == kBF16) attend_to = attend<TileSpan>;
#endif
    int item = 0;
    for (int g = 0; g < args.group_count; ++g) {
        const HeadGroup& group = args.groups[g];
        const int heads_at_once = std::min(group.count, kQueryRows);
        const int tokens_at_once = kQueryRows / heads_at_once;
        for (int s = 0; s < args.sequence_count; ++s) {
            const Sequence& sequence = args.sequences[s];
            for (int head = 0; head < group.count; head += heads_at_once)
                for (int token = 0; token < sequence.count; token += tokens_at_once)
                    if (item++ % threads == thread)
                        attend_to(kv, args, group, sequence, token,
                                  std::min(tokens_at_once, sequence.count - token),
                                  group.first_head + head, std::min(heads_at_once, group.count - head));
        }
    }
}

// --- packing --------------------------------------------------------------------------------------

// The scale for numbers from -127 to 127: the nearest half, or the next one where halves are so coarse
// (below 2^-14) that the largest number would not fit.
float scale_for_i8(const float* x) {
    const float largest = largest_of(x, kGroup);
    const uint16_t nearest = f16_of(largest / 127.0f);
    const bool fits = float_of_f16(nearest) * 127.5f >= largest;
    return float_of_f16(fits ? nearest : uint16_t(nearest + 1));
}

// The scale for 16-level numbers with the least squared error, among some around the usual one, which
// maps the number of the largest magnitude to -8. NaN where the numbers are not finite or too large.
float scale_for_i4(const float* x) {
    float extreme = 0;
    for (int i = 0; i < kGroup; ++i)
        if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
    const f32x16 a = load(x), b = load(x + 16);
    const auto error_of = [](f32x16 v, f32x16 inverse, f32x16 scale) {
        const f32x16 q = min(set1(7.0f), max(set1(-8.0f), to_float(round_to_i32(mul(v, inverse)))));
        const f32x16 difference = sub(v, mul(q, scale));
        return mul(difference, difference);
    };
    float best = NAN, least = INFINITY;
    for (int step = -6; step <= 9; ++step) {
        const float scale = float_of_f16(f16_of(extreme / (-8.0f + 0.15f * float(step))));
        const f32x16 inverse = set1(scale != 0 ? 1.0f / scale : 0.0f);
        const float error = sum(add(error_of(a, inverse, set1(scale)), error_of(b, inverse, set1(scale))));
        if (error < least) {
            least = error;
            best = scale;
        }
    }
    return best;
}

template <Format format>
void pack_quantized(const Weight& weight, int block, const float* rows) {
    const int groups = weight.groups;
    uint8_t* data = weight.data + block * row_block_bytes(format, groups);
    uint16_t* scales = (uint16_t*)(data + groups * kGroupBytes<format>);
    for (int g = 0; g < groups; ++g)
        for (int r = 0; r < kRowBlock; ++r) {
            const float* x = rows + size_t(r) * groups * kGroup + g * kGroup;
            float scale;
            if constexpr (format == kI8)
                scale = scale_for_i8(x);
            else
                scale = scale_for_i4(x);
            const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
            scales[g * kRowBlock + r] = f16_of(scale);
            for (int k = 0; k < kGroup; ++k) {
                const float scaled = std::nearbyint(x[k] * inverse);
                if constexpr (format == kI8) {
                    const float q = std::min(127.0f, std::max(-127.0f, scaled));
                    data[g * 512 + k / 4 * 64 + r * 4 + k % 4] = uint8_t(int(q) + 128);
                } else {
                    const float q = std::min(7.0f, std::max(-8.0f, scaled));
                    uint8_t& byte = data[g * 256 + k % 16 / 4 * 64 + r * 4 + k % 4];
                    const uint8_t nibble = uint8_t(int(q) + 8);
                    byte = k < 16 ? nibble : uint8_t(byte | nibble << 4);
                }
            }
        }
}

void pack_block(const Weight& weight, int block, const float* rows) {
    const int columns = weight.groups * kGroup;
    uint8_t* data = weight.data + block * row_block_bytes(weight.format, weight.groups);
    switch (weight.format) {
        case kI8: return pack_quantized<kI8>(weight, block, rows);
        case kI4: return pack_quantized<kI4>(weight, block, rows);
        case kF32:
            for (int k = 0; k < columns; ++k)
                for (int r = 0; r < kRowBlock; ++r)
                    memcpy(data + (size_t(k) * kRowBlock + r) * 4, rows + size_t(r) * columns + k, 4);
            return;
        case kBF16:
        case kF16:
            for (int k = 0; k < columns; ++k)
                for (int r = 0; r < kRowBlock; ++r) {
                    const float number = rows[size_t(r) * columns + k];
                    const bool bf16 = weight.format == kBF16;
                    const uint16_t half = bf16 ? bf16_of(number) : f16_of(number);
                    const size_t at = bf16 ? (size_t(k / 2) * kRowBlock + r) * 2 + k % 2
                                           : size_t(k) * kRowBlock + r;
                    memcpy(data + at * 2, &half, 2);
                }
            return;
    }
}

#define TPS_STRING_OF(name) #name
#define TPS_STRING(name) TPS_STRING_OF(name)

template <Prefetch prefetch>
constexpr Kernels kernels_with = {
    TPS_STRING(TPS_LEVEL), kTileTokens, linear<prefetch>, rms_norm, swiglu, quantize,
    add_tree, rope, store_kv, attention, embed, best, add_to_top, softmax_sum, gumbel_best,
    pack_block,
};

}  // namespace

#if defined(__AVX2__)
constexpr Prefetch kOther = kFar;
#else
constexpr Prefetch kOther = kNear;  // a processor without AVX2 is none of those that it was measured on
#endif
extern const Kernels kernels[2];
const Kernels kernels[2] = {kernels_with<kNear>, kernels_with<kOther>};

}  // namespace tps::TPS_LEVEL
