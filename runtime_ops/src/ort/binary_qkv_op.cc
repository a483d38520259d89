// BinaryQKV as an operator (spec/BinaryQKV.md).

#include "binary_layer_op.h"

namespace fbiedge {
namespace {

const char* const kRows[] = {"N_q", "N_k", "N_v"};

std::unique_ptr<OpKernel> create(const Environment& environment, const NodeReader& node) {
    std::vector<BinaryMatrix> parts;
    size_t first = kNorm + 1;
    for (const char* rows : kRows) {
        parts.push_back(read_matrix(node, first, rows));
        first += kMatrixInputs;
    }
    return make_layer_kernel(environment, node, parts, Join::kConcat, read_norm(node));
}

void infer_shapes(const OrtApi& api, OrtShapeInferContext* context) {
    int64_t outputs = 0;
    for (const char* rows : kRows) outputs += inferred_attribute(api, context, rows);
    infer_like_input(api, context, kActivations, outputs, 0);
}

}  // namespace

const OpDefinition kBinaryQkvOp = {
    "BinaryQKV",
    {
        {"A", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"norm", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"q_B", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false},
        {"q_scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, false},  // float, or float16 in block form
        {"q_offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
        {"k_B", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false},
        {"k_scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, false},
        {"k_offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
        {"v_B", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false},
        {"v_scales", ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, false},
        {"v_offsets", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
    },
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    create,
    infer_shapes,
};

}  // namespace fbiedge
