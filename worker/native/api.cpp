// What the library exports: a C ABI for worker/ops/native.py and worker/comm/shm.py.
//
// Objects are made by *_new and given back by *_free. Out of memory is reported by a null pointer;
// whatever else can go wrong is the caller's mistake and is checked in Python.

#include <cstring>
#include <algorithm>
#include <memory>
#include <new>

#include "collective.h"
#include "dispatch.h"
#include "memory.h"
#include "pool.h"
#include "program.h"

using namespace tps;

#define TPS_API extern "C" __attribute__((visibility("default")))

namespace {

template <typename T, typename... Args>
T* make(Args&&... args) {
    try {
        return new T(static_cast<Args&&>(args)...);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

struct OwnedWeight {
    Weight weight;
    size_t bytes;
};

// buffer: -1 if there is none. exchanged: the roots of all ranks are added up instead.
Delta delta_of(const Program* program, int32_t buffer, int32_t exchanged, const int32_t* roots_per_rank,
               const int32_t* additions, int32_t addition_count) {
    Delta delta;
    delta.buffer = buffer;
    delta.exchanged = exchanged != 0;
    if (delta.exchanged) {
        memcpy(delta.roots_per_rank, roots_per_rank, program->collective()->world() * sizeof(int32_t));
        memcpy(delta.additions, additions, addition_count * 2 * sizeof(int32_t));
        delta.addition_count = addition_count;
    }
    return delta;
}

}  // namespace

TPS_API int32_t tps_abi_version() { return 8; }

// The instruction set in use; null if TPSERVE_ISA or TPSERVE_PREFETCH ask for what there is not.
TPS_API const char* tps_isa() { return kernels() ? kernels()->name : nullptr; }
TPS_API const char* tps_isa_problem() { return kernels_problem(); }

TPS_API Pool* tps_pool_new(int32_t threads, int32_t crowded) { return make<Pool>(threads, crowded != 0); }
TPS_API void tps_pool_free(Pool* pool) { delete pool; }

// --- collectives ----------------------------------------------------------------------------------

TPS_API Collective* tps_collective_new(void* region, size_t header_bytes, size_t first_buffer,
                                       size_t buffer_bytes, int32_t rank, int32_t world, int32_t crowded,
                                       double deadline_s) {
    return make<Collective>(static_cast<uint8_t*>(region), header_bytes, first_buffer, buffer_bytes, rank,
                            world, crowded != 0, deadline_s);
}
TPS_API void tps_collective_free(Collective* collective) { delete collective; }
TPS_API void* tps_collective_next_buffer(Collective* collective) { return collective->next_buffer(); }
TPS_API const void* tps_collective_posted_buffer(Collective* collective, int32_t rank) {
    return collective->posted_buffer(rank);
}
// -1, or the rank that stayed silent.
TPS_API int32_t tps_collective_exchange(Collective* collective) { return collective->exchange(); }

// --- weights --------------------------------------------------------------------------------------

// Freed after all weights in it.
TPS_API Arena* tps_arena_new() { return new (std::nothrow) Arena; }
TPS_API void tps_arena_free(Arena* arena) { delete arena; }

// segment_columns, additions, root: [segments]; see Weight.
TPS_API OwnedWeight* tps_weight_new(Arena* arena, int32_t format, int32_t rows, int32_t segments,
                                    const int32_t* segment_columns, const int32_t* additions,
                                    const int32_t* root, int32_t roots) {
    try {
        auto owned = std::make_unique<OwnedWeight>();
        Weight& weight = owned->weight;
        weight.format = Format(format);
        weight.rows = rows;
        weight.row_blocks = (rows + kRowBlock - 1) / kRowBlock;
        weight.segments = segments;
        weight.roots = roots;
        weight.groups = 0;
        for (int s = 0; s < segments; ++s) {
            weight.segment_groups[s] = (segment_columns[s] + kGroup - 1) / kGroup;
            weight.additions[s] = additions[s];
            weight.root[s] = root[s];
            weight.groups += weight.segment_groups[s];
        }
        owned->bytes = weight.row_blocks * row_block_bytes(weight.format, weight.groups);
        weight.data = arena->take(owned->bytes);
        return owned.release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}
TPS_API void tps_weight_free(OwnedWeight* owned) { delete owned; }
TPS_API uint8_t* tps_weight_data(const OwnedWeight* owned) { return owned->weight.data; }
TPS_API size_t tps_weight_bytes(const OwnedWeight* owned) { return owned->bytes; }

// Packs source [rows][sum of segment_columns], f32, bf16 or f16.
TPS_API void tps_weight_pack(Pool* pool, OwnedWeight* owned, const void* source, int32_t source_format,
                             const int32_t* segment_columns) {
    const Weight& weight = owned->weight;
    size_t columns = 0;
    for (int s = 0; s < weight.segments; ++s) columns += segment_columns[s];
    pool->run([&](int thread) {
        const size_t width = size_t(weight.groups) * kGroup;
        const auto rows = std::make_unique<float[]>(kRowBlock * width);
        const auto row = std::make_unique<float[]>(columns);
        for (int block = thread; block < weight.row_blocks; block += pool->size()) {
            std::fill_n(rows.get(), kRowBlock * width, 0.0f);
            for (int r = 0; r < kRowBlock && block * kRowBlock + r < weight.rows; ++r) {
                kernels()->embed(source, Format(source_format), block * kRowBlock + r, int(columns),
                                 row.get());
                const float* from = row.get();
                float* to = rows.get() + r * width;
                for (int s = 0; s < weight.segments; ++s) {
                    std::copy_n(from, segment_columns[s], to);
                    from += segment_columns[s];
                    to += weight.segment_groups[s] * kGroup;
                }
            }
            kernels()->pack_block(weight, block, rows.get());
        }
    });
}

// --- keys and values ------------------------------------------------------------------------------

TPS_API KVMemory* tps_kv_new(int32_t format, int32_t layers, int32_t kv_heads, int32_t head_dim,
                             int32_t blocks) {
    return make<KVMemory>(Format(format), layers, kv_heads, head_dim, blocks);
}
TPS_API void tps_kv_free(KVMemory* kv) { delete kv; }
TPS_API void tps_kv_copy(KVMemory* kv, int32_t source, int32_t target) { kv->copy(source, target); }

// --- sampling; rows of logits [rows][stride] ------------------------------------------------------

// values, columns: [rows][count]
TPS_API void tps_top(const float* logits, size_t stride, int32_t rows, int32_t size, int32_t count,
                     float* values, int64_t* columns) {
    const auto pool = std::make_unique<Candidate[]>(4 * size_t(count));
    for (int row = 0; row < rows; ++row) {
        Top top{pool.get(), count};
        kernels()->add_to_top(logits + row * stride, size, 0, top);
        std::vector<Candidate> found(top.pool, top.pool + top.held);
        keep_best(found, count);
        for (int i = 0; i < count; ++i) {
            const bool is_there = i < int(found.size());
            values[size_t(row) * count + i] = is_there ? found[i].logit : -INFINITY;
            columns[size_t(row) * count + i] = is_there ? found[i].column : 0;
        }
    }
}

// out: [rows][shards][2], for the logits [shard_starts[s], shard_starts[s] + shard_lengths[s])
TPS_API void tps_softmax_sums(const float* logits, size_t stride, int32_t rows, const double* temperature,
                              const int64_t* shard_starts, const int64_t* shard_lengths, int32_t shards,
                              double* out) {
    for (int row = 0; row < rows; ++row)
        for (int s = 0; s < shards; ++s, out += 2) {
            SoftmaxSum sum(temperature[row]);
            for (int64_t first = 0; first < shard_lengths[s]; first += kVocabularyChunk) {
                const int count = int(std::min<int64_t>(kVocabularyChunk, shard_lengths[s] - first));
                double chunk[2];
                kernels()->softmax_sum(logits + row * stride + shard_starts[s] + first, count,
                                       temperature[row], chunk);
                sum.add(chunk);
            }
            out[0] = sum.highest();
            out[1] = sum.total();
        }
}

// best: [rows][2], the best score and its column
TPS_API void tps_gumbel_best(const float* logits, size_t stride, int32_t rows, int32_t size,
                             const double* temperature, const uint64_t* keys, uint64_t first_id,
                             double* best) {
    for (int row = 0; row < rows; ++row) {
        best[2 * row] = -INFINITY;
        best[2 * row + 1] = 0;
        kernels()->gumbel_best(logits + row * stride, size, temperature[row], keys[row], first_id, 0,
                               best + 2 * row);
    }
}

// --- programs -------------------------------------------------------------------------------------

TPS_API Program* tps_program_new(Pool* pool, int32_t alone, Collective* collective) {
    return make<Program>(*kernels(), *pool, alone != 0, collective);
}
TPS_API void tps_program_free(Program* program) { delete program; }

TPS_API int32_t tps_program_add_buffer(Program* program, int32_t floats) {
    return program->add_buffer(floats);
}
TPS_API int32_t tps_program_add_activations(Program* program, int32_t groups, int32_t weight_offset) {
    return program->add_activations(groups, weight_offset);
}

TPS_API void tps_program_embed(Program* program, const void* table, int32_t format, int32_t size,
                               int32_t into) {
    auto op = std::make_unique<Embed>();
    op->table = table;
    op->format = Format(format);
    op->size = size;
    op->into = into;
    program->add(std::move(op));
}

// delta, exchanged: see delta_of.
TPS_API void tps_program_add_norm(Program* program, int32_t x, int32_t delta, int32_t out,
                                  const float* weight, int32_t count, float eps, int32_t of_logits,
                                  int32_t exchanged, const int32_t* roots_per_rank,
                                  const int32_t* additions, int32_t addition_count) {
    auto op = std::make_unique<AddNorm>();
    op->x = x;
    op->delta = delta_of(program, delta, exchanged, roots_per_rank, additions, addition_count);
    op->out = out;
    op->weight = weight;
    op->count = count;
    op->eps = eps;
    op->of_logits = of_logits != 0;
    program->add(std::move(op));
}

// Behind the add_norm of the same x and delta, which has exchanged the roots.
TPS_API void tps_program_sum_hidden(Program* program, int32_t x, int32_t delta, const float* weight,
                                    int32_t count, float eps, int32_t exchanged,
                                    const int32_t* roots_per_rank, const int32_t* additions,
                                    int32_t addition_count) {
    auto op = std::make_unique<SumHidden>();
    op->x = x;
    op->delta = delta_of(program, delta, exchanged, roots_per_rank, additions, addition_count);
    op->weight = weight;
    op->count = count;
    op->eps = eps;
    program->add(std::move(op));
}

TPS_API void tps_program_linear(Program* program, int32_t target, int32_t in, const OwnedWeight* weight,
                                int32_t out) {
    auto op = std::make_unique<Linear>();
    op->target = Linear::Target(target);
    op->in = in;
    op->out = out;
    op->weight = &weight->weight;
    program->add(std::move(op));
}

// shard_lengths: rows of the weight by virtual shard; first_id: token id of the first row.
TPS_API void tps_program_head(Program* program, int32_t in, const OwnedWeight* weight, uint64_t first_id,
                              const int32_t* shard_lengths, int32_t shards) {
    program->add(std::make_unique<Head>(in, weight->weight, first_id,
                                        std::vector<int32_t>(shard_lengths, shard_lengths + shards),
                                        program->threads()));
}

TPS_API void tps_program_add_bias(Program* program, int32_t x, const float* bias) {
    auto op = std::make_unique<AddBias>();
    op->x = x;
    op->bias = bias;
    program->add(std::move(op));
}

// query_norm, key_norm: null where heads are not normed.
TPS_API void tps_program_rope_store(Program* program, int32_t qkv, int32_t heads, int32_t head_dim,
                                    const float* query_norm, const float* key_norm, float eps,
                                    const float* cos, const float* sin, const KVMemory* kv,
                                    int32_t layer) {
    auto op = std::make_unique<RopeStore>();
    op->qkv = qkv;
    op->heads = heads;
    op->head_dim = head_dim;
    op->query_norm = query_norm;
    op->key_norm = key_norm;
    op->eps = eps;
    op->cos = cos;
    op->sin = sin;
    op->kv = &kv->layer(layer);
    program->add(std::move(op));
}

// groups: [group_count][3]: KV head, first query head, query heads. out_column: [heads].
TPS_API void tps_program_attention(Program* program, int32_t qkv, int32_t out, const KVMemory* kv,
                                   int32_t layer, const int32_t* groups, int32_t group_count,
                                   const int32_t* out_column, int32_t heads, int32_t window,
                                   float scale) {
    auto op = std::make_unique<Attend>();
    op->qkv = qkv;
    op->out = out;
    op->kv = &kv->layer(layer);
    op->window = window;
    op->scale = scale;
    for (int g = 0; g < group_count; ++g)
        op->groups.push_back({groups[3 * g], groups[3 * g + 1], groups[3 * g + 2]});
    op->out_column.assign(out_column, out_column + heads);
    program->need_scratch(attention_scratch_floats(op->kv->head_dim));
    program->add(std::move(op));
}

TPS_API void tps_program_swiglu(Program* program, int32_t gate_up, int32_t out, int32_t count) {
    auto op = std::make_unique<SwiGLU>();
    op->gate_up = gate_up;
    op->out = out;
    op->count = count;
    program->add(std::move(op));
}

// Stops for the host. It reads `x` and `delta`, which are named so that they keep their buffers until then.
TPS_API void tps_program_probe(Program* program, int32_t /* x */, int32_t /* delta */) {
    program->add(std::make_unique<Probe>());
}

// See Program::run.
TPS_API int32_t tps_program_run(Program* program, const Step* step, int32_t first) {
    return program->run(*step, first);
}
TPS_API float* tps_program_floats(Program* program, int32_t buffer) { return program->floats(buffer); }
TPS_API double tps_program_comm_seconds(const Program* program) { return program->comm_seconds(); }
