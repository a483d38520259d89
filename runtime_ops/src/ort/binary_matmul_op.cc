// BinaryMatMul as an operator (SPECIFICATION.md).

#include "op.h"
#include "pool.h"

namespace fbiedge {
namespace {

enum Input : size_t { kA, kB, kScales, kOffsets, kBias };

class BinaryMatMulKernel final : public OpKernel {
  public:
    BinaryMatMulKernel(const OrtApi& api, const BinaryMatrix& matrix, const LevelKernels& kernels, std::string who)
        : api_(api), matrix_(matrix), kernels_(kernels), who_(std::move(who)) {}

    void compute(OrtKernelContext* context) const override {
        const TensorView a = input(api_, context, kA);
        if (a.dims.empty() || a.dims.back() != static_cast<int64_t>(matrix_.k)) {
            throw OpError{who_ + ": A has shape " + to_string(a.dims) +
                          ", expected the last dimension to be K = " + std::to_string(matrix_.k)};
        }
        std::vector<int64_t> dims = a.dims;
        dims.back() = static_cast<int64_t>(matrix_.n);
        size_t m = 1;
        for (size_t i = 0; i + 1 < dims.size(); ++i) m *= static_cast<size_t>(dims[i]);
        auto* y = static_cast<float*>(output(api_, context, 0, dims));
        Pool pool(api_, context);
        const auto* x = static_cast<const float*>(a.data);
        if (!binary_matmul(matrix_, kernels_, x, m, y, pool.parallel())) pool.fail(who_);
    }

  private:
    const OrtApi& api_;
    const BinaryMatrix matrix_;
    const LevelKernels& kernels_;
    const std::string who_;
};

ScaleForm read_form(const NodeReader& node) {
    const std::string text = node.string("scale_form");
    if (text == "column") return ScaleForm::kColumn;
    if (text == "row") return ScaleForm::kRow;
    if (text == "single") return ScaleForm::kSingle;
    if (text == "block") return ScaleForm::kBlock;
    node.fail("scale_form is '" + text + "', expected column, row, single or block");
}

AccuracyLevel read_level(const Environment& environment, const NodeReader& node) {
    const int64_t level = node.integer("accuracy_level", 0);
    if (level != 0 && level != 1 && level != 4) {
        node.fail("accuracy_level is " + std::to_string(level) + ", expected 0 (default), 1 (fp32) or 4 (int8)");
    }
    if (environment.level_override) return *environment.level_override;
    return level == 1 ? AccuracyLevel::kFp32 : AccuracyLevel::kInt8;
}

BinaryMatrix read_matrix(const NodeReader& node) {
    BinaryMatrix matrix = {};
    matrix.k = node.size("K");
    matrix.n = node.size("N");
    matrix.form = read_form(node);
    const bool block = matrix.form == ScaleForm::kBlock;
    const int64_t block_size = node.integer("block_size", 0);
    const int64_t expected_size = block ? static_cast<int64_t>(kGroupInputs) : 0;
    if (block_size != expected_size) {
        node.fail("block_size is " + std::to_string(block_size) + ", expected " + std::to_string(expected_size) +
                  (block ? " in block form" : " outside block form"));
    }

    const auto n_tiles = static_cast<int64_t>(ceil_div(matrix.n, kTileRows));
    const auto k_tiles = static_cast<int64_t>(ceil_div(matrix.k, kTileInputs));
    const auto groups = static_cast<int64_t>(ceil_div(matrix.k, kGroupInputs));
    const auto k = static_cast<int64_t>(matrix.k), n = static_cast<int64_t>(matrix.n);
    matrix.tiles = static_cast<const uint8_t*>(
        node.constant(kB, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, {n_tiles, k_tiles, static_cast<int64_t>(kTileBytes)}));
    if (block) {
        const std::vector<int64_t> shape = {n_tiles, groups, static_cast<int64_t>(kTileRows)};
        matrix.block = node.constant(kScales, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape, &matrix.block_fp16);
        if (node.has(kOffsets)) node.fail("offsets are given, expected none in block form");
    } else {
        const std::vector<int64_t> shape = {matrix.form == ScaleForm::kColumn ? k
                                            : matrix.form == ScaleForm::kRow  ? n
                                                                              : 1};
        matrix.alpha = node.constant_floats(kScales, shape);
        matrix.beta = node.constant_floats(kOffsets, shape);
    }
    matrix.bias = node.constant_floats(kBias, {n});
    return matrix;
}

std::unique_ptr<OpKernel> create(const Environment& environment, const NodeReader& node) {
    const AccuracyLevel level = read_level(environment, node);
    const BinaryMatrix matrix = read_matrix(node);
    return std::make_unique<BinaryMatMulKernel>(*environment.api, matrix, level_kernels(*environment.kernels, level),
                                                node.who());
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
