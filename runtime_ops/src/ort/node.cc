#include "node.h"

namespace fbiedge {
namespace {

enum Input : size_t { kA, kB, kScales, kOffsets, kBias };
const char* const kInputNames[] = {"A", "B", "scales", "offsets", "bias"};

class Reader {
  public:
    Reader(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {
        check(api_, api_.KernelInfo_GetInputCount(info_, &input_count_));
        name_ = text([this](char* out, size_t* size) { return api_.KernelInfo_GetNodeName(info_, out, size); });
    }

    const std::string& name() const { return name_; }

    [[noreturn]] void fail(const std::string& message) const {
        throw OpError{"fbiedge BinaryMatMul node '" + name_ + "': " + message};
    }

    int64_t integer(const char* name, int64_t fallback) const {
        int64_t value = 0;
        OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value);
        if (!status) return value;
        api_.ReleaseStatus(status);
        return fallback;
    }

    size_t size(const char* name) const {
        const int64_t value = integer(name, 0);
        if (value <= 0 || value > 0x7fffffff) {
            fail(std::string(name) + " is " + std::to_string(value) +
                 ", expected an integer attribute from 1 to 2^31 - 1");
        }
        return static_cast<size_t>(value);
    }

    std::string string_attribute(const char* name) const {
        try {
            return text([this, name](char* out, size_t* size) {
                return api_.KernelInfoGetAttribute_string(info_, name, out, size);
            });
        } catch (const OpError&) {
            return {};  // absent or not a string; the caller rejects the empty value
        }
    }

    bool has(Input input) const {
        if (input >= input_count_) return false;
        return !text([this, input](char* out, size_t* size) {
                    return api_.KernelInfo_GetInputName(info_, input, out, size);
                }).empty();
    }

    // The data of a constant input, after checking its type and shape; null for an absent optional one.
    const void* constant(Input input, const std::vector<int64_t>& dims, bool fp16_allowed, bool* is_fp16) const {
        if (!has(input)) {
            if (input >= kOffsets) return nullptr;
            fail(std::string(kInputNames[input]) + " is missing");
        }
        int is_constant = 0;
        const OrtValue* value = nullptr;
        check(api_, api_.KernelInfoGetConstantInput_tensor(info_, input, &is_constant, &value));
        if (!is_constant || !value) fail(std::string(kInputNames[input]) + " is computed, expected an initializer");
        const TensorView tensor = view(api_, value);
        const bool fp16 = tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        const auto type = input == kB ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        if (tensor.type != type && !(fp16 && fp16_allowed)) {
            fail(std::string(kInputNames[input]) + " has element type " + std::to_string(tensor.type) + ", expected " +
                 std::to_string(type) +
                 (fp16_allowed  ? " (float) or 10 (float16)"
                  : input == kB ? " (uint8)"
                                : " (float)"));
        }
        if (tensor.dims != dims) {
            fail(std::string(kInputNames[input]) + " has shape " + to_string(tensor.dims) + ", expected " +
                 to_string(dims));
        }
        if (is_fp16) *is_fp16 = fp16;
        return tensor.data;
    }

  private:
    // Calls a function of the (buffer, size) kind twice: for the size with the terminating zero, then for the text.
    template <typename Call>
    std::string text(Call call) const {
        size_t size = 0;
        check(api_, call(nullptr, &size));
        std::string value(size, '\0');
        check(api_, call(value.data(), &size));
        return value.c_str();
    }

    const OrtApi& api_;
    const OrtKernelInfo* info_;
    size_t input_count_ = 0;
    std::string name_;
};

ScaleForm read_form(const Reader& reader) {
    const std::string text = reader.string_attribute("scale_form");
    if (text == "column") return ScaleForm::kColumn;
    if (text == "row") return ScaleForm::kRow;
    if (text == "single") return ScaleForm::kSingle;
    if (text == "block") return ScaleForm::kBlock;
    reader.fail("scale_form is '" + text + "', expected column, row, single or block");
}

AccuracyLevel read_level(const Reader& reader) {
    const int64_t level = reader.integer("accuracy_level", 0);
    if (level == 0 || level == 4) return AccuracyLevel::kInt8;
    if (level == 1) return AccuracyLevel::kFp32;
    reader.fail("accuracy_level is " + std::to_string(level) + ", expected 0 (default), 1 (fp32) or 4 (int8)");
}

}  // namespace

Node read_node(const OrtApi& api, const OrtKernelInfo* info) {
    const Reader reader(api, info);
    Node node = {reader.name(), {}, read_level(reader)};
    BinaryMatrix& matrix = node.matrix;
    matrix.k = reader.size("K");
    matrix.n = reader.size("N");
    matrix.form = read_form(reader);
    const bool block = matrix.form == ScaleForm::kBlock;
    const int64_t block_size = reader.integer("block_size", 0);
    const int64_t expected_size = block ? static_cast<int64_t>(kGroupInputs) : 0;
    if (block_size != expected_size) {
        reader.fail("block_size is " + std::to_string(block_size) + ", expected " + std::to_string(expected_size) +
                    (block ? " in block form" : " outside block form"));
    }

    const auto n_tiles = static_cast<int64_t>(ceil_div(matrix.n, kTileRows));
    const auto k_tiles = static_cast<int64_t>(ceil_div(matrix.k, kTileInputs));
    const auto groups = static_cast<int64_t>(ceil_div(matrix.k, kGroupInputs));
    const auto k = static_cast<int64_t>(matrix.k), n = static_cast<int64_t>(matrix.n);
    matrix.tiles = static_cast<const uint8_t*>(
        reader.constant(kB, {n_tiles, k_tiles, static_cast<int64_t>(kTileBytes)}, false, nullptr));
    if (block) {
        const std::vector<int64_t> shape = {n_tiles, groups, static_cast<int64_t>(kTileRows)};
        matrix.block = reader.constant(kScales, shape, true, &matrix.block_fp16);
        if (reader.has(kOffsets)) reader.fail("offsets are given, expected none in block form");
    } else {
        const std::vector<int64_t> shape = {matrix.form == ScaleForm::kColumn ? k
                                            : matrix.form == ScaleForm::kRow  ? n
                                                                              : 1};
        matrix.alpha = static_cast<const float*>(reader.constant(kScales, shape, false, nullptr));
        matrix.beta = static_cast<const float*>(reader.constant(kOffsets, shape, false, nullptr));
    }
    matrix.bias = static_cast<const float*>(reader.constant(kBias, {n}, false, nullptr));
    return node;
}

}  // namespace fbiedge
