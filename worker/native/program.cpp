#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace tps {

namespace {

constexpr size_t kSlackFloats = 64;  // vectors may read, not use, what lies behind the last row
constexpr size_t kChunkStride = kVocabularyChunk + kRowBlock;  // rows do not meet in few cache sets

// This thread's part of `count` things: [begin, end).
struct Part {
    int begin, end;
    Part(int count, int thread, int threads)
        : begin(int(int64_t(count) * thread / threads)), end(int(int64_t(count) * (thread + 1) / threads)) {}
};

// Quantises groups of rows of activations; what is split among threads are all groups of all tokens.
void quantize_part(Program& program, Buffer buffer, int tokens, int thread) {
    const int offset = program.weight_offset(buffer);
    if (offset == 0 || tokens == 0) return;
    const Activations a = program.activations(buffer, tokens);
    const Tiling tiling(tokens, program.kernels().tile_tokens);
    const Part part(tokens * a.groups, thread, program.threads());
    for (int i = part.begin; i < part.end;) {
        const int token = i / a.groups, group = i % a.groups;
        const int end = std::min(a.groups, group + part.end - i);
        program.kernels().quantize(a.floats + size_t(token) * a.groups * kGroup, token, group, end,
                                   a.groups, tiling, offset, a.quantized);
        i += end - group;
    }
}

void quantize_token(Program& program, const Activations& a, int weight_offset, int token) {
    if (weight_offset == 0) return;
    program.kernels().quantize(a.floats + size_t(token) * a.groups * kGroup, token, 0, a.groups, a.groups,
                               Tiling(a.tokens, program.kernels().tile_tokens), weight_offset,
                               a.quantized);
}

}  // namespace

// --- memory ---------------------------------------------------------------------------------------

size_t KVMemory::block_bytes(Format format, int head_dim) {
    const size_t number = format == kF32 ? 4 : format == kI8 ? 1 : 2;
    return size_t(head_dim) * kBlockTokens * number;
}

KVMemory::KVMemory(Format format, int layers, int kv_heads, int head_dim, int blocks)
    : memory_(2 * size_t(layers) * kv_heads * blocks *
                  (block_bytes(format, head_dim) + scale_bytes(format)),
              false) {
    const size_t all = size_t(kv_heads) * blocks;
    const size_t numbers = all * block_bytes(format, head_dim), scales = all * scale_bytes(format);
    uint8_t* at = memory_.data();
    const auto take = [&](size_t bytes) {
        uint8_t* taken = at;
        at += bytes;
        return taken;
    };
    for (int i = 0; i < layers; ++i) {
        KVLayer layer{format, kv_heads, head_dim, blocks, take(numbers), take(numbers), nullptr, nullptr};
        if (scales) {
            layer.key_scales = reinterpret_cast<float*>(take(scales));
            layer.value_scales = reinterpret_cast<float*>(take(scales));
        }
        layers_.push_back(layer);
    }
}

void KVMemory::copy(int source, int target) {
    const auto copy_block = [&](void* base, size_t bytes, int head, int blocks) {
        if (bytes == 0) return;
        uint8_t* first = static_cast<uint8_t*>(base) + size_t(head) * blocks * bytes;
        memcpy(first + target * bytes, first + source * bytes, bytes);
    };
    for (const KVLayer& layer : layers_)
        for (int head = 0; head < layer.kv_heads; ++head) {
            const size_t bytes = block_bytes(layer.format, layer.head_dim);
            copy_block(layer.keys, bytes, head, layer.blocks);
            copy_block(layer.values, bytes, head, layer.blocks);
            copy_block(layer.key_scales, scale_bytes(layer.format), head, layer.blocks);
            copy_block(layer.value_scales, scale_bytes(layer.format), head, layer.blocks);
        }
}

Buffer Program::add_buffer(int floats) {
    buffers_.push_back({floats, 0, {}, {}});
    return Buffer(buffers_.size()) - 1;
}

Buffer Program::add_activations(int groups, int weight_offset) {
    buffers_.push_back({groups * kGroup, weight_offset, {}, {}});
    return Buffer(buffers_.size()) - 1;
}

