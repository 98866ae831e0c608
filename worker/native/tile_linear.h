// Products of bf16 weights in tiles, for kernels.cpp. On this level one token takes this way as well: the
// tiles' own order of sums (`tile_dot_bf16`) is the arithmetic of all of them.
#pragma once

#if defined(__AMX_TILE__)

#include <algorithm>

#include "memory.h"
#include "tensors.h"
#include "tiles.h"

namespace tps::TPS_LEVEL {

// Weights in use and on their way; with more, what tokens need would not stay in the L2 cache, of which a
// virtual machine may have half.
constexpr size_t kMostAhead = 512 << 10;
constexpr int kTreeDepth = 10;  // log2(kMaxSegments) + 2: sums that wait, and those that were just made

// Activations rounded to bf16, the groups of each tile one behind the other: [tile][group][tokens][32].
// All tiles have as many tokens: the last one may begin before the one before it ends. What is then
// computed twice has the same bits.
class RoundedTiles {
  public:
    explicit RoundedTiles(const Activations& x)
        : tiles((x.tokens + kTileRows - 1) / kTileRows), tokens((x.tokens + tiles - 1) / tiles), all_(x.tokens) {
        thread_local Memory memory;  // its beginning is that of a cache line, which tiles are loaded by
        const size_t columns = size_t(x.groups) * kGroup;
        tile_numbers_ = tokens * columns;
        const size_t bytes = tiles * tile_numbers_ * sizeof(uint16_t);
        if (memory.bytes() < bytes) memory = Memory(bytes);
        uint16_t* to = numbers_ = reinterpret_cast<uint16_t*>(memory.data());
        for (int tile = 0; tile < tiles; ++tile)
            for (int g = 0; g < x.groups; ++g)
                for (int token = 0; token < tokens; ++token, to += kGroup)
                    store_bf16(to, x.floats + (begin(tile) + token) * columns + size_t(g) * kGroup);
    }
    int begin(int tile) const { return std::min(tile * tokens, all_ - tokens); }
    const uint16_t* of(int tile) const { return numbers_ + tile * tile_numbers_; }

    const int tiles, tokens;

  private:
    const int all_;
    size_t tile_numbers_;
    uint16_t* numbers_;
};

// Row blocks that come next, on their way from memory to the L2 cache while tiles are multiplied: a few
// lines at a time, or they would take the places from tiles on their way from L2.
class NextBlocks {
  public:
    NextBlocks() = default;
    // `distance` bytes apart, over so many passes through all groups.
    NextBlocks(const uint8_t* first, size_t distance, int passes)
        : first_(first), distance_(distance), step_(kGroup * kRowBlock * sizeof(uint16_t) / passes) {}
    template <int NB>
    TPS_INLINE void fetch_some() {
        for (int b = 0; b < NB; ++b)
            for (size_t line = (at_ + 63) / 64 * 64; line < at_ + step_; line += 64)
                __builtin_prefetch(first_ + b * distance_ + line, 0, 2);
        at_ += step_;
    }

  private:
    const uint8_t* first_ = nullptr;
    size_t distance_ = 0, step_ = 0;
    size_t at_ = 0;
};

// The sums [tokens][16 rows] of NB row blocks for MT tiles of tokens, in tiles 0 to 3; 4 and 5 hold
// activations [tokens][32 columns], 6 and 7 weights as they are packed, one group of a row block each.
template <int NB, int MT>
struct TileSums {
    static_assert(NB * MT <= 4 && MT <= 2);

    static void clear() {
        tile_zero<0>();
        if constexpr (NB * MT > 1) tile_zero<1>();
        if constexpr (NB * MT > 2) tile_zero<2>();
        if constexpr (NB * MT > 3) tile_zero<3>();
    }
    // One group.
    static void add(const uint16_t* const (&x)[MT], const uint8_t* const (&w)[NB]) {
        tile_load<4>(x[0], kTileRowBytes);
        if constexpr (MT > 1) tile_load<5>(x[1], kTileRowBytes);
        add_block<0>(w);
        if constexpr (NB > 1) add_block<1>(w);
        if constexpr (NB > 2) add_block<2>(w);
        if constexpr (NB > 3) add_block<3>(w);
    }
    static void copy(int block, int tile, float* to, size_t stride) {
        switch (block * MT + tile) {
            case 0: return tile_store<0>(to, stride);
            case 1: return tile_store<1>(to, stride);
            case 2: return tile_store<2>(to, stride);
            case 3: return tile_store<3>(to, stride);
        }
    }

