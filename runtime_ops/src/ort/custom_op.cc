#include "custom_op.h"

namespace fbiedge {
namespace {

struct Kernel {
    const OrtApi& api;
    std::unique_ptr<OpKernel> kernel;
};

const CustomOp& self(const OrtCustomOp* op) { return *static_cast<const CustomOp*>(op); }
const OpDefinition& definition(const OrtCustomOp* op) { return *self(op).definition; }

void create_kernel(const CustomOp& op, const OrtKernelInfo* info, void** out) {
    const OpDefinition& definition = *op.definition;
    const NodeReader node(*op.environment.api, info, definition.name, definition.inputs);
    auto kernel = std::make_unique<Kernel>(Kernel{*op.environment.api, definition.create(op.environment, node)});
    if (op.environment.threads) kernel->kernel->use_threads(ThreadPool::shared(op.environment.threads));
    *out = kernel.release();
}

}  // namespace

CustomOp::CustomOp(const Environment& environment_in, const OpDefinition& definition_in, bool infers_shapes)
    : OrtCustomOp{}, environment(environment_in), definition(&definition_in) {
    version = kOrtApiVersion;
    GetName = [](const OrtCustomOp* op) { return fbiedge::definition(op).name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return fbiedge::definition(op).inputs.size(); };
    GetInputType = [](const OrtCustomOp* op, size_t index) { return fbiedge::definition(op).inputs[index].type; };
    GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
        return fbiedge::definition(op).inputs[index].optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp* op) { return fbiedge::definition(op).outputs.size(); };
    GetOutputType = [](const OrtCustomOp* op, size_t index) { return fbiedge::definition(op).outputs[index]; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
        *kernel = nullptr;
        return guarded(*self(op).environment.api, [&] { create_kernel(self(op), info, kernel); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
        const Kernel& this_kernel = *static_cast<const Kernel*>(kernel);
        return guarded(this_kernel.api, [&] { this_kernel.kernel->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    if (!infers_shapes) return;
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
        const OrtApi& api = *self(op).environment.api;
        return guarded(api, [&] { fbiedge::definition(op).infer_shapes(api, context); });
    };
}

}  // namespace fbiedge