void Program::reserve(int tokens) {
    if (tokens <= capacity_) return;
    capacity_ = std::max(tokens, 2 * capacity_);
    for (Storage& buffer : buffers_) {
        const size_t numbers = size_t(capacity_) * buffer.floats;
        buffer.memory = Memory((numbers + kSlackFloats) * sizeof(float));
        // int8 numbers, then for each group a float and an int32
        if (buffer.weight_offset) buffer.quantized = Memory(numbers + numbers / kGroup * 8 + 64);
    }
    scratch_.clear();
    for (int thread = 0; thread < threads_; ++thread)
        scratch_.emplace_back(scratch_floats_ * sizeof(float));
}

Activations Program::activations(Buffer buffer, int tokens) const {
    const Storage& storage = buffers_[buffer];
    Activations a{floats(buffer), {}, tokens, storage.floats / kGroup};
    if (storage.weight_offset) {
        const size_t groups = size_t(capacity_) * a.groups;
        uint8_t* base = storage.quantized.data();
        a.quantized.numbers = reinterpret_cast<int8_t*>(base);
        a.quantized.scales = reinterpret_cast<float*>(base + groups * kGroup);
        a.quantized.offsets = reinterpret_cast<int32_t*>(base + groups * (kGroup + 4));
    }
    return a;
}

// --- running --------------------------------------------------------------------------------------

void Program::exchange() {
    const auto begun = std::chrono::steady_clock::now();
    lost_ = collective_->exchange();
    comm_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
}

int Program::run(const Step& step, int first) {
    reserve(std::max(step.tokens, 1));
    lost_ = -1;
    int stopped = kDone;
    const std::function<void(int)> operations = [&](int thread) {
        for (size_t i = first; i < ops_.size(); ++i) {
            if (!ops_[i]->wanted(step)) continue;
            ops_[i]->run(*this, step, thread);
            // Read before the barrier, behind which thread 0 may already be in the next exchange.
            const bool lost = lost_ >= 0;
            barrier();
            if (lost) return;
            if (ops_[i]->stops()) {
                if (thread == 0) stopped = int(i) + 1;
                return;
            }
        }
    };
    if (threads_ == 1)
        operations(0);
    else
        pool_.run(operations);
    return lost_ >= 0 ? -2 - lost_ : stopped;
}

void Embed::run(Program& program, const Step& step, int thread) {
    const Part part(step.tokens, thread, program.threads());
    const int width = program.width(into);
    for (int t = part.begin; t < part.end; ++t) {
        float* row = program.floats(into) + size_t(t) * width;
        program.kernels().embed(table, format, step.ids[t], size, row);
        std::fill(row + size, row + width, 0.0f);
    }
}

void Delta::add_to(float* row, Program& program, const Step& step, int token, int size) const {
    const float* terms[kMaxRoots];
    int term_count = 0;
    if (exchanged) {
        const Collective* collective = program.collective();
        for (int rank = 0; rank < collective->world(); ++rank) {
            const float* roots = reinterpret_cast<const float*>(collective->posted_buffer(rank));
            for (int root = 0; root < roots_per_rank[rank]; ++root)
                terms[term_count++] = roots + (size_t(root) * step.tokens + token) * size;
        }
    } else if (buffer >= 0) {
        terms[term_count++] = program.floats(buffer) + size_t(token) * size;
    }
    if (term_count) program.kernels().add_tree(row, terms, term_count, additions, addition_count, size);
}

void AddNorm::run(Program& program, const Step& step, int thread) {
    if (delta.exchanged) {
        if (thread == 0) program.exchange();
        program.barrier();
    }
    const int rows = of_logits ? step.logit_count : step.tokens;
    const int size = program.width(x);
    const Part part(rows, thread, program.threads());
    const Activations normed = program.activations(out, rows);
    for (int i = part.begin; i < part.end; ++i) {
        const int token = of_logits ? step.logit_rows[i] : i;
        float* row = program.floats(x) + size_t(token) * size;
        delta.add_to(row, program, step, token, size);
        float* to = program.floats(out) + size_t(i) * size;
        program.kernels().rms_norm(row, weight, size, count, eps, to);
        quantize_token(program, normed, program.weight_offset(out), i);
    }
}

