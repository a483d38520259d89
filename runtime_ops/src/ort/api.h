// ONNX Runtime's C API, from the official header or from our own declaration, and small helpers over it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <vector>

#if defined(FBIEDGE_OFFICIAL_ORT_HEADER)
#include <onnxruntime_c_api.h>
#else
#include "abi.h"
namespace fbiedge {
using namespace fbiedge_ort_abi;
}
#endif

namespace fbiedge {

constexpr uint32_t kOrtApiVersion = 18;  // the oldest that has all we use: ONNX Runtime 1.18

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

struct TensorView {
    const void* data;
    ONNXTensorElementDataType type;
    std::vector<int64_t> dims;
};
TensorView view(const OrtApi& api, const OrtValue* value);

std::string to_string(const std::vector<int64_t>& dims);

}  // namespace fbiedge
