// A forward pass as a list of operations, recorded once and run for every step without coming back.
#pragma once

#include <cmath>
#include <memory>
#include <vector>

#include "collective.h"
#include "memory.h"
#include "pool.h"
#include "tensors.h"

namespace tps {

// Consecutive tokens of a step whose hidden states are added up.
struct Pooled {
    int32_t first, count;
    double* sum;  // [hidden]
};

// What the sampler asks about one row of logits: the best one; the best with noise (if the best one is
// finite); some of the best, and the softmax sums by virtual shard; or the logits themselves.
struct Wanted {
    enum What : int32_t { kBest, kNoisyBest, kTop, kTopAndSums, kWhole } what;
    int32_t whole;       // index of the row among the whole ones
    double temperature;  // of noise and sums
    uint64_t key;        // of noise
};

// What is different from step to step.
struct Step {
    int32_t tokens, sequence_count, logit_count;
    const int32_t* ids;         // [tokens]
    const Sequence* sequences;  // [sequence_count]; their tokens follow each other in the batch
    const int32_t* logit_rows;  // [logit_count]: the tokens whose successors are wanted
    const Wanted* wanted;       // [logit_count]
    double* best;               // [logit_count][2]: the highest of each row's logits and its column
    int32_t top_count;
    double* top;                // [logit_count][2][top_count]: logits, -inf where there are no more; ids
    double* sums;               // [logit_count][shards][2]: see SoftmaxSum
    float* logits;              // of whole rows, [whole rows][logit_stride]
    size_t logit_stride;
    const Pooled* pooled;       // [pooled_count]; none of their tokens is a logit row
    int32_t pooled_count;
};

// Keys and values of one model on this rank.
class KVMemory {
  public:
    KVMemory(Format format, int layers, int kv_heads, int head_dim, int blocks);

    const KVLayer& layer(int index) const { return layers_[index]; }
    void copy(int source, int target);  // one block, in every layer

    // Of one block in one layer for one head: its numbers (keys or values), its scales.
    static size_t block_bytes(Format format, int head_dim);
    static size_t scale_bytes(Format format) { return format == kI8 ? kBlockTokens * 4 : 0; }

  private:
    std::vector<KVLayer> layers_;
    Memory memory_;
};

// The highest of a shard's logits, and the sum of exp((logit - highest) / temperature), from those of its
// chunks, in their order.
class SoftmaxSum {
  public:
    explicit SoftmaxSum(double temperature) : temperature_(temperature) {}
    void add(const double chunk[2]);
    double highest() const { return highest_; }
    double total() const { return total_; }

  private:
    const double temperature_;
    double highest_ = -INFINITY, total_ = 0;
};

// The best `count` of some candidates, by column; fewer if there are not so many.
void keep_best(std::vector<Candidate>& candidates, size_t count);

using Buffer = int;  // index of a buffer of a program

class Program {
  public:
    static constexpr int kDone = -1;

    // `collective`: null if this rank is alone, or if the host does the collectives.
    // `alone`: the calling thread does everything, as the model is so small that threads would hardly
    // have met before a step is over.
    Program(const Kernels& kernels, Pool& pool, bool alone, Collective* collective)
        : kernels_(kernels), pool_(pool), threads_(alone ? 1 : pool.size()), collective_(collective) {}

    // Floats [tokens][floats].
    Buffer add_buffer(int floats);
    // Input of a linear, [tokens][groups * 32]; quantised if weight_offset (128 or 8) is not 0.
    Buffer add_activations(int groups, int weight_offset);

    struct Op {
        virtual ~Op() = default;
        virtual void run(Program& program, const Step& step, int thread) = 0;
        // Whether the host has to do something before the next operation.
        virtual bool stops() const { return false; }
        // Whether the step has work for it.
        virtual bool wanted(const Step&) const { return true; }
    };
    void add(std::unique_ptr<Op> op) { ops_.push_back(std::move(op)); }

    // Runs from operation `first` on. Returns kDone, or the operation to go on with after the host has
    // done what the one before it stopped for (added up roots, read a probe), or -2 - r if rank r stayed
    // silent in a collective.
    int run(const Step& step, int first);

    float* floats(Buffer buffer) const { return reinterpret_cast<float*>(buffers_[buffer].memory.data()); }
    int width(Buffer buffer) const { return buffers_[buffer].floats; }
    Activations activations(Buffer buffer, int tokens) const;
    int weight_offset(Buffer buffer) const { return buffers_[buffer].weight_offset; }
    float* scratch(int thread) const { return reinterpret_cast<float*>(scratch_[thread].data()); }
    void need_scratch(size_t floats) { scratch_floats_ = floats > scratch_floats_ ? floats : scratch_floats_; }

    const Kernels& kernels() const { return kernels_; }
    int threads() const { return threads_; }
    // Within an operation: returns when all threads have come here.
    void barrier() {
        if (threads_ > 1) pool_.barrier();
    }
    Collective* collective() const { return collective_; }
    double comm_seconds() const { return comm_seconds_; }
    // By thread 0.
    void exchange();

