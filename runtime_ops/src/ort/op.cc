#include "op.h"

namespace fbiedge {

AccuracyLevel read_level(const Environment& environment, const NodeReader& node) {
    const int64_t level = node.integer("accuracy_level", 0);
    if (level != 0 && level != 1 && level != 4) {
        node.fail("accuracy_level is " + std::to_string(level) + ", expected 0 (default), 1 (fp32) or 4 (int8)");
    }
    if (environment.level_override) return *environment.level_override;
    return level == 1 ? AccuracyLevel::kFp32 : AccuracyLevel::kInt8;
}

TensorView input(const OrtApi& api, const OrtKernelContext* context, size_t index) {
    const OrtValue* value = nullptr;
    check(api, api.KernelContext_GetInput(context, index, &value));
    if (!value) throw OpError{"fbiedge: input " + std::to_string(index) + " is absent"};
    return view(api, value);
}

void* output(const OrtApi& api, OrtKernelContext* context, size_t index, const Dims& dims) {
    OrtValue* value = nullptr;
    check(api, api.KernelContext_GetOutput(context, index, dims.data(), dims.size(), &value));
    void* data = nullptr;
    check(api, api.GetTensorMutableData(value, &data));
    return data;
}

int64_t inferred_attribute(const OrtApi& api, OrtShapeInferContext* context, const char* name) {
    const OrtOpAttr* attribute = nullptr;
    int64_t value = 0;
    size_t bytes = 0;
    check(api, api.ShapeInferContext_GetAttribute(context, name, &attribute));
    check(api, api.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof value, &bytes));
    return value;
}

void infer_like_input(const OrtApi& api, OrtShapeInferContext* context, size_t in, int64_t last, size_t out) {
    OrtTensorTypeAndShapeInfo* a = nullptr;  // owned by the context
    check(api, api.ShapeInferContext_GetInputTypeShape(context, in, &a));
    size_t rank = 0;
    check(api, api.GetDimensionsCount(a, &rank));
    if (rank == 0) return;
    std::vector<int64_t> dims(rank);
    std::vector<const char*> names(rank);
    check(api, api.GetDimensions(a, dims.data(), rank));
    check(api, api.GetSymbolicDimensions(a, names.data(), rank));
    dims.back() = last;
    names.back() = "";
    for (size_t i = 0; i < rank; ++i) {
        if (dims[i] < 0 && !*names[i]) return;
    }
    OrtTensorTypeAndShapeInfo* y = nullptr;
    check(api, api.CreateTensorTypeAndShapeInfo(&y));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void(ORT_API_CALL*)(OrtTensorTypeAndShapeInfo*)> owner(
        y, api.ReleaseTensorTypeAndShapeInfo);
    check(api, api.SetTensorElementType(y, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT));
    check(api, api.SetDimensions(y, dims.data(), rank));
    check(api, api.SetSymbolicDimensions(y, names.data(), rank));
    check(api, api.ShapeInferContext_SetOutputTypeShape(context, out, y));
}

}  // namespace fbiedge
