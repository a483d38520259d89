#include "node_reader.h"

namespace fbiedge {
namespace {

// Calls a function of the (buffer, size) kind twice: for the size with the terminating zero, then for the text.
template <typename Call>
std::string text(const OrtApi& api, Call call) {
    size_t size = 0;
    check(api, call(nullptr, &size));
    std::string value(size, '\0');
    check(api, call(value.data(), &size));
    return value.c_str();
}

// "10 (float16)"
std::string type_name(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
            return "1 (float)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
            return "2 (uint8)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
            return "3 (int8)";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
            return "10 (float16)";
        default:
            return std::to_string(type);
    }
}

}  // namespace

NodeReader::NodeReader(const OrtApi& api, const OrtKernelInfo* info, const char* op, const std::vector<OpInput>& inputs)
    : api_(api), info_(info), inputs_(inputs) {
    check(api_, api_.KernelInfo_GetInputCount(info_, &connected_));
    who_ = "fbiedge " + std::string(op) + " node '" +
           text(api_, [this](char* out, size_t* size) { return api_.KernelInfo_GetNodeName(info_, out, size); }) + "'";
}

int64_t NodeReader::integer(const char* name, int64_t fallback) const {
    int64_t value = 0;
    OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value);
    if (!status) return value;
    api_.ReleaseStatus(status);
    return fallback;
}

float NodeReader::real(const char* name, float fallback) const {
    float value = 0;
    OrtStatus* status = api_.KernelInfoGetAttribute_float(info_, name, &value);
    if (!status) return value;
    api_.ReleaseStatus(status);
    return fallback;
}

std::string NodeReader::string(const char* name) const {
    try {
        return text(api_, [this, name](char* out, size_t* size) {
            return api_.KernelInfoGetAttribute_string(info_, name, out, size);
        });
    } catch (const OpError&) {
        return {};  // absent or not a string
    }
}

size_t NodeReader::size(const char* name) const {
    const int64_t value = integer(name, 0);
    if (value <= 0 || value > 0x7fffffff) {
        fail(std::string(name) + " is " + std::to_string(value) + ", expected an integer attribute from 1 to 2^31 - 1");
    }
    return static_cast<size_t>(value);
}

bool NodeReader::has(size_t index) const {
    if (index >= connected_) return false;
    return !text(api_, [this, index](char* out, size_t* size) {
                return api_.KernelInfo_GetInputName(info_, index, out, size);
            }).empty();
}

bool NodeReader::is_constant(size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
    return is_constant && value;
}

TensorView NodeReader::constant_view(size_t index) const {
    const std::string name = inputs_[index].name;
    if (!has(index)) fail(name + " is missing");
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
    if (!is_constant || !value) fail(name + " is computed, expected an initializer");
    return view(api_, value);
}

const void* NodeReader::constant(size_t index, ONNXTensorElementDataType type, const Dims& dims, bool* is_fp16) const {
    const std::string name = inputs_[index].name;
    if (!has(index) && inputs_[index].optional) return nullptr;
    const TensorView tensor = constant_view(index);
    const bool fp16 = tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    if (tensor.type != type && !(fp16 && is_fp16)) {
        const std::string also = is_fp16 ? " or " + type_name(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) : "";
        fail(name + " has element type " + std::to_string(tensor.type) + ", expected " + type_name(type) + also);
    }
    if (tensor.dims != dims) {
        fail(name + " has shape " + to_string(tensor.dims) + ", expected " + to_string(dims));
    }
    if (is_fp16) *is_fp16 = fp16;
    return tensor.data;
}

const float* NodeReader::constant_floats(size_t index, const Dims& dims) const {
    return static_cast<const float*>(constant(index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, dims));
}

}  // namespace fbiedge
