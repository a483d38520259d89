// What the operators made of binary matrices share: BinaryMatMul, BinaryQKV and BinarySwiGLU.
#pragma once

#include "op.h"

namespace fbiedge {

// Inputs 0, A, and 1, the norm's weight, of the operators that begin with an RMS norm.
constexpr size_t kActivations = 0;
constexpr size_t kNorm = 1;

// Inputs B, scales and offsets of one matrix, as `first`, `first` + 1 and `first` + 2, and its number of rows N.
constexpr size_t kMatrixInputs = 3;
BinaryMatrix read_matrix(const NodeReader& node, size_t first, const char* n_attribute);

RmsNorm read_norm(const NodeReader& node);

// The kernel of a node: its first output from input 0 and the matrices. `residual`: the input added to the output, or
// 0.
std::unique_ptr<OpKernel> make_layer_kernel(const Environment& environment, const NodeReader& node,
                                            const std::vector<BinaryMatrix>& parts, Join join, const RmsNorm& norm,
                                            size_t residual = 0);

}  // namespace fbiedge