  private:
    template <int b>
    static void add_block(const uint8_t* const (&w)[NB]) {
        constexpr int kWeights = 6 + b % 2;
        tile_load<kWeights>(w[b], kTileRowBytes);
        tile_dot_bf16<b * MT, 4, kWeights>();
        if constexpr (MT > 1) tile_dot_bf16<b * MT + 1, 5, kWeights>();
    }
};

// One token, or few: nothing is to be done but to wait for memory. Into L1, some groups ahead.
template <int NB>
TPS_INLINE void fetch_soon(const uint8_t* const (&w)[NB]) {
    for (int b = 0; b < NB; ++b)
        for (int line = 0; line < kTileRows; ++line) __builtin_prefetch(w[b] + 2048 + line * kTileRowBytes);
}

// Row blocks block, block + apart, ... and MT tiles of tokens from `tile` on.
template <int NB, int MT>
void linear_tiles(const Weight& weight, const RoundedTiles& x, const Output& out, int block, int apart,
                  int tile, NextBlocks& next) {
    using Sums = TileSums<NB, MT>;
    const size_t block_bytes = row_block_bytes(kBF16, weight.groups);
    const uint8_t* w[NB];
    const uint16_t* numbers[MT];
    for (int b = 0; b < NB; ++b) w[b] = weight.data + (block + b * apart) * block_bytes;
    for (int m = 0; m < MT; ++m) numbers[m] = x.of(tile + m);
    alignas(64) float stack[kTreeDepth][NB][MT][kTileRows][kRowBlock];
    int top = 0;
    for (int s = 0; s < weight.segments; ++s) {
        Sums::clear();
        for (int g = 0; g < weight.segment_groups[s]; ++g) {
            if (x.tiles == 1) fetch_soon(w);
            Sums::add(numbers, w);
            next.fetch_some<NB>();
            for (int b = 0; b < NB; ++b) w[b] += kGroup * kRowBlock * sizeof(uint16_t);
            for (int m = 0; m < MT; ++m) numbers[m] += x.tokens * kGroup;
        }
        const bool is_root = weight.root[s] >= 0;
        const int root = std::max(weight.root[s], 0);
        for (int b = 0; b < NB; ++b)
            for (int m = 0; m < MT; ++m) {
                float* y = out.y + root * out.root_stride + x.begin(tile + m) * out.token_stride +
                           (block + b * apart) * kRowBlock - out.first_row;
                if (is_root && weight.additions[s] == 0) {
                    Sums::copy(b, m, y, out.token_stride * sizeof(float));
                    continue;
                }
                Sums::copy(b, m, stack[top][b][m][0], kTileRowBytes);
                for (int token = 0; token < x.tokens; ++token) {
                    f32x16 sum = load(stack[top][b][m][token]);
                    for (int n = 1; n <= weight.additions[s]; ++n)
                        sum = add(load(stack[top - n][b][m][token]), sum);
                    store(is_root ? y + token * out.token_stride : stack[top - weight.additions[s]][b][m][token],
                          sum);
                }
            }
        top -= weight.additions[s];
        if (!is_root) ++top;
    }
}

template <int NB>
void linear_tiles_of(const Weight& weight, const RoundedTiles& x, const Output& out, int block, int end) {
    const size_t block_bytes = row_block_bytes(kBF16, weight.groups);
    NextBlocks next;
    if (block + 2 * NB <= end && 2 * NB * block_bytes <= kMostAhead)
        next = NextBlocks(weight.data + (block + NB) * block_bytes, block_bytes, (x.tiles + 1) / 2);
    int tile = 0;
    for (; tile + 2 <= x.tiles; tile += 2) linear_tiles<NB, 2>(weight, x, out, block, 1, tile, next);
    if (tile < x.tiles) linear_tiles<NB, 1>(weight, x, out, block, 1, tile, next);
}

inline void linear_in_tiles(const Weight& weight, const Activations& x, const Output& out, int begin, int end) {
    const RoundedTiles rounded(x);
    const Tiles shapes{TileShapes(rounded.tokens)};
    int block = begin;
    if (rounded.tiles == 1) {
        constexpr int kStreams = 4;  // each goes through neighbouring row blocks
        const int length = (end - begin) / kStreams;
        NextBlocks none;
        for (; block < begin + length; ++block)
            linear_tiles<kStreams, 1>(weight, rounded, out, block, length, 0, none);
        block = begin + kStreams * length;
    }
    // All tokens pass over two row blocks, which stay in the L2 cache meanwhile.
    for (; block + 2 <= end; block += 2) linear_tiles_of<2>(weight, rounded, out, block, end);
    if (block < end) linear_tiles_of<1>(weight, rounded, out, block, end);
}

}  // namespace tps::TPS_LEVEL

#endif
