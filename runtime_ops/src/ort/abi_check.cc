// Compares our declaration with the official header. Only built when ONNXRUNTIME_INCLUDE_DIR is given.

#include <onnxruntime_c_api.h>

#include "abi.h"

#define SAME_SLOT(name)                                                                                   \
    static_assert(offsetof(fbiedge_ort_abi::OrtApi, name) == offsetof(::OrtApi, name), "OrtApi: " #name); \
    static_assert(sizeof(fbiedge_ort_abi::OrtApi::name) == sizeof(::OrtApi::name), "OrtApi: " #name)
#define SAME_CALLBACK(name) \
    static_assert(offsetof(fbiedge_ort_abi::OrtCustomOp, name) == offsetof(::OrtCustomOp, name), #name)
#define SAME_VALUE(name) static_assert(int(fbiedge_ort_abi::name) == int(::name), #name)

SAME_SLOT(CreateStatus);
SAME_SLOT(GetErrorMessage);
SAME_SLOT(CreateEnv);
SAME_SLOT(CreateSession);
SAME_SLOT(CreateSessionOptions);
SAME_SLOT(SetSessionLogSeverityLevel);
SAME_SLOT(SetIntraOpNumThreads);
SAME_SLOT(CreateCustomOpDomain);
SAME_SLOT(CustomOpDomain_Add);
SAME_SLOT(AddCustomOpDomain);
SAME_SLOT(SessionGetInputCount);
SAME_SLOT(SessionGetOutputCount);
SAME_SLOT(SessionGetOverridableInitializerCount);
SAME_SLOT(SessionGetInputTypeInfo);
SAME_SLOT(SessionGetOutputTypeInfo);
SAME_SLOT(SessionGetInputName);
SAME_SLOT(SessionGetOutputName);
SAME_SLOT(SessionGetOverridableInitializerName);
SAME_SLOT(CreateTensorWithDataAsOrtValue);
SAME_SLOT(GetTensorMutableData);
SAME_SLOT(CastTypeInfoToTensorInfo);
SAME_SLOT(CreateTensorTypeAndShapeInfo);
SAME_SLOT(SetTensorElementType);
SAME_SLOT(SetDimensions);
SAME_SLOT(GetTensorElementType);
SAME_SLOT(GetDimensionsCount);
SAME_SLOT(GetDimensions);
SAME_SLOT(GetSymbolicDimensions);
SAME_SLOT(GetTensorTypeAndShape);
SAME_SLOT(CreateCpuMemoryInfo);
SAME_SLOT(AllocatorFree);
SAME_SLOT(GetAllocatorWithDefaultOptions);
SAME_SLOT(KernelInfoGetAttribute_float);
SAME_SLOT(KernelInfoGetAttribute_int64);
SAME_SLOT(KernelInfoGetAttribute_string);
SAME_SLOT(KernelContext_GetInput);
SAME_SLOT(KernelContext_GetOutput);
SAME_SLOT(ReleaseEnv);
SAME_SLOT(ReleaseStatus);
SAME_SLOT(ReleaseMemoryInfo);
SAME_SLOT(ReleaseSession);
SAME_SLOT(ReleaseValue);
SAME_SLOT(ReleaseTypeInfo);
SAME_SLOT(ReleaseTensorTypeAndShapeInfo);
SAME_SLOT(ReleaseSessionOptions);
SAME_SLOT(SessionGetModelMetadata);
SAME_SLOT(ModelMetadataLookupCustomMetadataMap);
SAME_SLOT(ReleaseModelMetadata);
SAME_SLOT(AddSessionConfigEntry);
SAME_SLOT(RunWithBinding);
SAME_SLOT(CreateIoBinding);
SAME_SLOT(ReleaseIoBinding);
SAME_SLOT(BindInput);
SAME_SLOT(BindOutput);
SAME_SLOT(RegisterCustomOpsLibrary_V2);
SAME_SLOT(RegisterCustomOpsUsingFunction);
SAME_SLOT(KernelInfo_GetInputCount);
SAME_SLOT(KernelInfo_GetInputName);
SAME_SLOT(HasSessionConfigEntry);
SAME_SLOT(GetSessionConfigEntry);
SAME_SLOT(KernelInfo_GetNodeName);
SAME_SLOT(KernelInfoGetConstantInput_tensor);
SAME_SLOT(ShapeInferContext_GetInputTypeShape);
SAME_SLOT(ShapeInferContext_GetAttribute);
SAME_SLOT(ShapeInferContext_SetOutputTypeShape);
SAME_SLOT(SetSymbolicDimensions);
SAME_SLOT(ReadOpAttr);
SAME_SLOT(KernelContext_ParallelFor);
#if ORT_API_VERSION >= 24
SAME_SLOT(GetTensorElementTypeAndShapeDataReference);
#endif

SAME_CALLBACK(version);
SAME_CALLBACK(CreateKernel);
SAME_CALLBACK(GetName);
SAME_CALLBACK(GetExecutionProviderType);
SAME_CALLBACK(GetInputType);
SAME_CALLBACK(GetInputTypeCount);
SAME_CALLBACK(GetOutputType);
SAME_CALLBACK(GetOutputTypeCount);
SAME_CALLBACK(KernelCompute);
SAME_CALLBACK(KernelDestroy);
SAME_CALLBACK(GetInputCharacteristic);
SAME_CALLBACK(GetOutputCharacteristic);
SAME_CALLBACK(GetInputMemoryType);
SAME_CALLBACK(GetVariadicInputMinArity);
SAME_CALLBACK(GetVariadicInputHomogeneity);
SAME_CALLBACK(GetVariadicOutputMinArity);
SAME_CALLBACK(GetVariadicOutputHomogeneity);
SAME_CALLBACK(CreateKernelV2);
SAME_CALLBACK(KernelComputeV2);
SAME_CALLBACK(InferOutputShapeFn);
SAME_CALLBACK(GetStartVersion);
SAME_CALLBACK(GetEndVersion);
SAME_CALLBACK(GetMayInplace);
SAME_CALLBACK(ReleaseMayInplace);
SAME_CALLBACK(GetAliasMap);
SAME_CALLBACK(ReleaseAliasMap);
static_assert(sizeof(fbiedge_ort_abi::OrtCustomOp) <= sizeof(::OrtCustomOp), "OrtCustomOp: size");
static_assert(sizeof(void*) != 8 || sizeof(fbiedge_ort_abi::OrtCustomOp) == 208, "OrtCustomOp: size");

SAME_VALUE(ORT_FAIL);
SAME_VALUE(ORT_INVALID_ARGUMENT);
SAME_VALUE(ORT_RUNTIME_EXCEPTION);
SAME_VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
SAME_VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
SAME_VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8);
SAME_VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
SAME_VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
SAME_VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
SAME_VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
SAME_VALUE(ORT_OP_ATTR_INT);
SAME_VALUE(ORT_LOGGING_LEVEL_ERROR);
SAME_VALUE(ORT_LOGGING_LEVEL_FATAL);
SAME_VALUE(OrtDeviceAllocator);
SAME_VALUE(OrtArenaAllocator);
SAME_VALUE(OrtMemTypeDefault);
SAME_VALUE(INPUT_OUTPUT_REQUIRED);
SAME_VALUE(INPUT_OUTPUT_OPTIONAL);
