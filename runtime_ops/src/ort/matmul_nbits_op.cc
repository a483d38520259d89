// MatMulNBits as an operator (spec/MatMulNBits.md).

#include "../matmul_nbits.h"
#include "op.h"
#include "pool.h"

namespace fbiedge {
namespace {

enum Input : size_t { kA, kB };

class MatMulNBitsKernel final : public OpKernel {
  public:
    MatMulNBitsKernel(const OrtApi& api, const NBitsMatrix& matrix, const NBitsLevelKernels& kernels, std::string who)
        : api_(api), matrix_(matrix), kernels_(kernels), who_(std::move(who)) {}

    void compute(OrtKernelContext* context) const override {
        const TensorView a = input(api_, context, kA);
        if (a.dims.empty() || a.dims.back() != static_cast<int64_t>(matrix_.k)) {
            throw OpError{who_ + ": A has shape " + to_string(a.dims) +
                          ", expected the last dimension to be K = " + std::to_string(matrix_.k)};
        }
        Dims dims = a.dims;
        dims.back() = static_cast<int64_t>(matrix_.n);
        size_t m = 1;
        for (size_t i = 0; i + 1 < dims.size(); ++i) m *= static_cast<size_t>(dims[i]);
        auto* y = static_cast<float*>(output(api_, context, 0, dims));
        Pool pool(api_, context, threads());
        const auto* x = static_cast<const float*>(a.data);
        if (!matmul_nbits(matrix_, kernels_, x, m, y, pool.parallel())) pool.fail(who_);
    }

  private:
    const OrtApi& api_;
    const NBitsMatrix matrix_;
    const NBitsLevelKernels& kernels_;
    const std::string who_;
};

NBitsMatrix read_matrix(const NodeReader& node) {
    NBitsMatrix matrix = {};
    matrix.k = node.size("K");
    matrix.n = node.size("N");
    const int64_t bits = node.integer("bits", 0);
    if (bits != 4 && bits != 8) node.fail("bits is " + std::to_string(bits) + ", expected 4 or 8");
    matrix.bits = static_cast<unsigned>(bits);
    const int64_t block_size = node.integer("block_size", 0);
    if (block_size != static_cast<int64_t>(kNBitsBlockInputs)) {
        node.fail("block_size is " + std::to_string(block_size) + ", expected " + std::to_string(kNBitsBlockInputs));
    }
    const Dims shape = {static_cast<int64_t>(ceil_div(matrix.n, kTileRows)),
                        static_cast<int64_t>(ceil_div(matrix.k, kGroupInputs)),
                        static_cast<int64_t>(nbits_group_bytes(matrix.bits))};
    matrix.tiles = static_cast<const uint8_t*>(node.constant(kB, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, shape));
    return matrix;
}

std::unique_ptr<OpKernel> create(const Environment& environment, const NodeReader& node) {
    const AccuracyLevel level = read_level(environment, node);
    const NBitsMatrix matrix = read_matrix(node);
    return std::make_unique<MatMulNBitsKernel>(*environment.api, matrix,
                                               nbits_level_kernels(*environment.kernels, level), node.who());
}

void infer_shapes(const OrtApi& api, OrtShapeInferContext* context) {
    infer_like_input(api, context, kA, inferred_attribute(api, context, "N"), 0);
}

}  // namespace

const OpDefinition kMatMulNBitsOp = {
    "MatMulNBits",
    {
        {"A", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"B", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false},
    },
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    create,
    infer_shapes,
};

}  // namespace fbiedge
