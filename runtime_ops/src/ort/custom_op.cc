#include "custom_op.h"

#include <memory>

#include "node.h"

namespace fbiedge {
namespace {

constexpr size_t kInputs = 5;  // A, B, scales, offsets (optional), bias (optional)

struct Kernel {
    const OrtApi& api;
    Node node;
    const LevelKernels& kernels;
};

ONNXTensorElementDataType input_type(size_t index) {
    if (index == 1) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    if (index == 2) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // scales: float, or float16 in block form
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

const BinaryMatMulOp& self(const OrtCustomOp* op) { return *static_cast<const BinaryMatMulOp*>(op); }

void create_kernel(const BinaryMatMulOp& op, const OrtKernelInfo* info, void** out) {
    Node node = read_node(*op.api, info);
    const AccuracyLevel level = op.level_override ? *op.level_override : node.level;
    *out = new Kernel{*op.api, std::move(node), level_kernels(*op.kernels, level)};
}

struct OrtPool {
    const OrtApi& api;
    const OrtKernelContext* context;
    OrtStatus* status;  // of the run that failed, null while none has
};

bool run_on_pool(void* data, size_t count, void (*fn)(void*, size_t), void* fn_data) {
    OrtPool& pool = *static_cast<OrtPool*>(data);
    pool.status = pool.api.KernelContext_ParallelFor(pool.context, fn, count, 0, fn_data);
    return !pool.status;
}

void compute(const Kernel& kernel, OrtKernelContext* context) {
    const OrtApi& api = kernel.api;
    const BinaryMatrix& matrix = kernel.node.matrix;
    const OrtValue* a_value = nullptr;
    check(api, api.KernelContext_GetInput(context, 0, &a_value));
    const TensorView a = view(api, a_value);
    if (a.dims.empty() || a.dims.back() != static_cast<int64_t>(matrix.k)) {
        throw OpError{"fbiedge BinaryMatMul node '" + kernel.node.name + "': A has shape " + to_string(a.dims) +
                      ", expected the last dimension to be K = " + std::to_string(matrix.k)};
    }
    std::vector<int64_t> dims = a.dims;
    dims.back() = static_cast<int64_t>(matrix.n);
    size_t m = 1;
    for (size_t i = 0; i + 1 < dims.size(); ++i) m *= static_cast<size_t>(dims[i]);

    OrtValue* y_value = nullptr;
    check(api, api.KernelContext_GetOutput(context, 0, dims.data(), dims.size(), &y_value));
    void* y = nullptr;
    check(api, api.GetTensorMutableData(y_value, &y));
    OrtPool pool = {api, context, nullptr};
    const ParallelFor parallel = {run_on_pool, &pool};
    const auto* x = static_cast<const float*>(a.data);
    if (!binary_matmul(matrix, kernel.kernels, x, m, static_cast<float*>(y), parallel)) {
        const std::string what = "fbiedge BinaryMatMul node '" + kernel.node.name + "': ";
        throw OpError{what + (pool.status ? take_message(api, pool.status) : "out of memory")};
    }
}

// Y has A's dimensions (known or named) with N as the last. Left undone when a dimension is neither known nor named.
void infer_shape(const OrtApi& api, OrtShapeInferContext* context) {
    const OrtOpAttr* attribute = nullptr;
    int64_t n = 0;
    size_t bytes = 0;
    check(api, api.ShapeInferContext_GetAttribute(context, "N", &attribute));
    check(api, api.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &n, sizeof n, &bytes));
    OrtTensorTypeAndShapeInfo* a = nullptr;  // owned by the context
    check(api, api.ShapeInferContext_GetInputTypeShape(context, 0, &a));
    size_t rank = 0;
    check(api, api.GetDimensionsCount(a, &rank));
    if (rank == 0) return;
    std::vector<int64_t> dims(rank);
    std::vector<const char*> names(rank);
    check(api, api.GetDimensions(a, dims.data(), rank));
    check(api, api.GetSymbolicDimensions(a, names.data(), rank));
    dims.back() = n;
    names.back() = "";
    for (size_t i = 0; i < rank; ++i) {
        if (dims[i] < 0 && !*names[i]) return;
    }
    OrtTensorTypeAndShapeInfo* y = nullptr;
    check(api, api.CreateTensorTypeAndShapeInfo(&y));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void(FBIEDGE_ORT_CALL*)(OrtTensorTypeAndShapeInfo*)> owner(
        y, api.ReleaseTensorTypeAndShapeInfo);
    check(api, api.SetTensorElementType(y, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    check(api, api.SetDimensions(y, dims.data(), rank));
    check(api, api.SetSymbolicDimensions(y, names.data(), rank));
    check(api, api.ShapeInferContext_SetOutputTypeShape(context, 0, y));
}

}  // namespace

BinaryMatMulOp::BinaryMatMulOp(const OrtApi& api_in, const KernelTable& kernels_in, const AccuracyLevel* override_in,
                               bool infers_shapes)
    : OrtCustomOp{}, api(&api_in), kernels(&kernels_in), level_override(override_in) {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp*) { return "BinaryMatMul"; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
    GetInputType = [](const OrtCustomOp*, size_t index) { return input_type(index); };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
        return index < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
    GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
        *kernel = nullptr;
        return guarded(*self(op).api, [&] { create_kernel(self(op), info, kernel); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        const Kernel& this_kernel = *static_cast<const Kernel*>(kernel);
        return guarded(this_kernel.api, [&] { compute(this_kernel, context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    if (!infers_shapes) return;
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
        return guarded(*self(op).api, [&] { infer_shape(*self(op).api, context); });
    };
}

}  // namespace fbiedge
