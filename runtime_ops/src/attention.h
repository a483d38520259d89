// Grouped-query attention over an int8 cache that stays in place, cut into pieces that threads can share. No ORT, no
// intrinsics. The operator is defined in spec/GroupQueryAttention.md.
#pragma once

#include "attention_kernels.h"
#include "parallel.h"

namespace fbiedge {

// One call: shapes, and the caller's memory. The caller has checked the sizes.
struct Attention {
    size_t batch;
    size_t tokens;  // new ones of each row of the batch
    size_t heads;
    size_t kv_heads;
    size_t d;         // numbers of a head
    size_t capacity;  // rows of the cache
    float scale;      // of the scores
    float epsilon;
    const float* q_norm;  // [d] or null
    const float* k_norm;
    const float* cos;  // [context, d / 2]
    const float* sin;
    const float* qkv;     // [batch, tokens, (heads + 2 kv_heads) * d]
    const size_t* first;  // [batch], position of the first new token
    int8_t* keys;         // [batch, kv_heads, capacity, d], with the past's rows already there
    int8_t* values;
    float* key_scales;  // [batch, kv_heads, capacity]
    float* value_scales;
    float* out;  // [batch, tokens, heads * d]
};

// Stores the new rows in the cache and attends to it. The result depends neither on how the work is cut nor on how many
// tokens come in one call. Returns false when memory can't be had or the parallel-for failed.
bool attention(const Attention& attention, const AttentionKernels& kernels, const ParallelFor& parallel);

}  // namespace fbiedge