void SumHidden::run(Program& program, const Step& step, int thread) {
    const int size = program.width(x);
    for (int i = 0; i < step.pooled_count; ++i) {
        const Pooled& pooled = step.pooled[i];
        const Part part(pooled.count, thread, program.threads());
        for (int token = pooled.first + part.begin; token < pooled.first + part.end; ++token) {
            float* row = program.floats(x) + size_t(token) * size;
            delta.add_to(row, program, step, token, size);
            program.kernels().rms_norm(row, weight, size, count, eps, row);
        }
    }
    program.barrier();
    const Part part(count, thread, program.threads());
    for (int i = 0; i < step.pooled_count; ++i) {
        const Pooled& pooled = step.pooled[i];
        for (int token = pooled.first; token < pooled.first + pooled.count; ++token) {
            const float* row = program.floats(x) + size_t(token) * size;
            for (int column = part.begin; column < part.end; ++column)
                pooled.sum[column] += row[column];
        }
    }
}

void Linear::run(Program& program, const Step& step, int thread) {
    const int tokens = step.tokens;
    if (tokens == 0) return;
    const size_t width = round_up(weight->rows, kRowBlock);
    Output to{nullptr, size_t(tokens) * width, width};
    switch (target) {
        case kBuffer:
        case kHost: to.y = program.floats(out); break;
        case kPeers: to.y = reinterpret_cast<float*>(program.collective()->next_buffer()); break;
    }
    const Part part(weight->row_blocks, thread, program.threads());
    program.kernels().linear(*weight, program.activations(in, tokens), to, part.begin, part.end);
}

void AddBias::run(Program& program, const Step& step, int thread) {
    const Part part(step.tokens, thread, program.threads());
    const int width = program.width(x);
    for (int t = part.begin; t < part.end; ++t)
        program.kernels().add_tree(program.floats(x) + size_t(t) * width, &bias, 1, nullptr, 0, width);
}

void RopeStore::run(Program& program, const Step& step, int thread) {
    const Kernels& kernels = program.kernels();
    const int d = kv->head_dim, kv_heads = kv->kv_heads, half = head_dim / 2;
    int sequence = 0;
    const Part part(step.tokens, thread, program.threads());
    for (int t = part.begin; t < part.end; ++t) {
        while (t >= step.sequences[sequence].first + step.sequences[sequence].count) ++sequence;
        const int position = step.sequences[sequence].start + t - step.sequences[sequence].first;
        float* row = program.floats(qkv) + size_t(t) * program.width(qkv);
        const size_t angles = size_t(position) * half;
        for (int head = 0; head < heads + kv_heads; ++head) {
            float* x = row + size_t(head) * d;
            if (query_norm) kernels.rms_norm(x, head < heads ? query_norm : key_norm, d, head_dim, eps, x);
            kernels.rope(x, cos + angles, sin + angles, head_dim);
        }
        const int block = step.sequences[sequence].blocks[position / kBlockTokens];
        for (int head = 0; head < kv_heads; ++head) {
            const float* key = row + size_t(heads + head) * d;
            kernels.store_kv(*kv, head, block, position % kBlockTokens, key, key + size_t(kv_heads) * d);
        }
    }
}

void Attend::run(Program& program, const Step& step, int thread) {
    const int threads = program.threads(), d = kv->head_dim;
    AttentionArgs args{};
    args.qkv = program.floats(qkv);
    args.token_stride = program.width(qkv);
    args.out = program.floats(out);
    args.out_stride = program.width(out);
    args.out_column = out_column.data();
    args.groups = groups.data();
    args.group_count = int(groups.size());
    args.sequences = step.sequences;
    args.sequence_count = step.sequence_count;
    args.window = window;
    args.scale = scale;
    args.scratch = program.scratch(thread);
    if (out_column.size() * d < args.out_stride) {  // between heads there are gaps, which must be 0
        const Part part(step.tokens, thread, threads);
        memset(args.out + part.begin * args.out_stride, 0,
               (part.end - part.begin) * args.out_stride * sizeof(float));
        program.barrier();
    }
    program.kernels().attention(*kv, args, thread, threads);
    if (program.weight_offset(out)) {
        program.barrier();
        quantize_part(program, out, step.tokens, thread);
    }
}

