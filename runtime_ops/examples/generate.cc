// Greedy decoding of a model.onnx, complete: ONNX Runtime, the op library, and a KV cache that stays in place.
//
//   generate [--threads N] MODEL LIBRARY MAX_TOKENS ID [ID ...]
//
// LIBRARY is the path of the op library, `linked` for the one that this program is linked with, or `none` to run on
// ONNX Runtime's own operators. Prints the ids that the model generates after the given ones, then how fast. What goes
// wrong is one line on stderr and exit status 2.
//
// The model's inputs are input_ids [1, n], attention_mask [1, seen + n] and past_key_values.*, its outputs logits and
// present.*. Here each present.* is bound to the memory of its past_key_values.*, so that a step writes its rows where
// they belong and nothing is copied.

#include <fbiedge_register.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

constexpr uint32_t kApiVersion = 18;  // of ONNX Runtime 1.18, the oldest that the op library runs in
constexpr size_t kChunk = 128;        // prompt tokens of one step: enough to keep the cores busy

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

const OrtApi& ort() {
    static const OrtApi* const api = OrtGetApiBase()->GetApi(kApiVersion);
    if (!api) fail(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + " is too old, expected 1.18");
    return *api;
}

void check(OrtStatus* status) {
    if (!status) return;
    const std::string text = ort().GetErrorMessage(status);
    ort().ReleaseStatus(status);
    fail(text.substr(0, text.find('\n')));
}

struct Release {
    void operator()(OrtEnv* env) const { ort().ReleaseEnv(env); }
    void operator()(OrtSessionOptions* options) const { ort().ReleaseSessionOptions(options); }
    void operator()(OrtSession* session) const { ort().ReleaseSession(session); }
    void operator()(OrtIoBinding* binding) const { ort().ReleaseIoBinding(binding); }
    void operator()(OrtMemoryInfo* info) const { ort().ReleaseMemoryInfo(info); }
    void operator()(OrtTypeInfo* info) const { ort().ReleaseTypeInfo(info); }
    void operator()(OrtModelMetadata* metadata) const { ort().ReleaseModelMetadata(metadata); }
    void operator()(OrtValue* value) const { ort().ReleaseValue(value); }
};
template <typename T>
using Owned = std::unique_ptr<T, Release>;

// make<OrtEnv>(ort().CreateEnv, …): what a function of the C API writes to its last argument.
template <typename T, typename Function, typename... Arguments>
Owned<T> make(Function function, Arguments... arguments) {
    T* made = nullptr;
    check(function(arguments..., &made));
    return Owned<T>(made);
}

// Takes text that ONNX Runtime allocated.
std::string take(char* text) {
    OrtAllocator* allocator = nullptr;
    check(ort().GetAllocatorWithDefaultOptions(&allocator));
    const std::string copy = text ? text : "";
    if (text) check(ort().AllocatorFree(allocator, text));
    return copy;
}

struct Options {
    std::filesystem::path model;
    std::string library;
    size_t threads = std::max(1u, std::thread::hardware_concurrency());
    size_t max_tokens = 0;
    std::vector<int64_t> ids;
};

struct Declared {
    std::string name;
    ONNXTensorElementDataType type;
    std::vector<int64_t> dims;  // -1 where it varies
};

size_t bytes_of(ONNXTensorElementDataType type) {
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8) return 1;
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return 4;
    fail("the cache has elements of type " + std::to_string(type) + ", expected int8 or float");
}

class Model {
  public:
    explicit Model(const Options& options)
        : capacity_(options.ids.size() + options.max_tokens),
          env_(make<OrtEnv>(ort().CreateEnv, ORT_LOGGING_LEVEL_FATAL, "generate")),
          memory_(make<OrtMemoryInfo>(ort().CreateCpuMemoryInfo, OrtDeviceAllocator, OrtMemTypeDefault)),
          session_(open(options)),
          binding_(make<OrtIoBinding>(ort().CreateIoBinding, session_.get())) {
        check_context();
        mask_.assign(capacity_, 1);
        const Declared logits = declared(ort().SessionGetOutputName, ort().SessionGetOutputTypeInfo, 0);
        if (logits.name != "logits" || logits.dims.empty() || logits.dims.back() < 1) {
            fail("the model's first output is " + logits.name + ", expected logits of a known vocabulary");
        }
        logits_.resize(static_cast<size_t>(logits.dims.back()));
        bind(ort().BindOutput, "logits", logits_, {1, 1, logits.dims.back()});
        bind(ort().BindInput, "logits_to_keep", keep_, {1});  // of a prompt only the last row is wanted
        size_t inputs = 0;
        check(ort().SessionGetInputCount(session_.get(), &inputs));
        for (size_t i = 0; i < inputs; ++i) {
            bind_cache(declared(ort().SessionGetInputName, ort().SessionGetInputTypeInfo, i));
        }
        if (cache_.empty()) fail("the model has no inputs past_key_values.*, expected one of `fbiedge export`");
    }