  private:
    struct Storage {
        int floats, weight_offset;
        Memory memory, quantized;
    };
    void reserve(int tokens);

    const Kernels& kernels_;
    Pool& pool_;
    const int threads_;
    Collective* const collective_;
    std::vector<Storage> buffers_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::vector<Memory> scratch_;
    size_t scratch_floats_ = 0;
    int capacity_ = 0;
    int lost_ = -1;
    double comm_seconds_ = 0;
};

// The operations. T: tokens of the step, or its logit rows where `of_logits` says so.

// into [T][size] = rows of a table [..., size]
struct Embed : Program::Op {
    const void* table;
    Format format;
    int size;  // the rest of a row of `into` becomes 0
    Buffer into;
    void run(Program&, const Step&, int thread) override;
};

// What is added to the residual stream: a buffer, the roots that all ranks have posted, or nothing.
struct Delta {
    Buffer buffer = -1;
    bool exchanged = false;
    int roots_per_rank[kMaxRoots];
    int addition_count = 0;
    int32_t additions[kMaxRoots][2];
    // row [size] of the stream += that of the token
    void add_to(float* row, Program&, const Step&, int token, int size) const;
};

// x += delta; out = norm of x. Roots are exchanged first.
struct AddNorm : Program::Op {
    Buffer x, out;
    Delta delta;
    bool of_logits = false;
    const float* weight;
    int count;  // numbers of a row; those behind them are 0
    float eps;
    void run(Program&, const Step&, int thread) override;
};

// sum += norm of (x + delta) for each pooled token, in the order of their positions, so that neither
// chunks nor threads change a bit. Roots were exchanged before; the rows of x are lost.
struct SumHidden : Program::Op {
    Buffer x;
    Delta delta;
    const float* weight;
    int count;  // numbers of a row
    float eps;
    void run(Program&, const Step&, int thread) override;
    bool wanted(const Step& step) const override { return step.pooled_count > 0; }
};

// out [T][out's width] = in times weight transposed; `to_peers`: its roots [root][T][rows] go where the
// next exchange takes them from; `to_host`: they stay in `out`, and the host adds them up.
struct Linear : Program::Op {
    enum Target { kBuffer, kPeers, kHost } target;
    Buffer in, out = -1;
    const Weight* weight;
    void run(Program&, const Step&, int thread) override;
    bool stops() const override { return target == kHost; }
};

// What is wanted of logits = in times weight transposed. They are made and looked at chunk by chunk, each
// within a virtual shard, whatever rank and thread it falls to.
class Head : public Program::Op {
  public:
    // shard_lengths: rows of the weight by virtual shard.
    Head(Buffer in, const Weight& weight, uint64_t first_id, std::vector<int32_t> shard_lengths,
         int threads);
    void run(Program&, const Step&, int thread) override;

  private:
    struct Chunk {
        int first, count, shard;
    };
    // What one thread has found out about a row in its chunks.
    struct Finding {
        double best[2], noisy[2];
        Top top;
    };
    struct Share {
        std::vector<float> logits;
        std::vector<Finding> rows;
        std::vector<Candidate> pool;
        std::vector<double> sums;  // [its chunks][rows][2]
    };
    void begin(Share& share, const Step& step, int chunks);
    void look(const Kernels& kernels, const Wanted& wanted, const Chunk& chunk, const float* logits,
              Finding& finding, double sums[2]);
    void finish(const Step& step, int row);
    void finish_top(const Step& step, int row);
    void finish_sums(const Step& step, int row);

    const Buffer in_;
    const Weight& weight_;
    const uint64_t first_id_;
    const int shards_;
    std::vector<Chunk> chunks_;
    std::vector<Share> shares_;  // of each thread, in the order of their chunks
};

// x [T] += bias
struct AddBias : Program::Op {
    Buffer x;
    const float* bias;  // [x's width]
    void run(Program&, const Step&, int thread) override;
};

// Norms query and key heads of qkv if there are weights for that, rotates them, all in place, and stores
// keys and values.
struct RopeStore : Program::Op {
    Buffer qkv;
    int heads;
    const float *query_norm = nullptr, *key_norm = nullptr;  // [the KV memory's head_dim]
    float eps = 0;
    int head_dim;            // that of the model; the KV memory's may be filled up
    const float *cos, *sin;  // [positions][head_dim / 2]
    const KVLayer* kv;
    void run(Program&, const Step&, int thread) override;
};

struct Attend : Program::Op {
    Buffer qkv, out;
    std::vector<HeadGroup> groups;
    std::vector<int32_t> out_column;  // of each head
    const KVLayer* kv;
    int window;
    float scale;  // of the scores
    void run(Program&, const Step&, int thread) override;
};

// Nothing, but the host reads buffers before the next operation.
struct Probe : Program::Op {
    void run(Program&, const Step&, int) override {}
    bool stops() const override { return true; }
};

// out [T][count] = silu(first half of a row of gate_up) * second half
struct SwiGLU : Program::Op {
    Buffer gate_up, out;
    int count;
    void run(Program&, const Step&, int thread) override;
};

}  // namespace tps
