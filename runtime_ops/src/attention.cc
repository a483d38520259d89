#include "attention.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <new>

namespace fbiedge {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr size_t kPrepareTokens = 8;  // a parallel piece of storing new rows
// Bytes of the cache below which a call isn't worth handing out, and of one piece where a long cache is cut.
constexpr size_t kSerialBytes = 128 * 1024;
constexpr size_t kHeadBytes = 16 * 1024;  // of a head whose cache is empty: a microsecond for its new row and queries
constexpr size_t kPieceBytes = 128 * 1024;
constexpr size_t kSmallPieceBytes = 32 * 1024;
constexpr size_t kManyHeads = 8;  // with as many, pieces can be large and still keep threads busy
constexpr size_t kCacheLine = 64;
constexpr size_t kPrefetchHeads = 2;         // how far ahead
constexpr size_t kPrefetchBytes = 4 * 1024;  // of keys, and of values: what comes after, the hardware brings in

struct Work {
    const Attention& a;
    const AttentionKernels& kernels;
    size_t group;            // query heads of a KV head
    size_t n_queries;        // of a KV head: group * tokens; query i is head i % group of token i / group
    int16_t* queries;        // [batch, kv_heads, n_queries, d]
    float* query_scales;     // [batch, kv_heads, n_queries]
    size_t pieces;           // of a KV head
    bool prepares;           // attending pieces store their new rows themselves
    AttentionState* states;  // [batch, kv_heads, blocks, n_queries] where the cache is cut
    size_t blocks;
    size_t blocks_per_piece;
};

struct Head {
    size_t row;  // of the batch
    size_t kv_head;
    size_t index;  // row * kv_heads + kv_head
};

Head head_at(const Work& work, size_t index) { return {index / work.a.kv_heads, index % work.a.kv_heads, index}; }

size_t visible_to(const Work& work, const Head& head, size_t query) {
    return work.a.first[head.row] + query / work.group + 1;
}

void prefetch(const void* first, size_t bytes) {
#if defined(__GNUC__)
    for (size_t at = 0; at < bytes; at += kCacheLine) __builtin_prefetch(static_cast<const char*>(first) + at, 0, 2);
    __builtin_prefetch(static_cast<const char*>(first) + bytes - 1, 0, 2);
#else
    (void)first, (void)bytes;
#endif
}

// What attending to one head will read and write of the cache. Between two tokens all weights have passed through the
// cores' caches, and each head has four places far apart, so without this every head waits for memory several times.
void prefetch_head(const Work& work, size_t index) {
    const Attention& a = work.a;
    const Head head = head_at(work, index);
    const size_t rows = a.first[head.row] + 1, cached = head.index * a.capacity;
    for (const int8_t* values : {a.keys + cached * a.d, a.values + cached * a.d}) {
        prefetch(values, std::min(rows * a.d, kPrefetchBytes));
        prefetch(values + (rows - 1) * a.d, a.d);
    }
    for (const float* scales : {a.key_scales + cached, a.value_scales + cached}) {
        prefetch(scales, std::min(rows * sizeof(float), kPrefetchBytes));
        prefetch(scales + rows - 1, sizeof(float));
    }
}

// The new rows of one head, and its queries.
void store_rows(const Work& work, const Head& head, size_t token) {
    const Attention& a = work.a;
    const size_t position = a.first[head.row] + token;
    const float* x = a.qkv + (head.row * a.tokens + token) * (a.heads + 2 * a.kv_heads) * a.d;
    const float* cos = a.cos + position * (a.d / 2);
    const float* sin = a.sin + position * (a.d / 2);
    const size_t cached = head.index * a.capacity + position;
    const HeadInput key = {x + (a.heads + head.kv_head) * a.d, a.k_norm, a.epsilon, cos, sin, a.d};
    a.key_scales[cached] = work.kernels.quantize_key_or_value(key, a.keys + cached * a.d);
    const HeadInput value = {x + (a.heads + a.kv_heads + head.kv_head) * a.d, nullptr, 0, nullptr, nullptr, a.d};
    a.value_scales[cached] = work.kernels.quantize_key_or_value(value, a.values + cached * a.d);
    for (size_t i = 0; i < work.group; ++i) {
        const size_t query = head.index * work.n_queries + token * work.group + i;
        const HeadInput in = {x + (head.kv_head * work.group + i) * a.d, a.q_norm, a.epsilon, cos, sin, a.d};
        const float scale = work.kernels.quantize_query(in, work.queries + query * a.d);
        work.query_scales[query] = scale * (a.scale * kLog2E);
    }
}

// A few tokens, all heads of one after the other: as they lie in qkv.
void store_piece(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const size_t chunks = ceil_div(work.a.tokens, kPrepareTokens);
    const size_t row = index / chunks, first = index % chunks * kPrepareTokens;
    for (size_t token = first; token < std::min(first + kPrepareTokens, work.a.tokens); ++token) {
        for (size_t head = 0; head < work.a.kv_heads; ++head) {
            store_rows(work, {row, head, row * work.a.kv_heads + head}, token);
        }
    }
}

void clear(AttentionState* states, size_t count, size_t d) {
    for (size_t i = 0; i < count; ++i) {
        states[i].peak = -std::numeric_limits<float>::infinity();
        states[i].sum = 0.0f;
        std::fill_n(states[i].mixed, ceil_div(d, 16) * 16, 0.0f);
    }
}

void attend_block(const Work& work, const Head& head, size_t query, size_t n_queries, size_t block,
                  AttentionState* states) {
    const Attention& a = work.a;
    const size_t first = block * kBlockTokens;
    const size_t cached = head.index * a.capacity + first;
    uint32_t visible[kMaxQueries];
    size_t most = 0;
    for (size_t i = 0; i < n_queries; ++i) {
        const size_t seen = visible_to(work, head, query + i);
        visible[i] = static_cast<uint32_t>(seen > first ? std::min(seen - first, kBlockTokens) : 0);
        most = std::max<size_t>(most, visible[i]);
    }
    if (most == 0) return;
    const size_t at = head.index * work.n_queries + query;
    work.kernels.attend({a.d, work.queries + at * a.d, work.query_scales + at, visible, n_queries,
                         a.keys + cached * a.d, a.values + cached * a.d, a.key_scales + cached, a.value_scales + cached,
                         most, states});
}

void finish(const Work& work, const Head& head, size_t query, size_t n_queries, const AttentionState* states) {
    const Attention& a = work.a;
    for (size_t i = query; i < query + n_queries; ++i) {
        const size_t token = head.row * a.tokens + i / work.group;
        const size_t out_head = head.kv_head * work.group + i % work.group;
        work.kernels.finish(a.d, states[i - query], a.out + (token * a.heads + out_head) * a.d);
    }
}

// Some queries of one KV head, over all that they see.
void attend_piece(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const Head head = head_at(work, index / work.pieces);
    if (work.prepares) {
        const size_t heads = work.a.batch * work.a.kv_heads;
        const size_t next = head.index + kPrefetchHeads;
        if (next < heads) prefetch_head(work, next);
        store_rows(work, head, 0);
    }
    const size_t query = index % work.pieces * kMaxQueries;
    const size_t n_queries = std::min(work.n_queries - query, kMaxQueries);
    AttentionState states[kMaxQueries];
    clear(states, n_queries, work.a.d);
    const size_t blocks = ceil_div(visible_to(work, head, query + n_queries - 1), kBlockTokens);
    for (size_t block = 0; block < blocks; ++block) attend_block(work, head, query, n_queries, block, states);
    finish(work, head, query, n_queries, states);
}

// All queries of one KV head, over a few blocks of a long cache. Each block has states of its own, so that they are
// merged in the order in which attend_piece() does.
void attend_blocks_piece(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const Head head = head_at(work, index / work.pieces);
    const size_t first = index % work.pieces * work.blocks_per_piece;
    for (size_t block = first; block < std::min(first + work.blocks_per_piece, work.blocks); ++block) {
        AttentionState* states = work.states + (head.index * work.blocks + block) * work.n_queries;
        clear(states, work.n_queries, work.a.d);
        attend_block(work, head, 0, work.n_queries, block, states);
    }
}

void merge_piece(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    AttentionState* states = work.states + index * work.blocks * work.n_queries;
    for (size_t block = 1; block < work.blocks; ++block) {
        for (size_t i = 0; i < work.n_queries; ++i) {
            work.kernels.merge(work.a.d, states[block * work.n_queries + i], states[i]);
        }
    }
    finish(work, head_at(work, index), 0, work.n_queries, states);
}

}  // namespace

