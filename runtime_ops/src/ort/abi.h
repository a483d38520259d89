// What the glue uses of ONNX Runtime's C ABI, declared here because neither the Python wheel nor the npm package ships
// the C headers. The names are those of onnxruntime_c_api.h, so that the glue compiles with either.
//
// OrtApi is an append-only table of function pointers and OrtCustomOp only grows at its end, so the positions hold for
// every ONNX Runtime that offers API 18 (1.18 and later). abi_check.cc compares them with the official header.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define FBIEDGE_ORT_CALL __stdcall
#else
#define FBIEDGE_ORT_CALL
#endif

namespace fbiedge_ort_abi {

struct OrtStatus;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtCustomOp;

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_RUNTIME_EXCEPTION = 6 };

enum ONNXTensorElementDataType {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,  // as an input's declared type: any
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10
};

enum OrtOpAttrType { ORT_OP_ATTR_INT = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum OrtCustomOpInputOutputCharacteristic { INPUT_OUTPUT_REQUIRED = 0, INPUT_OUTPUT_OPTIONAL = 1 };

struct OrtApi {
    OrtStatus*(FBIEDGE_ORT_CALL* CreateStatus)(OrtErrorCode code, const char* message);
    void* slots_1_to_1[1];
    const char*(FBIEDGE_ORT_CALL* GetErrorMessage)(const OrtStatus* status);
    void* slots_3_to_25[23];
    OrtStatus*(FBIEDGE_ORT_CALL* CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);
    OrtStatus*(FBIEDGE_ORT_CALL* CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
    OrtStatus*(FBIEDGE_ORT_CALL* AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
    void* slots_29_to_50[22];
    OrtStatus*(FBIEDGE_ORT_CALL* GetTensorMutableData)(OrtValue* value, void** out);
    void* slots_52_to_56[5];
    OrtStatus*(FBIEDGE_ORT_CALL* CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo** out);
    OrtStatus*(FBIEDGE_ORT_CALL* SetTensorElementType)(OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType type);
    OrtStatus*(FBIEDGE_ORT_CALL* SetDimensions)(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t count);
    OrtStatus*(FBIEDGE_ORT_CALL* GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info,
                                                       ONNXTensorElementDataType* out);
    OrtStatus*(FBIEDGE_ORT_CALL* GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
    OrtStatus*(FBIEDGE_ORT_CALL* GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count);
    OrtStatus*(FBIEDGE_ORT_CALL* GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo* info, const char** names,
                                                        size_t count);
    void* slots_64_to_64[1];
    OrtStatus*(FBIEDGE_ORT_CALL* GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);
    void* slots_66_to_84[19];
    OrtStatus*(FBIEDGE_ORT_CALL* KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* out);
    OrtStatus*(FBIEDGE_ORT_CALL* KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name,
                                                               int64_t* out);
    OrtStatus*(FBIEDGE_ORT_CALL* KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name, char* out,
                                                                size_t* size);
    void* slots_88_to_89[2];
    OrtStatus*(FBIEDGE_ORT_CALL* KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                                         const OrtValue** out);
    OrtStatus*(FBIEDGE_ORT_CALL* KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dims,
                                                          size_t count, OrtValue** out);
    void* slots_92_to_92[1];
    void(FBIEDGE_ORT_CALL* ReleaseStatus)(OrtStatus* status);
    void* slots_94_to_98[5];
    void(FBIEDGE_ORT_CALL* ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
    void* slots_100_to_229[130];
    OrtStatus*(FBIEDGE_ORT_CALL* KernelInfo_GetInputCount)(const OrtKernelInfo* info, size_t* out);
    void* slots_231_to_231[1];
    OrtStatus*(FBIEDGE_ORT_CALL* KernelInfo_GetInputName)(const OrtKernelInfo* info, size_t index, char* out,
                                                          size_t* size);
    void* slots_233_to_236[4];
    OrtStatus*(FBIEDGE_ORT_CALL* HasSessionConfigEntry)(const OrtSessionOptions* options, const char* key, int* out);
    OrtStatus*(FBIEDGE_ORT_CALL* GetSessionConfigEntry)(const OrtSessionOptions* options, const char* key, char* out,
                                                        size_t* size);
    void* slots_239_to_243[5];
    OrtStatus*(FBIEDGE_ORT_CALL* KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* out, size_t* size);
    void* slots_245_to_248[4];
    OrtStatus*(FBIEDGE_ORT_CALL* KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index,
                                                                    int* is_constant, const OrtValue** out);
    void* slots_250_to_267[18];
    OrtStatus*(FBIEDGE_ORT_CALL* ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                                      OrtTensorTypeAndShapeInfo** out);
    OrtStatus*(FBIEDGE_ORT_CALL* ShapeInferContext_GetAttribute)(const OrtShapeInferContext* context, const char* name,
                                                                 const OrtOpAttr** out);
    OrtStatus*(FBIEDGE_ORT_CALL* ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext* context,
                                                                       size_t index,
                                                                       const OrtTensorTypeAndShapeInfo* info);
    OrtStatus*(FBIEDGE_ORT_CALL* SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo* info, const char** names,
                                                        size_t count);
    OrtStatus*(FBIEDGE_ORT_CALL* ReadOpAttr)(const OrtOpAttr* attribute, OrtOpAttrType type, void* data, size_t bytes,
                                             size_t* out);
    void* slots_273_to_273[1];
    OrtStatus*(FBIEDGE_ORT_CALL* KernelContext_ParallelFor)(const OrtKernelContext* context, void (*fn)(void*, size_t),
                                                            size_t total, size_t num_batch, void* data);
};

struct OrtApiBase {
    const OrtApi*(FBIEDGE_ORT_CALL* GetApi)(uint32_t version);
    const char*(FBIEDGE_ORT_CALL* GetVersionString)();
};

// As of version 18: 208 bytes on 64-bit machines. Callbacks left null are not used by ONNX Runtime.
struct OrtCustomOp {
    uint32_t version;
    void*(FBIEDGE_ORT_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char*(FBIEDGE_ORT_CALL* GetName)(const OrtCustomOp*);
    const char*(FBIEDGE_ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);
    ONNXTensorElementDataType(FBIEDGE_ORT_CALL* GetInputType)(const OrtCustomOp*, size_t index);
    size_t(FBIEDGE_ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
    ONNXTensorElementDataType(FBIEDGE_ORT_CALL* GetOutputType)(const OrtCustomOp*, size_t index);
    size_t(FBIEDGE_ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
    void(FBIEDGE_ORT_CALL* KernelCompute)(void* kernel, OrtKernelContext*);
    void(FBIEDGE_ORT_CALL* KernelDestroy)(void* kernel);
    OrtCustomOpInputOutputCharacteristic(FBIEDGE_ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t index);
    OrtCustomOpInputOutputCharacteristic(FBIEDGE_ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
    OrtMemType(FBIEDGE_ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t index);
    int(FBIEDGE_ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
    int(FBIEDGE_ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int(FBIEDGE_ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
    int(FBIEDGE_ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus*(FBIEDGE_ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                                                 void** kernel);
    OrtStatus*(FBIEDGE_ORT_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);
    OrtStatus*(FBIEDGE_ORT_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int(FBIEDGE_ORT_CALL* GetStartVersion)(const OrtCustomOp*);
    int(FBIEDGE_ORT_CALL* GetEndVersion)(const OrtCustomOp*);
    size_t(FBIEDGE_ORT_CALL* GetMayInplace)(int** input_index, int** output_index);
    void(FBIEDGE_ORT_CALL* ReleaseMayInplace)(int* input_index, int* output_index);
    size_t(FBIEDGE_ORT_CALL* GetAliasMap)(int** input_index, int** output_index);
    void(FBIEDGE_ORT_CALL* ReleaseAliasMap)(int* input_index, int* output_index);
};

}  // namespace fbiedge_ort_abi
