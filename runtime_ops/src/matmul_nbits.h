// One block-quantised matrix times M tokens, cut into pieces that threads can share. No ORT, no intrinsics.
#pragma once

#include "binary_matmul.h"
#include "matmul_nbits_kernels.h"

namespace fbiedge {

// A matrix [N, K] in the caller's memory (nothing is copied). The caller has checked the sizes.
struct NBitsMatrix {
    size_t n;
    size_t k;
    unsigned bits;         // 4 or 8
    const uint8_t* tiles;  // [ceil(N/16), ceil(K/128), nbits_group_bytes(bits)]
};

// y [m, N] = x [m, K] * W^T. The result doesn't depend on how the work is cut.
// Returns false when memory for prepared tokens can't be had or the parallel-for failed.
bool matmul_nbits(const NBitsMatrix& matrix, const NBitsLevelKernels& kernels, const float* x, size_t m, float* y,
                  const ParallelFor& parallel);

inline const NBitsLevelKernels& nbits_level_kernels(const KernelTable& table, AccuracyLevel level) {
    return level == AccuracyLevel::kFp32 ? table.nbits->fp32 : table.nbits->int8;
}

}  // namespace fbiedge
