// A BinaryMatMul node as the model file describes it: attributes and constant inputs, checked.
#pragma once

#include "../binary_matmul.h"
#include "api.h"

namespace fbiedge {

struct Node {
    std::string name;
    BinaryMatrix matrix;
    AccuracyLevel level;
};

// Throws OpError, whose message names the node, what was got and what was expected.
Node read_node(const OrtApi& api, const OrtKernelInfo* info);

}  // namespace fbiedge
