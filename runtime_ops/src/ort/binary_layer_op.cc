#include "binary_layer_op.h"

#include "pool.h"

namespace fbiedge {
namespace {

class BinaryLayerKernel final : public OpKernel {
  public:
    BinaryLayerKernel(const Environment& environment, AccuracyLevel level, const std::vector<BinaryMatrix>& parts,
                      Join join, const RmsNorm& norm, size_t residual, std::string who)
        : api_(*environment.api),
          kernels_(*environment.kernels),
          level_(level),
          layer_(parts.data(), parts.size(), join, norm),
          residual_(residual),
          who_(std::move(who)) {}

    void compute(OrtKernelContext* context) const override {
        const TensorView a = input(api_, context, kActivations);
        if (a.dims.empty() || a.dims.back() != static_cast<int64_t>(layer_.k())) {
            throw OpError{who_ + ": A has shape " + to_string(a.dims) +
                          ", expected the last dimension to be K = " + std::to_string(layer_.k())};
        }
        Dims dims = a.dims;
        dims.back() = static_cast<int64_t>(layer_.outputs());
        size_t m = 1;
        for (size_t i = 0; i + 1 < dims.size(); ++i) m *= static_cast<size_t>(dims[i]);
        const float* const residual = residual_ ? residual_of(context, dims) : nullptr;
        auto* y = static_cast<float*>(output(api_, context, 0, dims));
        Pool pool(api_, context, threads());
        const auto* x = static_cast<const float*>(a.data);
        if (!layer_.run(kernels_, level_, x, m, residual, y, pool.parallel())) pool.fail(who_);
    }

  private:
    const float* residual_of(OrtKernelContext* context, const Dims& dims) const {
        const TensorView residual = input(api_, context, residual_);
        if (residual.dims != dims) {
            throw OpError{who_ + ": a computed bias has shape " + to_string(residual.dims) +
                          ", expected the output's: " + to_string(dims)};
        }
        return static_cast<const float*>(residual.data);
    }

    const OrtApi& api_;
    const KernelTable& kernels_;
    const AccuracyLevel level_;
    const BinaryLayer layer_;
    const size_t residual_;
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

}  // namespace

BinaryMatrix read_matrix(const NodeReader& node, size_t first, const char* n_attribute) {
    const size_t b = first, scales = first + 1, offsets = first + 2;
    BinaryMatrix matrix = {};
    matrix.k = node.size("K");
    matrix.n = node.size(n_attribute);
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
        node.constant(b, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, {n_tiles, k_tiles, static_cast<int64_t>(kTileBytes)}));
    if (block) {
        const Dims shape = {n_tiles, groups, static_cast<int64_t>(kTileRows)};
        matrix.block = node.constant(scales, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape, &matrix.block_fp16);
        if (node.has(offsets)) node.fail(node.input_name(offsets) + " are given, expected none in block form");
    } else {
        const Dims shape = {matrix.form == ScaleForm::kColumn ? k : matrix.form == ScaleForm::kRow ? n : 1};
        matrix.alpha = node.constant_floats(scales, shape);
        matrix.beta = node.constant_floats(offsets, shape);
    }
    return matrix;
}

RmsNorm read_norm(const NodeReader& node) {
    const auto k = static_cast<int64_t>(node.size("K"));
    const float epsilon = node.real("epsilon", 1e-5f);
    if (!(epsilon >= 0.0f)) node.fail("epsilon is " + std::to_string(epsilon) + ", expected 0 or more");
    return {node.constant_floats(kNorm, {k}), epsilon};
}

std::unique_ptr<OpKernel> make_layer_kernel(const Environment& environment, const NodeReader& node,
                                            const std::vector<BinaryMatrix>& parts, Join join, const RmsNorm& norm,
                                            size_t residual) {
    const AccuracyLevel level = read_level(environment, node);
    return std::make_unique<BinaryLayerKernel>(environment, level, parts, join, norm, residual, node.who());
}

}  // namespace fbiedge
