// The OrtCustomOp that ONNX Runtime sees.
#pragma once

#include "../binary_matmul.h"
#include "api.h"

namespace fbiedge {

struct BinaryMatMulOp : OrtCustomOp {
    const OrtApi* api;
    const KernelTable* kernels;
    const AccuracyLevel* level_override;  // null: each node's accuracy_level

    BinaryMatMulOp(const OrtApi& api, const KernelTable& kernels, const AccuracyLevel* level_override,
                   bool infers_shapes);
};

}  // namespace fbiedge
