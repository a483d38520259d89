#include "api.h"

#include <memory>

namespace fbiedge {

void check(const OrtApi& api, OrtStatus* status) {
    if (status) throw OpError{take_message(api, status)};
}

std::string take_message(const OrtApi& api, OrtStatus* status) {
    const std::unique_ptr<OrtStatus, void(ORT_API_CALL*)(OrtStatus*)> owner(status, api.ReleaseStatus);
    return api.GetErrorMessage(status);
}

TensorView view(const OrtApi& api, const OrtValue* value) {
    TensorView tensor = {};
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void(ORT_API_CALL*)(OrtTensorTypeAndShapeInfo*)> owner(
        info, api.ReleaseTensorTypeAndShapeInfo);
    check(api, api.GetTensorElementType(info, &tensor.type));
    size_t rank = 0;
    check(api, api.GetDimensionsCount(info, &rank));
    tensor.dims.resize(rank);
    check(api, api.GetDimensions(info, tensor.dims.data(), rank));
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // the C API has no const reader
    tensor.data = data;
    return tensor;
}

std::string to_string(const std::vector<int64_t>& dims) {
    std::string text = "[";
    for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
    return text + "]";
}

}  // namespace fbiedge
