// The data that kernels work on: packed weights, activations, KV memory, and one step's sequences.
//
// Layouts are the same for every instruction set. T is the number of tokens of a step; a group is 32
// consecutive columns (inputs) of a weight, which is also the unit of quantisation; a row block is 16
// consecutive rows (outputs).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tps {

constexpr int kGroup = 32;
constexpr int kRowBlock = 16;
constexpr int kBlockTokens = 16;       // of KV memory; BLOCK_TOKENS in shared/messages.py
constexpr int kMaxSegments = 256;      // virtual shards of one rank
constexpr int kMaxRoots = 64;          // subtrees of all ranks
constexpr int kVocabularyChunk = 512;  // logits that are looked at together, of one virtual shard

inline int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

enum Format : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kI4 = 4 };

// Bytes of one row block of a weight with `groups` groups: its numbers, then (i8, i4) its scales.
inline size_t weight_bytes_per_group(Format format) {
    switch (format) {
        case kF32: return 32 * 16 * 4;
        case kBF16:
        case kF16: return 32 * 16 * 2;
        case kI8: return 32 * 16;
        case kI4: return 32 * 16 / 2;
    }
    return 0;
}
inline bool is_quantized(Format format) { return format == kI8 || format == kI4; }
inline size_t row_block_bytes(Format format, int groups) {
    const size_t scales = is_quantized(format) ? size_t(groups) * kRowBlock * 2 : 0;
    return (size_t(groups) * weight_bytes_per_group(format) + scales + 63) / 64 * 64;
}

// A weight W [rows, columns], whose columns are cut into segments (virtual shards; one segment if the
// layer is not row-parallel), each filled up with zeros to whole groups. Per row block:
//
//   f32   [column][16 rows] float
//   f16   [column][16 rows] IEEE half
//   bf16  [column pair][16 rows][2] the upper halves of floats
//   i8    [group][8 fours of columns][16 rows][4 columns] uint8, the number + 128;
//         then [group][16 rows] IEEE half scales
//   i4    [group][4][16 rows][4 columns] uint8; low nibbles: the first half of the group's fours of
//         columns, high nibbles: the second half, each the number + 8; then scales as above
struct Weight {
    Format format;
    int32_t rows, row_blocks;
    int32_t groups;                    // of all segments
    int32_t segments, roots;
    int32_t segment_groups[kMaxSegments];
    // After segment s the top `additions[s]` pairs of the stack of partial sums are added up, and
    // `root[s]` >= 0 says that the result is that root (subtree of the reduction tree).
    int32_t additions[kMaxSegments];
    int32_t root[kMaxSegments];
    uint8_t* data;
};

// Quantised activations: numbers [T][groups * 32], scales and offsets [T][groups]. Tokens are kept in
// tiles of up to `tile_tokens`, as even as it goes: within a tile the order is [group][token][32].
struct Quantized {
    int8_t* numbers;
    float* scales;
    int32_t* offsets;  // minus the weights' offset (128 or 8) times the sum of the group's numbers
};

struct Activations {
    const float* floats;  // [T][groups * 32], for weights in floats
    Quantized quantized;  // for quantised weights
    int32_t tokens, groups;
};

// Where a linear writes: y[root * root_stride + token * token_stride + row - first_row].
struct Output {
    float* y;
    size_t root_stride, token_stride;
    int first_row = 0;
};

// A token that may be chosen, by its column among the rank's logits.
struct Candidate {
    float logit;
    int32_t column;
};

// The best `count` of the logits so far are among the `held` ones of the pool, which has room for
// 4 * count. Once there have been so many, all higher than `least` are.
struct Top {
    Candidate* pool;
    int32_t count, held = 0;
    float least = 0;
    bool full = false;
};

// Keys and values of one layer: for each KV head all blocks; keys [block][head_dim][16 positions],
// values [block][16 positions][head_dim]; in bf16 two rows of these are one row of pairs; for i8 a float
// scale for each position and head.
struct KVLayer {
    Format format;
    int32_t kv_heads, head_dim, blocks;
    uint8_t *keys, *values;
    float *key_scales, *value_scales;  // [kv_head][block][16]
};

