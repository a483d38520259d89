// One binary matrix times M tokens, cut into pieces that threads can share. No ORT, no intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel_table.h"

namespace fbiedge {

enum class ScaleForm { kColumn, kRow, kSingle, kBlock };
enum class AccuracyLevel { kFp32, kInt8 };

// A matrix [N, K] and its scales, in the caller's memory (nothing is copied). The caller has checked the sizes.
struct BinaryMatrix {
    size_t n;
    size_t k;
    ScaleForm form;
    const uint8_t* tiles;  // [ceil(N/16), ceil(K/32), 64]
    const float* alpha;    // column [K], row [N], single [1]; null for block
    const float* beta;     // as alpha, or null
    const void* block;     // [ceil(N/16), ceil(K/128), 16] for block, else null
    bool block_fp16;
    const float* bias;  // [N] or null
};

// Runs fn(data, i) for i = 0..count-1, on any threads in any order; returns false when it could not.
struct ParallelFor {
    bool (*run)(void* context, size_t count, void (*fn)(void* data, size_t i), void* data);
    void* context;
};
ParallelFor serial();

// y [m, N] = x [m, K] * W_eff^T (+ bias). The result doesn't depend on how the work is cut.
// Returns false when memory for prepared tokens can't be had or the parallel-for failed.
bool binary_matmul(const BinaryMatrix& matrix, const LevelKernels& kernels, const float* x, size_t m, float* y,
                   const ParallelFor& parallel);

inline const LevelKernels& level_kernels(const KernelTable& table, AccuracyLevel level) {
    return level == AccuracyLevel::kFp32 ? table.binary->fp32 : table.binary->int8;
}

}  // namespace fbiedge
