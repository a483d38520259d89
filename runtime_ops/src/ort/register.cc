// The entry point that ONNX Runtime calls when the library is added to a session's options.

#include <cstdlib>
#include <list>
#include <mutex>

#include "../dispatch.h"
#include "custom_op.h"
#include "fbiedge_ops.h"

#ifndef FBIEDGE_REGISTER_FUNCTION
#define FBIEDGE_REGISTER_FUNCTION RegisterCustomOps
#endif

namespace fbiedge {
namespace {

constexpr AccuracyLevel kFp32 = AccuracyLevel::kFp32;
constexpr AccuracyLevel kInt8 = AccuracyLevel::kInt8;
const char* const kAccuracyKey = "fbiedge.accuracy_level";
const char* const kThreadsKey = "fbiedge.threads";
constexpr size_t kMostThreads = 1024;

const OpDefinition* const kDefinitions[] = {&kBinaryMatMulOp, &kBinaryQkvOp, &kBinarySwigluOp, &kMatMulNBitsOp,
                                            &kGroupQueryAttentionOp};

// ONNX Runtime keeps pointers to the ops and their domain for as long as options and sessions live, and doesn't say
// when that ends. So each of the few combinations that occur is made once and kept: kernels x override x threads x ONNX
// Runtimes in the process.
struct Domain {
    Environment environment;
    std::list<CustomOp> ops;
    OrtCustomOpDomain* handle = nullptr;
};

bool same(const Environment& a, const Environment& b) {
    return a.api == b.api && a.kernels == b.kernels && a.level_override == b.level_override && a.threads == b.threads;
}

OrtCustomOpDomain* domain_for(const Environment& environment, bool infers_shapes) {
    static std::mutex& mutex = *new std::mutex;
    static std::list<Domain>& domains = *new std::list<Domain>;
    const std::lock_guard<std::mutex> lock(mutex);
    for (Domain& domain : domains) {
        if (same(domain.environment, environment)) return domain.handle;
    }
    const OrtApi& api = *environment.api;
    Domain& domain = domains.emplace_back();
    domain.environment = environment;
    try {
        check(api, api.CreateCustomOpDomain("fbiedge", &domain.handle));
        for (const OpDefinition* definition : kDefinitions) {
            domain.ops.emplace_back(environment, *definition, infers_shapes);
            check(api, api.CustomOpDomain_Add(domain.handle, &domain.ops.back()));
        }
    } catch (...) {
        domains.pop_back();
        throw;
    }
    return domain.handle;
}

// Before 1.24, ONNX Runtime crashes when an op that infers shapes has a node with an absent optional input followed by
// a given one (bias without offsets). There the op goes without; only the planning of memory is the poorer for it.
bool can_infer_shapes(const char* version) {
    char* rest = nullptr;
    const long major = std::strtol(version, &rest, 10);
    const long minor = *rest == '.' ? std::strtol(rest + 1, nullptr, 10) : 0;
    return major > 1 || (major == 1 && minor >= 24);
}

// Empty where there is none.
std::string config_entry(const OrtApi& api, const OrtSessionOptions* options, const char* key) {
    int has_entry = 0;
    check(api, api.HasSessionConfigEntry(options, key, &has_entry));
    if (!has_entry) return {};
    size_t size = 0;
    check(api, api.GetSessionConfigEntry(options, key, nullptr, &size));
    std::string text(size, '\0');
    check(api, api.GetSessionConfigEntry(options, key, text.data(), &size));
    return text.c_str();
}

[[noreturn]] void refuse(const char* key, const std::string& text, const std::string& expected) {
    throw OpError{"fbiedge: session config entry " + std::string(key) + " is '" + text + "', expected " + expected};
}

const AccuracyLevel* read_override(const OrtApi& api, const OrtSessionOptions* options) {
    const std::string text = config_entry(api, options, kAccuracyKey);
    if (text.empty()) return nullptr;
    if (text == "fp32") return &kFp32;
    if (text == "int8") return &kInt8;
    refuse(kAccuracyKey, text, "fp32 or int8");
}

size_t read_threads(const OrtApi& api, const OrtSessionOptions* options) {
    const std::string text = config_entry(api, options, kThreadsKey);
    if (text.empty()) return 0;
    char* rest = nullptr;
    const long threads = std::strtol(text.c_str(), &rest, 10);
    if (*rest || threads < 1 || threads > static_cast<long>(kMostThreads)) {
        refuse(kThreadsKey, text, "a number from 1 to " + std::to_string(kMostThreads));
    }
    return static_cast<size_t>(threads);
}

const KernelTable& choose_kernels() {
    const char* isa = forced_isa();
    if (const KernelTable* kernels = find_kernels(isa)) return *kernels;
    std::string names;
    const AvailableKernels& available = available_kernels();
    for (size_t i = 0; i < available.count; ++i) names += (i ? ", " : "") + std::string(available.tables[i]->isa);
    throw OpError{"fbiedge: FBIEDGE_ISA is '" + std::string(isa) + "', expected a kernel that runs here: " + names};
}

}  // namespace
}  // namespace fbiedge

using namespace fbiedge;

extern "C" FBIEDGE_EXPORT OrtStatus* ORT_API_CALL FBIEDGE_REGISTER_FUNCTION(OrtSessionOptions* options,
                                                                            const OrtApiBase* api_base) {
    const OrtApi* api = api_base->GetApi(kOrtApiVersion);
    if (!api) {
        const OrtApi* oldest = api_base->GetApi(1);  // has CreateStatus, to say what is wrong
        return oldest ? oldest->CreateStatus(ORT_FAIL, "fbiedge: this ONNX Runtime is too old, 1.18 or later is needed")
                      : nullptr;
    }
    if (api_base->GetApi(kShapeReferenceApiVersion) == api) has_shape_references(api);
    return guarded(*api, [&] {
        const Environment environment = {api, &choose_kernels(), read_override(*api, options),
                                         read_threads(*api, options)};
        OrtCustomOpDomain* domain = domain_for(environment, can_infer_shapes(api_base->GetVersionString()));
        check(*api, api->AddCustomOpDomain(options, domain));
    });
}
