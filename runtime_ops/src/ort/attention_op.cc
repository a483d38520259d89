// GroupQueryAttention over an int8 cache as an operator (spec/GroupQueryAttention.md).

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../attention.h"
#include "op.h"
#include "pool.h"

namespace fbiedge {
namespace {

enum Input : size_t {
    kQkv,
    kPastKey,
    kPastValue,
    kPastKeyScale,
    kPastValueScale,
    kSeqlens,
    kTotal,
    kCos,
    kSin,
    kQNorm,
    kKNorm
};
enum Output : size_t { kOut, kPresentKey, kPresentValue, kPresentKeyScale, kPresentValueScale };

// What the node says; the same in every call.
struct Node {
    size_t heads;
    size_t kv_heads;
    size_t d;
    size_t context;  // positions that can be rotated
    float scale;
    float epsilon;
    const float* cos;
    const float* sin;
    const float* q_norm;
    const float* k_norm;
};

class AttentionKernel final : public OpKernel {
  public:
    AttentionKernel(const OrtApi& api, const Node& node, const AttentionKernels& kernels, std::string who)
        : api_(api), node_(node), kernels_(kernels), who_(std::move(who)) {}

    void compute(OrtKernelContext* context) const override {
        const TensorView qkv = input(api_, context, kQkv);
        const int64_t width = signed_size((node_.heads + 2 * node_.kv_heads) * node_.d);
        if (qkv.dims.size() != 3 || qkv.dims[2] != width) {
            fail("qkv has shape " + to_string(qkv.dims) + ", expected [batch, tokens, " + std::to_string(width) + "]");
        }
        const int64_t batch = qkv.dims[0], tokens = qkv.dims[1];
        const Past past = read_past(context, batch);
        const std::vector<size_t> first = first_positions(context, batch, tokens);
        const int64_t total = total_length(context, first, tokens, past.length);
        const int64_t length = std::max(past.length, total);

        Attention a = {};
        a.batch = static_cast<size_t>(batch);
        a.tokens = static_cast<size_t>(tokens);
        a.heads = node_.heads;
        a.kv_heads = node_.kv_heads;
        a.d = node_.d;
        a.capacity = static_cast<size_t>(length);
        a.scale = node_.scale;
        a.epsilon = node_.epsilon;
        a.q_norm = node_.q_norm;
        a.k_norm = node_.k_norm;
        a.cos = node_.cos;
        a.sin = node_.sin;
        a.qkv = static_cast<const float*>(qkv.data);
        a.first = first.data();
        const size_t d = node_.d;
        a.keys = static_cast<int8_t*>(present(context, past, 0, length, d));
        a.values = static_cast<int8_t*>(present(context, past, 1, length, d));
        a.key_scales = static_cast<float*>(present(context, past, 2, length, sizeof(float)));
        a.value_scales = static_cast<float*>(present(context, past, 3, length, sizeof(float)));
        a.out = static_cast<float*>(output(api_, context, kOut, {batch, tokens, signed_size(node_.heads * d)}));
        Pool pool(api_, context, threads());
        if (!attention(a, kernels_, pool.parallel())) pool.fail(who_);
    }

  private:
    [[noreturn]] void fail(const std::string& message) const { throw OpError{who_ + ": " + message}; }
    static int64_t signed_size(size_t size) { return static_cast<int64_t>(size); }

    struct Past {
        int64_t length;
        TensorView tensors[4];  // keys, values and their scales
    };

    Past read_past(OrtKernelContext* context, int64_t batch) const {
        Past past;
        for (size_t i = 0; i < 4; ++i) past.tensors[i] = input(api_, context, kPastKey + i);
        const Dims& keys = past.tensors[0].dims;
        past.length = keys.size() == 4 ? keys[2] : 0;
        const char* const names[] = {"past_key", "past_value", "past_key_scale", "past_value_scale"};
        for (size_t i = 0; i < 4; ++i) {
            const int64_t kv_heads = signed_size(node_.kv_heads);
            const Dims expected =
                i < 2 ? Dims{batch, kv_heads, past.length, signed_size(node_.d)} : Dims{batch, kv_heads, past.length};
            const Dims& dims = past.tensors[i].dims;
            if (dims != expected) {
                fail(std::string(names[i]) + " has shape " + to_string(dims) + ", expected " + to_string(expected));
            }
        }
        return past;
    }

    std::vector<size_t> first_positions(OrtKernelContext* context, int64_t batch, int64_t tokens) const {
        const TensorView seqlens = input(api_, context, kSeqlens);
        if (seqlens.dims != Dims{batch}) {
            fail("seqlens_k has shape " + to_string(seqlens.dims) + ", expected [" + std::to_string(batch) + "]");
        }
        std::vector<size_t> first(static_cast<size_t>(batch));
        for (size_t b = 0; b < first.size(); ++b) {
            const int64_t last = static_cast<const int32_t*>(seqlens.data)[b];
            if (last < 0) fail("seqlens_k is " + std::to_string(last) + ", expected total length - 1 of a row");
            first[b] = static_cast<size_t>(std::max<int64_t>(last + 1 - tokens, 0));
        }
        return first;
    }