void SwiGLU::run(Program& program, const Step& step, int thread) {
    const size_t width = program.width(out);
    const int offset = program.weight_offset(out), groups = int(width) / kGroup;
    const Activations a = program.activations(out, step.tokens);
    const Tiling tiling(std::max(step.tokens, 1), program.kernels().tile_tokens);
    const Part part(step.tokens * groups, thread, program.threads());
    for (int i = part.begin; i < part.end;) {
        const int token = i / groups, group = i % groups;
        const int end = std::min(groups, group + part.end - i);
        const float* gate = program.floats(gate_up) + size_t(token) * program.width(gate_up);
        float* row = program.floats(out) + token * width;
        program.kernels().swiglu(gate + group * kGroup, gate + count + group * kGroup,
                                 (end - group) * kGroup, row + group * kGroup);
        for (int column = std::max(count, group * kGroup); column < end * kGroup; ++column) row[column] = 0;
        if (offset)
            program.kernels().quantize(row, token, group, end, groups, tiling, offset, a.quantized);
        i += end - group;
    }
}

// --- the head -------------------------------------------------------------------------------------

void SoftmaxSum::add(const double chunk[2]) {
    if (chunk[0] > highest_) {
        total_ = total_ * std::exp((highest_ - chunk[0]) / temperature_) + chunk[1];
        highest_ = chunk[0];
    } else if (chunk[0] > -INFINITY) {
        total_ += chunk[1] * std::exp((chunk[0] - highest_) / temperature_);
    }
}

void keep_best(std::vector<Candidate>& candidates, size_t count) {
    if (candidates.size() > count) {
        const auto better = [](const Candidate& a, const Candidate& b) {
            return a.logit > b.logit || (a.logit == b.logit && a.column < b.column);
        };
        std::nth_element(candidates.begin(), candidates.begin() + count, candidates.end(), better);
        candidates.resize(count);
    }
    std::sort(candidates.begin(), candidates.end(),
              [](const Candidate& a, const Candidate& b) { return a.column < b.column; });
}

Head::Head(Buffer in, const Weight& weight, uint64_t first_id, std::vector<int32_t> shard_lengths,
           int threads)
    : in_(in), weight_(weight), first_id_(first_id), shards_(int(shard_lengths.size())), shares_(threads) {
    int first = 0;
    for (int shard = 0; shard < shards_; ++shard) {
        const int end = first + shard_lengths[shard];
        for (; first < end; first += chunks_.back().count)
            chunks_.push_back({first, std::min(kVocabularyChunk, end - first), shard});
    }
}

void Head::begin(Share& share, const Step& step, int chunks) {
    const size_t rows = step.logit_count, room = 4 * size_t(step.top_count);
    share.logits.resize(std::max(share.logits.size(), rows * kChunkStride));
    share.rows.assign(rows, {{-INFINITY, 0}, {-INFINITY, 0}, {nullptr, step.top_count}});
    if (step.top_count == 0) return;
    share.pool.resize(std::max(share.pool.size(), rows * room));
    share.sums.resize(std::max(share.sums.size(), 2 * rows * chunks));
    for (size_t row = 0; row < rows; ++row) share.rows[row].top.pool = share.pool.data() + row * room;
}

void Head::look(const Kernels& kernels, const Wanted& wanted, const Chunk& chunk, const float* logits,
                Finding& finding, double sums[2]) {
    kernels.best(logits, chunk.count, chunk.first, finding.best);
    if (wanted.what == Wanted::kNoisyBest)
        kernels.gumbel_best(logits, chunk.count, wanted.temperature, wanted.key, first_id_ + chunk.first,
                            chunk.first, finding.noisy);
    if (wanted.what == Wanted::kTop || wanted.what == Wanted::kTopAndSums)
        kernels.add_to_top(logits, chunk.count, chunk.first, finding.top);
    if (wanted.what == Wanted::kTopAndSums)
        kernels.softmax_sum(logits, chunk.count, wanted.temperature, sums);
}

