// What an operator of the library says of itself; custom_op.cc makes of it the OrtCustomOp that ONNX Runtime sees.
#pragma once

#include <memory>

#include "../binary_matmul.h"
#include "../thread_pool.h"
#include "api.h"
#include "node_reader.h"

namespace fbiedge {

// What all nodes of a session share.
struct Environment {
    const OrtApi* api;
    const KernelTable* kernels;
    const AccuracyLevel* level_override;  // null: each node's accuracy_level
    size_t threads;                       // of a pool of the library's own; 0: ONNX Runtime's threads
};

// One node of a session. ONNX Runtime may compute it on several threads at a time.
class OpKernel {
  public:
    virtual ~OpKernel() = default;
    virtual void compute(OrtKernelContext* context) const = 0;  // throws OpError

    void use_threads(std::shared_ptr<ThreadPool> threads) { threads_ = std::move(threads); }

  protected:
    ThreadPool* threads() const { return threads_.get(); }  // null: ONNX Runtime's

  private:
    std::shared_ptr<ThreadPool> threads_;
};

struct OpDefinition {
    const char* name;
    std::vector<OpInput> inputs;
    std::vector<ONNXTensorElementDataType> outputs;
    std::unique_ptr<OpKernel> (*create)(const Environment& environment, const NodeReader& node);  // throws OpError
    void (*infer_shapes)(const OrtApi& api, OrtShapeInferContext* context);                       // throws OpError
};

extern const OpDefinition kBinaryMatMulOp;
extern const OpDefinition kBinaryQkvOp;
extern const OpDefinition kBinarySwigluOp;
extern const OpDefinition kGroupQueryAttentionOp;
extern const OpDefinition kMatMulNBitsOp;

// --- for the operators' files

// The session's accuracy level, else the node's.
AccuracyLevel read_level(const Environment& environment, const NodeReader& node);

// Throws OpError for an input that is absent.
TensorView input(const OrtApi& api, const OrtKernelContext* context, size_t index);
void* output(const OrtApi& api, OrtKernelContext* context, size_t index, const Dims& dims);

// The integer attribute of a node whose shapes are inferred.
int64_t inferred_attribute(const OrtApi& api, OrtShapeInferContext* context, const char* name);

// Output `out` is float and has the dimensions of input `in` (known or named) with `last` as the last. Does nothing
// when a dimension is neither known nor named.
void infer_like_input(const OrtApi& api, OrtShapeInferContext* context, size_t in, int64_t last, size_t out);

}  // namespace fbiedge