// One sequence in a step: `count` tokens from position `start` on, rows `first`... of the batch.
struct Sequence {
    int32_t first, count, start;
    const int32_t* blocks;  // its block table
};

// Consecutive query heads that read one KV head.
struct HeadGroup {
    int32_t kv_head, first_head, count;
};

struct AttentionArgs {
    const float* qkv;  // [T][token_stride]: query heads first
    size_t token_stride;
    float* out;  // [T][out_stride]; head h at out_column[h]
    size_t out_stride;
    const int32_t* out_column;
    const HeadGroup* groups;
    int32_t group_count;
    const Sequence* sequences;
    int32_t sequence_count;
    int32_t window;  // 0: none
    float scale;
    float* scratch;  // of this thread, attention_scratch_floats(head_dim)
};

constexpr int kQueryRows = 16;         // query rows (token, head) that share one pass over keys
constexpr int kSpan = 64;              // positions between two updates of the running softmax
constexpr int kMaxHeadDim = 256;
inline size_t attention_scratch_floats(int head_dim) {
    return size_t(2 * kSpan + 2 * kQueryRows) * head_dim + kQueryRows * kSpan;
}

// How tokens are put into tiles: as few as possible, of at most `most`, sizes differing by one.
struct Tiling {
    int tokens, tiles;
    Tiling(int tokens, int most) : tokens(tokens), tiles((tokens + most - 1) / most) {}
    int begin(int tile) const { return int(int64_t(tile) * tokens / tiles); }
    int size(int tile) const { return begin(tile + 1) - begin(tile); }
    int of(int token) const {
        int tile = int(int64_t(token) * tiles / tokens);
        while (begin(tile + 1) <= token) ++tile;
        while (begin(tile) > token) --tile;
        return tile;
    }
};

// How the weights of a product are asked for ahead. No bit of a result depends on it. Intel's cores,
// left alone, do not keep enough lines on their way: kNear asks for every line, 4 KiB ahead, into L1.
// AMD's cores do, and asking takes the places from what they fetch by themselves: on Zen 4 one core
// reading alone then gets 1.3 to 1.7 times as far without. kFar asks for the next KiB of quantised
// weights only, into L2, where one token reads them; and where several tiles of tokens share a chunk of
// weights, for the next chunk (docs/performance.md).
enum Prefetch { kNear, kFar };

// The kernels of one instruction set. Ranges are this thread's part of the work.
struct Kernels {
    const char* name;
    int32_t tile_tokens;
    void (*linear)(const Weight&, const Activations&, const Output&, int block_begin, int block_end);
    // Sizes and counts are multiples of 16, those of activations of 32: rows are filled up with zeros.
    // The mean is over `count` numbers; behind them stand zeros.
    void (*rms_norm)(const float* x, const float* weight, int size, int count, float eps, float* out);
    void (*swiglu)(const float* gate, const float* up, int count, float* out);
    void (*quantize)(const float* x, int token, int group_begin, int group_end, int groups,
                     const Tiling& tiling, int weight_offset, const Quantized& out);
    // into += sum of the terms in the order of the tree
    void (*add_tree)(float* into, const float* const* terms, int count, const int32_t (*additions)[2],
                     int addition_count, int size);
    void (*rope)(float* x, const float* cos, const float* sin, int head_dim);
    void (*store_kv)(const KVLayer&, int kv_head, int block, int offset, const float* key,
                     const float* value);
    void (*attention)(const KVLayer&, const AttentionArgs&, int thread, int threads);
    void (*embed)(const void* table, Format format, int64_t row, int size, float* out);
    // See sampling.h.
    void (*best)(const float* logits, int size, int first, double best[2]);
    void (*add_to_top)(const float* logits, int size, int first, Top& top);
    void (*softmax_sum)(const float* logits, int size, double temperature, double out[2]);
    void (*gumbel_best)(const float* logits, int size, double temperature, uint64_t key,
                        uint64_t first_id, int first, double best[2]);
    // Packs one row block from rows [16][groups * 32].
    void (*pack_block)(const Weight&, int block, const float* rows);
};

}  // namespace tps
