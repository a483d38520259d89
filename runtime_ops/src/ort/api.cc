#include "api.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

// An official header may be older.
#if !defined(FBIEDGE_OFFICIAL_ORT_HEADER) || ORT_API_VERSION >= 24
#define FBIEDGE_SHAPE_REFERENCES 1
#else
#define FBIEDGE_SHAPE_REFERENCES 0
#endif

namespace fbiedge {
namespace {

std::atomic<const OrtApi*> api_with_references{nullptr};

}  // namespace

void check(const OrtApi& api, OrtStatus* status) {
    if (status) throw OpError{take_message(api, status)};
}

std::string take_message(const OrtApi& api, OrtStatus* status) {
    const std::unique_ptr<OrtStatus, void(ORT_API_CALL*)(OrtStatus*)> owner(status, api.ReleaseStatus);
    return api.GetErrorMessage(status);
}

Dims::Dims(const int64_t* dims, size_t rank) : size_(rank) {
    if (rank > kMostDims) {
        throw OpError{"fbiedge: a tensor has " + std::to_string(rank) + " dimensions, expected at most " +
                      std::to_string(kMostDims)};
    }
    std::copy_n(dims, rank, dims_);
}

bool operator==(const Dims& a, const Dims& b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }

std::string to_string(const Dims& dims) {
    std::string text = "[";
    for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
    return text + "]";
}

void has_shape_references(const OrtApi* api) { api_with_references.store(api, std::memory_order_relaxed); }

TensorView view(const OrtApi& api, const OrtValue* value) {
    TensorView tensor = {};
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));  // the C API has no const reader
    tensor.data = data;
#if FBIEDGE_SHAPE_REFERENCES
    if (&api == api_with_references.load(std::memory_order_relaxed)) {
        const int64_t* dims = nullptr;
        size_t rank = 0;
        check(api, api.GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &dims, &rank));
        tensor.dims = Dims(dims, rank);
        return tensor;
    }
#endif
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void(ORT_API_CALL*)(OrtTensorTypeAndShapeInfo*)> owner(
        info, api.ReleaseTensorTypeAndShapeInfo);
    check(api, api.GetTensorElementType(info, &tensor.type));
    size_t rank = 0;
    check(api, api.GetDimensionsCount(info, &rank));
    std::vector<int64_t> dims(rank);
    check(api, api.GetDimensions(info, dims.data(), rank));
    tensor.dims = Dims(dims.data(), rank);
    return tensor;
}

}  // namespace fbiedge
