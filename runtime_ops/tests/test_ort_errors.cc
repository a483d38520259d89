// What ONNX Runtime is told when something fails inside the op: the reason, never a guess.
// The op runs on an ONNX Runtime made up here, whose every other function is null, and on a product that only hands out
// its work. One translation unit: the glue's own sources are included.
#include <cstdio>
#include <stdexcept>

#include "../src/ort/binary_layer_op.cc"
#include "../src/ort/binary_matmul_op.cc"
#include "../src/ort/custom_op.cc"

struct fbiedge_ort_abi::OrtStatus {
    std::string message;
};

namespace fbiedge {

BinaryLayer::BinaryLayer(const BinaryMatrix* parts, size_t count, Join join, const RmsNorm& norm)
    : count_(count), outputs_(parts[0].n), join_(join), norm_(norm) {
    parts_[0].matrix = parts[0];
}

bool BinaryLayer::run(const KernelTable&, AccuracyLevel, const float*, size_t, const float*, float*,
                      const ParallelFor& parallel) const {
    return parallel.run(parallel.context, 2, [](void*, size_t) {}, nullptr);
}

namespace {

int alive = 0, failed = 0;
float numbers[4] = {};
const char* pool_error = nullptr;

OrtStatus* make_status(const char* message) { return ++alive, new OrtStatus{message}; }

OrtApi made_up_api() {
    OrtApi api = {};
    api.CreateStatus = [](OrtErrorCode, const char* message) { return make_status(message); };
    api.GetErrorMessage = [](const OrtStatus* status) { return status->message.c_str(); };
    api.ReleaseStatus = [](OrtStatus* status) {
        --alive;
        delete status;
    };
    api.KernelContext_GetInput = [](const OrtKernelContext*, size_t, const OrtValue** value) -> OrtStatus* {
        *value = reinterpret_cast<const OrtValue*>(numbers);  // only handed back to the functions below
        return nullptr;
    };
    api.KernelContext_GetOutput = [](OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**) -> OrtStatus* {
        return nullptr;
    };
    api.GetTensorTypeAndShape = [](const OrtValue*, OrtTensorTypeAndShapeInfo**) -> OrtStatus* { return nullptr; };
    api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo*) {};
    api.GetTensorElementType = [](const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*) -> OrtStatus* {
        return nullptr;
    };
    api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo*, size_t* rank) -> OrtStatus* {
        *rank = 1;
        return nullptr;
    };
    api.GetDimensions = [](const OrtTensorTypeAndShapeInfo*, int64_t* dims, size_t) -> OrtStatus* {
        dims[0] = 4;
        return nullptr;
    };
    api.GetTensorMutableData = [](OrtValue*, void** data) -> OrtStatus* {
        *data = numbers;
        return nullptr;
    };
    api.KernelContext_ParallelFor = [](const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t,
                                       void*) -> OrtStatus* { return pool_error ? make_status(pool_error) : nullptr; };
    return api;
}

void expect(const OrtApi& api, OrtStatus* status, const char* message) {
    const std::string got = status ? take_message(api, status) : "no error";
    if (got == message && alive == 0) return;
    std::printf("got '%s' with %d statuses alive, expected '%s'\n", got.c_str(), alive, message);
    alive = 0;
    ++failed;
}

}  // namespace
}  // namespace fbiedge

int main() {
    using namespace fbiedge;
    const OrtApi api = made_up_api();
    expect(api, guarded(api, [] {}), "no error");
    expect(api, guarded(api, [] { throw OpError{"a node is wrong"}; }), "a node is wrong");
    expect(api, guarded(api, [] { throw std::bad_alloc(); }), "fbiedge: out of memory");
    expect(api, guarded(api, [] { throw std::length_error("a vector is too long"); }), "a vector is too long");
    expect(api, guarded(api, [] { throw 7; }), "fbiedge: unknown exception");

    const KernelTable table = {};
    const Environment environment = {&api, &table, nullptr, 0};
    const CustomOp op(environment, kBinaryMatMulOp, false);
    BinaryMatrix matrix = {};
    matrix.k = matrix.n = 4;
    Kernel kernel = {
        api, std::make_unique<BinaryLayerKernel>(environment, AccuracyLevel::kInt8, std::vector{matrix}, Join::kConcat,
                                                 RmsNorm{}, 0, "fbiedge BinaryMatMul node 'up'")};
    expect(api, op.KernelComputeV2(&kernel, nullptr), "no error");
    pool_error = "the pool is shut down";
    expect(api, op.KernelComputeV2(&kernel, nullptr), "fbiedge BinaryMatMul node 'up': the pool is shut down");
    std::printf("%d failed\n", failed);
    return failed != 0;
}
