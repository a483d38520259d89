// BinaryMatMul as an operator (SPECIFICATION.md).

#include "binary_layer_op.h"

namespace fbiedge {
namespace {

enum Input : size_t { kA, kB, kScales, kOffsets, kBias };

std::unique_ptr<OpKernel> create(const Environment& environment, const NodeReader& node) {
    BinaryMatrix matrix = read_matrix(node, kB, "N");
    if (node.has(kBias) && !node.is_constant(kBias)) {
        return make_layer_kernel(environment, node, {matrix}, Join::kConcat, {}, kBias);
    }
    matrix.bias = node.constant_floats(kBias, {static_cast<int64_t>(matrix.n)});
    return make_layer_kernel(environment, node, {matrix}, Join::kConcat, {});
}

void infer_shapes(const OrtApi& api, OrtShapeInferContext* context) {
    infer_like_input(api, context, kA, inferred_attribute(api, context, "N"), 0);
}

}  // namespace

const OpDefinition kBinaryMatMulOp = {
    "BinaryMatMul",
    {
        {"A", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"B", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false},
        {"scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, false},  // float, or float16 in block form
        {"offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
        {"bias", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
    },
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    create,
    infer_shapes,
};

}  // namespace fbiedge