    // Appends ids to the cache -> the most likely next token; of several the one with the smallest id.
    int64_t next(const std::vector<int64_t>& ids) {
        for (size_t start = 0; start < ids.size(); start += kChunk) {
            step(ids.data() + start, std::min(kChunk, ids.size() - start));
        }
        return std::max_element(logits_.begin(), logits_.end()) - logits_.begin();
    }

    size_t vocabulary() const { return logits_.size(); }

  private:
    Owned<OrtSession> open(const Options& options) const {
        const auto session_options = make<OrtSessionOptions>(ort().CreateSessionOptions);
        check(ort().SetSessionLogSeverityLevel(session_options.get(), ORT_LOGGING_LEVEL_FATAL));
        check(ort().SetIntraOpNumThreads(session_options.get(), static_cast<int>(options.threads)));
        if (options.library == "linked") {
            check(FBIEDGE_REGISTER_FUNCTION(session_options.get(), OrtGetApiBase()));
        } else if (options.library != "none") {
            const std::filesystem::path path = std::filesystem::absolute(options.library);
            check(ort().RegisterCustomOpsLibrary_V2(session_options.get(), path.c_str()));
        }
        return make<OrtSession>(ort().CreateSession, env_.get(), options.model.c_str(), session_options.get());
    }

    template <typename GetName, typename GetTypeInfo>
    Declared declared(GetName get_name, GetTypeInfo get_type_info, size_t index) const {
        OrtAllocator* allocator = nullptr;
        check(ort().GetAllocatorWithDefaultOptions(&allocator));
        char* name = nullptr;
        check(get_name(session_.get(), index, allocator, &name));
        Declared entry = {take(name), ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
        const auto info = make<OrtTypeInfo>(get_type_info, session_.get(), index);
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        check(ort().CastTypeInfoToTensorInfo(info.get(), &tensor));
        if (!tensor) fail(entry.name + " is no tensor");
        check(ort().GetTensorElementType(tensor, &entry.type));
        size_t rank = 0;
        check(ort().GetDimensionsCount(tensor, &rank));
        entry.dims.resize(rank);
        check(ort().GetDimensions(tensor, entry.dims.data(), rank));
        return entry;
    }

    // The file carries its config.json as metadata; positions beyond the model's own have no rotation.
    void check_context() const {
        OrtAllocator* allocator = nullptr;
        check(ort().GetAllocatorWithDefaultOptions(&allocator));
        const auto metadata = make<OrtModelMetadata>(ort().SessionGetModelMetadata, session_.get());
        char* found = nullptr;
        check(ort().ModelMetadataLookupCustomMetadataMap(metadata.get(), allocator, "fbiedge.config", &found));
        const std::string config = take(found);
        const std::string_view key = "\"max_position_embeddings\":";
        const size_t at = config.find(key);
        if (at == std::string::npos) fail("the model has no fbiedge.config, expected one of `fbiedge export`");
        const unsigned long context = std::strtoul(config.c_str() + at + key.size(), nullptr, 10);
        if (capacity_ > context) {
            fail("prompt and MAX_TOKENS are " + std::to_string(capacity_) +
                 " tokens, more than the model's context of " + std::to_string(context));
        }
    }

    // past_key_values.0.key [batch, kv_heads, past, head_size] and its like, and with an int8 cache the rows' scales
    // past_key_values.0.key_scale [batch, kv_heads, past]: memory for `capacity` rows, bound as past and as present.
    void bind_cache(const Declared& input) {
        const std::string_view prefix = "past_key_values.";
        if (input.name.compare(0, prefix.size(), prefix) != 0) return;
        if (input.dims.size() < 3 || input.dims[1] < 1 || input.dims.back() == 0) fail(input.name + " has a bad shape");
        std::vector<int64_t> dims = input.dims;
        dims[0] = 1;
        dims[2] = static_cast<int64_t>(capacity_);
        size_t bytes = bytes_of(input.type);
        for (const int64_t dim : dims) bytes *= static_cast<size_t>(dim);
        cache_.emplace_back(std::calloc(bytes, 1), &std::free);  // zeros take memory when they are first written
        void* const data = cache_.back().get();
        if (!data) fail("a cache of " + std::to_string(capacity_) + " tokens is more than there is memory");
        const auto value = make<OrtValue>(ort().CreateTensorWithDataAsOrtValue, memory_.get(), data, bytes, dims.data(),
                                          dims.size(), input.type);
        const std::string present = "present." + input.name.substr(prefix.size());
        check(ort().BindInput(binding_.get(), input.name.c_str(), value.get()));
        check(ort().BindOutput(binding_.get(), present.c_str(), value.get()));
    }

    // Binds the beginning of `data`; the binding keeps the value, but not the memory.
    template <typename Bind, typename T>
    void bind(Bind bind_value, const char* name, std::vector<T>& data, const std::vector<int64_t>& dims) {
        constexpr bool is_float = std::is_same_v<T, float>;
        static_assert(is_float || std::is_same_v<T, int64_t>);
        size_t bytes = sizeof(T);
        for (const int64_t dim : dims) bytes *= static_cast<size_t>(dim);
        const auto value = make<OrtValue>(
            ort().CreateTensorWithDataAsOrtValue, memory_.get(), static_cast<void*>(data.data()), bytes, dims.data(),
            dims.size(), is_float ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
        check(bind_value(binding_.get(), name, value.get()));
    }

    // Only what changes between two steps is bound again: for a decoded token the length of the mask.
    void step(const int64_t* ids, size_t count) {
        std::copy(ids, ids + count, ids_.begin());
        if (count != bound_ids_) bind(ort().BindInput, "input_ids", ids_, {1, static_cast<int64_t>(count)});
        bound_ids_ = count;
        bind(ort().BindInput, "attention_mask", mask_, {1, static_cast<int64_t>(position_ + count)});
        check(ort().RunWithBinding(session_.get(), nullptr, binding_.get()));
        position_ += count;
    }

    const size_t capacity_;  // tokens
    size_t position_ = 0;    // tokens in the cache
    size_t bound_ids_ = 0;
    std::vector<int64_t> ids_ = std::vector<int64_t>(kChunk);
    std::vector<int64_t> mask_;
    std::vector<int64_t> keep_ = {1};
    std::vector<float> logits_;
    std::vector<std::unique_ptr<void, void (*)(void*)>> cache_;

    Owned<OrtEnv> env_;
    Owned<OrtMemoryInfo> memory_;
    Owned<OrtSession> session_;
    Owned<OrtIoBinding> binding_;
};

int64_t parse(const char* what, const char* text, int64_t least) {
    char* end = nullptr;
    const long long value = std::strtoll(text, &end, 10);
    if (end == text || *end || value < least || value > std::numeric_limits<int32_t>::max()) {
        fail(std::string(what) + " is '" + text + "', expected a number from " + std::to_string(least));
    }
    return value;
}

Options parse_arguments(int count, char** arguments) {
    Options options;
    int at = 1;
    if (count > 2 && std::string_view(arguments[1]) == "--threads") {
        options.threads = static_cast<size_t>(parse("--threads", arguments[2], 1));
        at = 3;
    }
    if (count < at + 4) fail("usage: generate [--threads N] MODEL (LIBRARY | linked | none) MAX_TOKENS ID [ID ...]");
    options.model = arguments[at];
    options.library = arguments[at + 1];
    options.max_tokens = static_cast<size_t>(parse("MAX_TOKENS", arguments[at + 2], 1));
    for (int i = at + 3; i < count; ++i) options.ids.push_back(parse("ID", arguments[i], 0));
    return options;
}

void run(const Options& options) {
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::duration time) { return std::chrono::duration<double>(time).count(); };
    Model model(options);
    for (const int64_t id : options.ids) {
        if (static_cast<size_t>(id) >= model.vocabulary()) {
            fail("token id " + std::to_string(id) + " is not in the vocabulary of " +
                 std::to_string(model.vocabulary()));
        }
    }

    const auto start = Clock::now();
    int64_t id = model.next(options.ids);
    const auto prefilled = Clock::now();
    for (size_t i = 0; i < options.max_tokens; ++i) {
        if (i > 0) id = model.next({id});
        std::printf(i ? " %lld" : "%lld", static_cast<long long>(id));
        std::fflush(stdout);
    }
    const double decode = seconds(Clock::now() - prefilled);
    std::printf("\nprompt %.0f tok/s", static_cast<double>(options.ids.size()) / seconds(prefilled - start));
    if (options.max_tokens > 1)
        std::printf(", decode %.0f tok/s", static_cast<double>(options.max_tokens - 1) / decode);
    std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
    try {
        run(parse_arguments(count, arguments));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "generate: %s\n", error.what());
        return 2;
    }
}
