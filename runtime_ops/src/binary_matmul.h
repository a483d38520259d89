// Binary matrices times M tokens, cut into pieces that threads can share. No ORT, no intrinsics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "parallel.h"

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

struct RmsNorm {
    const float* weight;  // [K], gamma; null: no norm
    float epsilon;
};

enum class Join {
    kConcat,  // y = [x W0^T, x W1^T, ...]
    kSwiglu,  // y = silu(x W0^T) * (x W1^T), of two matrices of one N
};

// Matrices that share their input, with an optional RMS norm before them. Made once, then used by any number of threads
// at a time. Construction throws std::bad_alloc where a norm meets column scales, and otherwise never.
class BinaryLayer {
  public:
    static constexpr size_t kMaxParts = 3;

    BinaryLayer(const BinaryMatrix* parts, size_t count, Join join = Join::kConcat, const RmsNorm& norm = {});
    BinaryLayer(const BinaryLayer&) = delete;
    BinaryLayer& operator=(const BinaryLayer&) = delete;

    size_t k() const { return parts_[0].matrix.k; }
    size_t outputs() const { return outputs_; }

    // y [m, outputs] from x [m, K]; `residual` [m, outputs], or null, is added in place of the bias (kConcat of one
    // part). The result doesn't depend on how the work is cut. Returns false when memory for prepared tokens can't be
    // had or the parallel-for failed.
    bool run(const KernelTable& kernels, AccuracyLevel level, const float* x, size_t m, const float* residual, float* y,
             const ParallelFor& parallel) const;

    struct Part {
        BinaryMatrix matrix;
        const float* input_alpha;  // as in TokenInput
        const float* input_beta;
        size_t preparation;  // which of a token's preparations it takes
        float single_alpha[kTileRows];
        float single_beta[kTileRows];
    };

  private:
    const float* folded(const float* factors, const float* gamma);

    Part parts_[kMaxParts];
    size_t count_;
    size_t preparations_ = 0;
    size_t outputs_ = 0;
    Join join_;
    RmsNorm norm_;
    std::vector<float> folded_;  // gamma times the column scales of each part: [2 * count, K]
};

inline const LevelKernels& level_kernels(const KernelTable& table, AccuracyLevel level) {
    return level == AccuracyLevel::kFp32 ? table.binary->fp32 : table.binary->int8;
}

}  // namespace fbiedge