    int64_t total_length(OrtKernelContext* context, const std::vector<size_t>& first, int64_t tokens,
                         int64_t past) const {
        const TensorView view = input(api_, context, kTotal);
        size_t count = 1;
        for (const int64_t dim : view.dims) count *= static_cast<size_t>(dim);
        if (count != 1) fail("total_sequence_length has shape " + to_string(view.dims) + ", expected one number");
        const int64_t total = *static_cast<const int32_t*>(view.data);
        for (const size_t position : first) {
            const int64_t end = signed_size(position) + tokens;
            if (end > total) {
                fail("total_sequence_length is " + std::to_string(total) + ", expected " + std::to_string(end) +
                     " or more: seqlens_k says so");
            }
            if (end > signed_size(node_.context)) {
                fail("the sequence is " + std::to_string(end) + " tokens long, cos_cache has " +
                     std::to_string(node_.context) + " positions");
            }
            if (signed_size(position) > past) {
                fail("seqlens_k says that a row begins at position " + std::to_string(position) + ", past has " +
                     std::to_string(past) + " rows");
            }
        }
        return total;
    }

    // Output `i` of the four, of `length` rows for each KV head, with the past's rows in it. Nothing is copied where
    // both are one.
    void* present(OrtKernelContext* context, const Past& pasts, size_t i, int64_t length, size_t row_bytes) const {
        const TensorView& past = pasts.tensors[i];
        Dims dims = past.dims;
        dims[2] = length;
        auto* to = static_cast<uint8_t*>(output(api_, context, kPresentKey + i, dims));
        const auto* from = static_cast<const uint8_t*>(past.data);
        const size_t past_bytes = static_cast<size_t>(past.dims[2]) * row_bytes;
        const size_t bytes = static_cast<size_t>(length) * row_bytes;
        if (from == to && past_bytes == bytes) return to;
        if (from == to && past_bytes > 0) fail("present is bound to the memory of past but is longer");
        const size_t heads = static_cast<size_t>(past.dims[0] * past.dims[1]);
        for (size_t head = 0; head < heads; ++head) {
            if (past_bytes > 0) std::memcpy(to + head * bytes, from + head * past_bytes, past_bytes);
            std::memset(to + head * bytes + past_bytes, 0, bytes - past_bytes);
        }
        return to;
    }

    const OrtApi& api_;
    const Node node_;
    const AttentionKernels& kernels_;
    const std::string who_;
};

Node read_node(const NodeReader& reader) {
    Node node = {};
    node.heads = reader.size("num_heads");
    node.kv_heads = reader.size("kv_num_heads");
    if (node.heads % node.kv_heads != 0) {
        reader.fail("num_heads is " + std::to_string(node.heads) +
                    ", expected a multiple of kv_num_heads = " + std::to_string(node.kv_heads));
    }
    const TensorView cos = reader.constant_view(kCos);
    if (cos.dims.size() != 2) {
        reader.fail("cos_cache has shape " + to_string(cos.dims) + ", expected [context, head_dim / 2]");
    }
    node.context = static_cast<size_t>(cos.dims[0]);
    node.d = static_cast<size_t>(2 * cos.dims[1]);
    if (node.d == 0 || node.d > kMaxHeadDim || node.d % kHeadDimStep != 0) {
        reader.fail("cos_cache has shape " + to_string(cos.dims) + " for a head_dim of " + std::to_string(node.d) +
                    ", expected a multiple of 8 up to 256");
    }
    node.cos = reader.constant_floats(kCos, cos.dims);
    node.sin = reader.constant_floats(kSin, cos.dims);
    node.q_norm = reader.constant_floats(kQNorm, {static_cast<int64_t>(node.d)});
    node.k_norm = reader.constant_floats(kKNorm, {static_cast<int64_t>(node.d)});
    const float scale = reader.real("scale", 0.0f);
    node.scale = scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(node.d));
    node.epsilon = reader.real("epsilon", 1e-6f);
    return node;
}

std::unique_ptr<OpKernel> create(const Environment& environment, const NodeReader& reader) {
    return std::make_unique<AttentionKernel>(*environment.api, read_node(reader), *environment.kernels->attention,
                                             reader.who());
}

// Left to ONNX Runtime: what a model declares of its outputs is all there is to know before lengths are.
void infer_shapes(const OrtApi&, OrtShapeInferContext*) {}

}  // namespace

const OpDefinition kGroupQueryAttentionOp = {
    "GroupQueryAttention",
    {
        {"qkv", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"past_key", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, false},
        {"past_value", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, false},
        {"past_key_scale", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"past_value_scale", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"seqlens_k", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, false},
        {"total_sequence_length", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, false},
        {"cos_cache", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"sin_cache", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false},
        {"q_norm", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
        {"k_norm", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true},
    },
    {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
     ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
    create,
    infer_shapes,
};

}  // namespace fbiedge