void Head::run(Program& program, const Step& step, int thread) {
    const int rows = step.logit_count;
    if (rows == 0) return;
    const Part mine(int(chunks_.size()), thread, program.threads());
    Share& share = shares_[thread];
    begin(share, step, mine.end - mine.begin);
    const Activations activations = program.activations(in_, rows);
    double* sums = share.sums.data();
    for (int i = mine.begin; i < mine.end; ++i) {
        const Chunk& chunk = chunks_[i];
        const Output to{share.logits.data(), 0, kChunkStride, chunk.first};
        program.kernels().linear(weight_, activations, to, chunk.first / kRowBlock,
                                 (chunk.first + chunk.count + kRowBlock - 1) / kRowBlock);
        for (int row = 0; row < rows; ++row, sums += 2) {
            const float* logits = share.logits.data() + row * kChunkStride;
            const Wanted& wanted = step.wanted[row];
            look(program.kernels(), wanted, chunk, logits, share.rows[row], sums);
            if (wanted.what == Wanted::kWhole)
                std::copy_n(logits, chunk.count,
                            step.logits + wanted.whole * step.logit_stride + chunk.first);
        }
    }
    program.barrier();
    const Part part(rows, thread, program.threads());
    for (int row = part.begin; row < part.end; ++row) finish(step, row);
}

// Puts together what the threads have found, in the order of their chunks.
void Head::finish(const Step& step, int row) {
    const Wanted::What what = step.wanted[row].what;
    double best[2] = {-INFINITY, 0}, noisy[2] = {-INFINITY, 0};
    for (const Share& share : shares_) {
        const Finding& found = share.rows[row];
        // NaN counts as the highest; the first among equals, which is the one that was found before.
        if (!std::isnan(best[0]) && !(found.best[0] <= best[0])) std::copy_n(found.best, 2, best);
        if (found.noisy[0] > noisy[0]) std::copy_n(found.noisy, 2, noisy);
    }
    const bool take_noisy = what == Wanted::kNoisyBest && std::isfinite(best[0]);
    std::copy_n(take_noisy ? noisy : best, 2, step.best + 2 * row);
    if (what == Wanted::kTop || what == Wanted::kTopAndSums) finish_top(step, row);
    if (what == Wanted::kTopAndSums) finish_sums(step, row);
}

void Head::finish_top(const Step& step, int row) {
    std::vector<Candidate> found;
    for (const Share& share : shares_) {
        const Top& top = share.rows[row].top;
        found.insert(found.end(), top.pool, top.pool + top.held);
    }
    keep_best(found, step.top_count);
    double* logits = step.top + 2 * size_t(row) * step.top_count;
    double* ids = logits + step.top_count;
    std::fill_n(logits, step.top_count, -INFINITY);
    std::fill_n(ids, step.top_count, 0.0);
    for (size_t i = 0; i < found.size(); ++i) {
        logits[i] = double(found[i].logit);
        ids[i] = double(first_id_ + found[i].column);
    }
}

// Of a row that is not finite: sums of nothing.
void Head::finish_sums(const Step& step, int row) {
    std::vector<SoftmaxSum> sums(shards_, SoftmaxSum(step.wanted[row].temperature));
    const int threads = int(shares_.size()), rows = step.logit_count;
    for (int thread = 0; thread < threads && step.best[2 * row] < INFINITY; ++thread) {
        const Part part(int(chunks_.size()), thread, threads);
        const double* found = shares_[thread].sums.data() + 2 * row;
        for (int i = part.begin; i < part.end; ++i, found += 2 * rows) sums[chunks_[i].shard].add(found);
    }
    for (int shard = 0; shard < shards_; ++shard) {
        double* out = step.sums + 2 * (size_t(row) * shards_ + shard);
        out[0] = sums[shard].highest();
        out[1] = sums[shard].total();
    }
}

}  // namespace tps