bool attention(const Attention& a, const AttentionKernels& kernels, const ParallelFor& parallel) {
    const size_t heads = a.batch * a.kv_heads;
    if (heads == 0 || a.tokens == 0) return true;
    const size_t group = a.heads / a.kv_heads, n_queries = group * a.tokens;
    const size_t longest = *std::max_element(a.first, a.first + a.batch) + a.tokens;
    const std::unique_ptr<int16_t[]> queries(new (std::nothrow) int16_t[heads * n_queries * a.d]);
    const std::unique_ptr<float[]> query_scales(new (std::nothrow) float[heads * n_queries]);
    if (!queries || !query_scales) return false;

    Work work = {a, kernels, group, n_queries, queries.get(), query_scales.get(), 0, false, nullptr, 0, 0};
    const size_t head_bytes = 2 * longest * a.d;
    const size_t piece_bytes = heads >= kManyHeads ? kPieceBytes : kSmallPieceBytes;
    const bool worth_cutting = n_queries <= kMaxQueries && head_bytes >= 2 * piece_bytes;
    const bool small = heads * (head_bytes + kHeadBytes) * ceil_div(n_queries, 4) < kSerialBytes;
    const ParallelFor& used = small ? serial() : parallel;

    work.prepares = a.tokens == 1 && !worth_cutting && n_queries <= kMaxQueries;
    const size_t chunks = ceil_div(a.tokens, kPrepareTokens);
    if (!work.prepares && !run_pieces(used, a.batch * chunks, store_piece, &work)) return false;
    if (!worth_cutting) {
        work.pieces = ceil_div(n_queries, kMaxQueries);
        return run_pieces(used, heads * work.pieces, attend_piece, &work);
    }
    work.blocks = ceil_div(longest, kBlockTokens);
    work.blocks_per_piece = std::max<size_t>(piece_bytes / (2 * kBlockTokens * a.d), 1);
    work.pieces = ceil_div(work.blocks, work.blocks_per_piece);
    const std::unique_ptr<AttentionState[]> states(new (std::nothrow) AttentionState[heads * work.blocks * n_queries]);
    if (!states) return false;
    work.states = states.get();
    return run_pieces(used, heads * work.pieces, attend_blocks_piece, &work) &&
           run_pieces(used, heads, merge_piece, &work);
}

}  // namespace fbiedge
