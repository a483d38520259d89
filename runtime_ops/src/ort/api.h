// ONNX Runtime's C API, from the official header or from our own declaration, and small helpers over it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <new>
#include <string>

#if defined(FBIEDGE_OFFICIAL_ORT_HEADER)
#include <onnxruntime_c_api.h>
#else
#include "abi.h"
namespace fbiedge {
using namespace fbiedge_ort_abi;
}
#endif

namespace fbiedge {

constexpr uint32_t kOrtApiVersion = 18;  // the oldest that has all we need: ONNX Runtime 1.18
constexpr uint32_t kShapeReferenceApiVersion =
    24;  // the oldest that shows shapes without allocating, which view() likes

// Thrown inside the glue only; guarded() turns it into an OrtStatus.
struct OpError {
    std::string message;
};

// Throws OpError with the status's message, and releases the status, unless it is null (success).
void check(const OrtApi& api, OrtStatus* status);

// The status's message; the status is released.
std::string take_message(const OrtApi& api, OrtStatus* status);

// Runs body; what it throws becomes a status. Nothing may be thrown across the C boundary.
template <typename Body>
OrtStatus* guarded(const OrtApi& api, Body body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const OpError& error) {
        return api.CreateStatus(ORT_INVALID_ARGUMENT, error.message.c_str());
    } catch (const std::bad_alloc&) {
        return api.CreateStatus(ORT_RUNTIME_EXCEPTION, "fbiedge: out of memory");
    } catch (const std::exception& error) {
        return api.CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
    } catch (...) {
        return api.CreateStatus(ORT_RUNTIME_EXCEPTION, "fbiedge: unknown exception");
    }
}

// Dimensions, held in place: an operator has microseconds, and looks at up to a dozen tensors in them.
class Dims {
  public:
    Dims() = default;
    Dims(std::initializer_list<int64_t> dims) : Dims(dims.begin(), dims.size()) {}
    Dims(const int64_t* dims, size_t rank);  // throws OpError for more than kMostDims

    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    int64_t operator[](size_t i) const { return dims_[i]; }
    int64_t& operator[](size_t i) { return dims_[i]; }
    int64_t back() const { return dims_[size_ - 1]; }
    int64_t& back() { return dims_[size_ - 1]; }
    const int64_t* data() const { return dims_; }
    const int64_t* begin() const { return dims_; }
    const int64_t* end() const { return dims_ + size_; }

  private:
    static constexpr size_t kMostDims = 8;  // twice what any tensor of ours has

    int64_t dims_[kMostDims];
    size_t size_ = 0;
};
bool operator==(const Dims& a, const Dims& b);
inline bool operator!=(const Dims& a, const Dims& b) { return !(a == b); }
std::string to_string(const Dims& dims);

struct TensorView {
    const void* data;
    ONNXTensorElementDataType type;
    Dims dims;
};
TensorView view(const OrtApi& api, const OrtValue* value);

// `api` is of kShapeReferenceApiVersion or later. The last one that was said to be so is remembered, as a process with
// several ONNX Runtimes is rare and view() works without.
void has_shape_references(const OrtApi* api);

}  // namespace fbiedge
