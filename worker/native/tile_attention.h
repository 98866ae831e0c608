// Attention to bf16 keys and values in tiles, for kernels.cpp: queries and the softmax's weights are
// rounded to bf16, sums stay floats. One query takes this way as well.
#pragma once

#if defined(__AMX_TILE__)

#include <algorithm>
#include <cstring>

#include "tensors.h"
#include "tiles.h"

namespace tps::TPS_LEVEL {

// A span of up to four blocks of positions, against `rows` queries. Tiles 0 to 3 hold sums of a block's
// scores or of 16 columns of values; 4 and 5 queries or weights, a whole group of 32 numbers and half of one;
// 6 and 7 keys or values, 16 and 8 rows of pairs.
class TileSpan {
  public:
    TileSpan(float* scratch, int head_dim, int rows) : d_(head_dim), rows_(rows), shapes_(shapes(rows)) {
        queries_ = reinterpret_cast<uint16_t*>(scratch);
        weights_ = queries_ + kQueryRows * d_;
        zeros_ = weights_ + kQueryRows * kSpan;
        last_ = zeros_ + kBlockTokens * d_;
    }

    // queries [rows][head_dim] -> [head_dim / 32][rows][32], then [rows][16] if head_dim is no multiple of 32
    void take_queries(const float* queries) {
        uint16_t* to = queries_;
        for (int i = 0; i < d_; i += kGroup)
            for (int r = 0; r < rows_; ++r) {
                const float* from = queries + r * d_ + i;
                if (i + kGroup <= d_) {
                    store_bf16(to, from);
                    to += kGroup;
                } else {
                    store_bf16_half(to, from);
                    to += kGroup / 2;
                }
            }
    }
    // Block b of the span, whose first `written` positions hold something; what is behind may be anything,
    // and 0 times NaN is NaN.
    void take_block(int b, const KVLayer& kv, size_t block, int written) {
        const size_t numbers = size_t(kBlockTokens) * d_;
        keys_[b] = reinterpret_cast<const uint16_t*>(kv.keys) + block * numbers;
        values_[b] = reinterpret_cast<const uint16_t*>(kv.values) + block * numbers;
        if (written < kBlockTokens) {
            memset(last_, 0, numbers * sizeof(uint16_t));
            memcpy(last_, values_[b], size_t(written / 2) * 2 * d_ * sizeof(uint16_t));
            if (written % 2)
                for (int i = written / 2 * 2 * d_; i < (written + 1) * d_; i += 2) last_[i] = values_[b][i];
            values_[b] = last_;
        }
    }
    void skip_block(int b) {
        memset(zeros_, 0, size_t(kBlockTokens) * d_ * sizeof(uint16_t));
        keys_[b] = values_[b] = zeros_;
    }
    // -> scores [rows][kSpan]
    void score(int blocks, float* scores) const {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
        int i = 0;
        for (; i + kGroup <= d_; i += kGroup) score_columns<4, 6>(i, blocks);
        if (i < d_) score_columns<5, 7>(i, blocks);
        store_tiles(blocks, scores, kSpan * sizeof(float));
    }
    // mixed [rows][head_dim] = mixed * decay + weights [rows][kSpan] times values
    void mix(int blocks, const float* weights, const float* decay, float* mixed) {
        for (int r = 0; r < rows_; ++r)
            for (int b = 0; b < blocks; ++b)
                store_bf16_half(weights_ + (b * rows_ + r) * kBlockTokens, weights + r * kSpan + b * kBlockTokens);
        for (int r = 0; r < rows_; ++r)
            if (decay[r] != 1)
                for (int i = 0; i < d_; i += 16)
                    store(mixed + r * d_ + i, mul(load(mixed + r * d_ + i), set1(decay[r])));
        for (int i = 0; i < d_; i += 64) mix_columns(i, std::min(4, (d_ - i) / 16), blocks, mixed + i);
    }

  private:
    static TileShapes shapes(int rows) {
        TileShapes shapes(rows);
        shapes.row_bytes[5] = kTileRowBytes / 2;
        shapes.rows[7] = kTileRows / 2;
        return shapes;
    }
    template <int queries, int keys>
    void score_columns(int i, int blocks) const {
        tile_load<queries>(queries_ + i * rows_, queries == 4 ? kTileRowBytes : kTileRowBytes / 2);
        score_block<0, queries, keys>(i);
        if (blocks > 1) score_block<1, queries, keys>(i);
        if (blocks > 2) score_block<2, queries, keys>(i);
        if (blocks > 3) score_block<3, queries, keys>(i);
    }
    template <int b, int queries, int keys>
    void score_block(int i) const {
        tile_load<keys>(keys_[b] + i * kBlockTokens, kTileRowBytes);
        tile_dot_bf16<b, queries, keys>();
    }
    // Up to 64 columns from i on.
    void mix_columns(int i, int tiles, int blocks, float* mixed) const {
        const size_t stride = d_ * sizeof(float);
        load_tiles(tiles, mixed, stride);
        for (int b = 0; b < blocks; ++b) {
            tile_load<5>(weights_ + b * rows_ * kBlockTokens, kTileRowBytes / 2);
            const uint16_t* values = values_[b] + 2 * i;
            mix_block<0>(values);
            if (tiles > 1) mix_block<1>(values);
            if (tiles > 2) mix_block<2>(values);
            if (tiles > 3) mix_block<3>(values);
        }
        store_tiles(tiles, mixed, stride);
    }
    template <int tile>
    void mix_block(const uint16_t* values) const {
        tile_load<7>(values + 32 * tile, 2 * d_ * sizeof(uint16_t));
        tile_dot_bf16<tile, 5, 7>();
    }

    const int d_, rows_;
    const Tiles shapes_;
    uint16_t *queries_, *weights_, *zeros_, *last_;
    const uint16_t *keys_[kSpan / kBlockTokens], *values_[kSpan / kBlockTokens];
};

}  // namespace tps::TPS_LEVEL

#endif
