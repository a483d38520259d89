// BinarySwiGLU as an operator (spec/BinarySwiGLU.md).

#include "binary_layer_op.h"

namespace fbiedge {
namespace {

constexpr size_t kGate = kNorm + 1;
constexpr size_t kUp = kGate + kMatrixInputs;

std::unique_ptr<OpKernel> create(const Environment& environment, const NodeReader& node) {
    const std::vector<BinaryMatrix> parts = {read_matrix(node, kGate, "N"), read_matrix(node, kUp, "N")};
    return make_layer_kernel(environment, node, parts, Join::kSwiglu, read_norm(node));
}

void infer_shapes(const OrtApi& api, OrtShapeInferContext* context) {
    infer_like_input(api, context, kActivations, inferred_attribute(api, context, "N"), 0);
}

}  // namespace

const OpDefinition kBinarySwigluOp = {
    "BinarySwiGLU",
    {
        {"A", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"norm", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"gate_B", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false},
        {"gate_scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, false},  // float, or float16 in block form
        {"gate_offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
        {"up_B", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false},
        {"up_scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, false},
        {"up_offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
    },
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    create,
    infer_shapes,
};

}  // namespace fbiedge
