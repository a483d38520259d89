// The contract between the attention kernels and attention.cc, as kernel_table.h is for BinaryMatMul: plain structs and
// function pointers. Keys and values are int8 rows of head_dim numbers with one scale each.
//
// Scores and mixed values are integer sums, of 16-bit queries times int8 keys and of 16-bit shares times int8 values:
// exact, so that their order is each kernel's own. All float operations stand once, in kernels/shared_attention.h, and
// are rounded one by one. So every kernel gives the same bits.
#pragma once

#include "kernel_table.h"

namespace fbiedge {

constexpr size_t kMaxHeadDim = 256;  // a multiple of kHeadDimStep
constexpr size_t kHeadDimStep = 8;
constexpr size_t kBlockTokens = 128;     // tokens of the cache whose softmax is taken together, wherever work is cut
constexpr size_t kMaxQueries = 32;       // queries of one attend call
constexpr float kQuerySteps = 32512.0f;  // 127 * 256: a query's largest number, so that two int8 planes hold it

// One head of one token, as the projections made it.
struct HeadInput {
    const float* x;     // [d]
    const float* norm;  // [d], weights of an RMS norm over the head, or null
    float epsilon;      // of that norm
    const float* cos;   // [d / 2] at the token's position, or null: not rotated
    const float* sin;
    size_t d;
};

// What one query has gathered of the blocks that it attended to: mixed / sum is the attention.
struct AttentionState {
    float peak;  // largest score in bits, -infinity before the first block
    float sum;   // of 2^(score - peak)
    alignas(kAlignment) float mixed[kMaxHeadDim];
};

// Queries that share a KV head, and one block of its cache.
struct AttendArgs {
    size_t d;
    const int16_t* queries;     // [n_queries, d]
    const float* query_scales;  // [n_queries]
    const uint32_t* visible;    // [n_queries], tokens of the block that each query sees, at most n_tokens
    size_t n_queries;           // 1..kMaxQueries
    const int8_t* keys;         // [n_tokens, d]
    const int8_t* values;       // [n_tokens, d]
    const float* key_scales;    // [n_tokens]
    const float* value_scales;  // [n_tokens]
    size_t n_tokens;            // 1..kBlockTokens
    AttentionState* states;     // [n_queries]
};

struct AttentionKernels {
    // x, normed and rotated as asked, in steps of its scale, which is returned.
    float (*quantize_key_or_value)(const HeadInput& in, int8_t* row);
    float (*quantize_query)(const HeadInput& in, int16_t* row);
    void (*attend)(const AttendArgs& args);
    void (*merge)(size_t d, const AttentionState& from, AttentionState& into);
    void (*finish)(size_t d, const AttentionState& state, float* out);
};

extern const AttentionKernels kAttentionScalar;
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512Vnni;
extern const AttentionKernels kAttentionNeon;

}  // namespace fbiedge
