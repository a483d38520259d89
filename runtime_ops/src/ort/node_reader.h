// A node as the model file describes it: attributes and constant inputs, checked as they are read.
#pragma once

#include <vector>

#include "api.h"

namespace fbiedge {

struct OpInput {
    const char* name;
    ONNXTensorElementDataType type;  // UNDEFINED: any
    bool optional;
};

// Every function that rejects what it finds throws OpError, whose message names the node, what was got and what was
// expected.
class NodeReader {
  public:
    NodeReader(const OrtApi& api, const OrtKernelInfo* info, const char* op, const std::vector<OpInput>& inputs);

    // "fbiedge BinaryMatMul node 'layers.0.q_proj'", how every message begins.
    const std::string& who() const { return who_; }
    [[noreturn]] void fail(const std::string& message) const { throw OpError{who_ + ": " + message}; }

    // An attribute that is absent or of another type counts as the fallback.
    int64_t integer(const char* name, int64_t fallback) const;
    float real(const char* name, float fallback) const;
    std::string string(const char* name) const;
    // A required integer from 1 to 2^31 - 1.
    size_t size(const char* name) const;

    // Whether input `index` is connected.
    bool has(size_t index) const;
    // Whether it is an initializer.
    bool is_constant(size_t index) const;
    std::string input_name(size_t index) const { return inputs_[index].name; }

    // The data of a constant input of type `type` and shape `dims`; null for an absent optional one. Where fp16 is
    // allowed too, *is_fp16 says what it is.
    const void* constant(size_t index, ONNXTensorElementDataType type, const Dims& dims, bool* is_fp16 = nullptr) const;
    // Any constant input; fails where it is absent or computed.
    TensorView constant_view(size_t index) const;
    const float* constant_floats(size_t index, const Dims& dims) const;

  private:
    const OrtApi& api_;
    const OrtKernelInfo* info_;
    const std::vector<OpInput>& inputs_;
    size_t connected_ = 0;
    std::string who_;
};

}  // namespace fbiedge
