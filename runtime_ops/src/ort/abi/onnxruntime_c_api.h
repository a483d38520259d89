/* A stand-in for ONNX Runtime's onnxruntime_c_api.h: what the op library and the examples use of its C ABI, under the
 * same names, because neither the Python wheel nor the npm package ships that header. Where there is the official one,
 * it is taken instead (-DONNXRUNTIME_INCLUDE_DIR=DIR), and abi_check.cc compares the two.
 *
 * OrtApi is an append-only table of function pointers and OrtCustomOp only grows at its end, so the positions hold for
 * every ONNX Runtime that offers API 18 (1.18 and later), and to the end of OrtApi where it offers API 24.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef ORT_API_CALL
#if defined(_WIN32)
#define ORT_API_CALL __stdcall
#define ORTCHAR_T wchar_t
#else
#define ORT_API_CALL
#define ORTCHAR_T char
#endif
#endif

/* `struct Name;` alone makes a new type in abi.h's namespace, even where there is a global one of that name. */
#define FBIEDGE_ORT_CLASS(name) \
    struct name;                \
    typedef struct name name
FBIEDGE_ORT_CLASS(OrtEnv);
FBIEDGE_ORT_CLASS(OrtStatus);
FBIEDGE_ORT_CLASS(OrtSession);
FBIEDGE_ORT_CLASS(OrtSessionOptions);
FBIEDGE_ORT_CLASS(OrtIoBinding);
FBIEDGE_ORT_CLASS(OrtValue);
FBIEDGE_ORT_CLASS(OrtMemoryInfo);
FBIEDGE_ORT_CLASS(OrtRunOptions);
FBIEDGE_ORT_CLASS(OrtTypeInfo);
FBIEDGE_ORT_CLASS(OrtTensorTypeAndShapeInfo);
FBIEDGE_ORT_CLASS(OrtModelMetadata);
FBIEDGE_ORT_CLASS(OrtCustomOpDomain);
FBIEDGE_ORT_CLASS(OrtKernelInfo);
FBIEDGE_ORT_CLASS(OrtKernelContext);
FBIEDGE_ORT_CLASS(OrtShapeInferContext);
FBIEDGE_ORT_CLASS(OrtOpAttr);
FBIEDGE_ORT_CLASS(OrtAllocator);
FBIEDGE_ORT_CLASS(OrtCustomOp);
#undef FBIEDGE_ORT_CLASS

typedef enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_RUNTIME_EXCEPTION = 6 } OrtErrorCode;
typedef enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3, ORT_LOGGING_LEVEL_FATAL = 4 } OrtLoggingLevel;
typedef enum OrtAllocatorType { OrtDeviceAllocator = 0, OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum OrtMemType { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum OrtOpAttrType { ORT_OP_ATTR_INT = 1 } OrtOpAttrType;
typedef enum OrtCustomOpInputOutputCharacteristic {
    INPUT_OUTPUT_REQUIRED = 0,
    INPUT_OUTPUT_OPTIONAL = 1
} OrtCustomOpInputOutputCharacteristic;
typedef enum ONNXTensorElementDataType {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0, /* as an input's declared type: any */
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10
} ONNXTensorElementDataType;

typedef struct OrtApi {
    OrtStatus*(ORT_API_CALL* CreateStatus)(OrtErrorCode code, const char* message);
    void* slots_1_to_1[1];
    const char*(ORT_API_CALL* GetErrorMessage)(const OrtStatus* status);
    OrtStatus*(ORT_API_CALL* CreateEnv)(OrtLoggingLevel level, const char* name, OrtEnv** out);
    void* slots_4_to_6[3];
    OrtStatus*(ORT_API_CALL* CreateSession)(const OrtEnv* env, const ORTCHAR_T* path, const OrtSessionOptions* options,
                                            OrtSession** out);
    void* slots_8_to_9[2];
    OrtStatus*(ORT_API_CALL* CreateSessionOptions)(OrtSessionOptions** out);
    void* slots_11_to_21[11];
    OrtStatus*(ORT_API_CALL* SetSessionLogSeverityLevel)(OrtSessionOptions* options, int level);
    void* slots_23_to_23[1];
    OrtStatus*(ORT_API_CALL* SetIntraOpNumThreads)(OrtSessionOptions* options, int threads);
    void* slots_25_to_25[1];
    OrtStatus*(ORT_API_CALL* CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);
    OrtStatus*(ORT_API_CALL* CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
    OrtStatus*(ORT_API_CALL* AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
    void* slots_29_to_29[1];
    OrtStatus*(ORT_API_CALL* SessionGetInputCount)(const OrtSession* session, size_t* out);
    OrtStatus*(ORT_API_CALL* SessionGetOutputCount)(const OrtSession* session, size_t* out);
    OrtStatus*(ORT_API_CALL* SessionGetOverridableInitializerCount)(const OrtSession* session, size_t* out);
    OrtStatus*(ORT_API_CALL* SessionGetInputTypeInfo)(const OrtSession* session, size_t index, OrtTypeInfo** out);
    OrtStatus*(ORT_API_CALL* SessionGetOutputTypeInfo)(const OrtSession* session, size_t index, OrtTypeInfo** out);
    void* slots_35_to_35[1];
    OrtStatus*(ORT_API_CALL* SessionGetInputName)(const OrtSession* session, size_t index, OrtAllocator* allocator,
                                                  char** out);
    OrtStatus*(ORT_API_CALL* SessionGetOutputName)(const OrtSession* session, size_t index, OrtAllocator* allocator,
                                                   char** out);
    OrtStatus*(ORT_API_CALL* SessionGetOverridableInitializerName)(const OrtSession* session, size_t index,
                                                                   OrtAllocator* allocator, char** out);
    void* slots_39_to_48[10];
    OrtStatus*(ORT_API_CALL* CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo* memory, void* data, size_t bytes,
                                                             const int64_t* dims, size_t count,
                                                             ONNXTensorElementDataType type, OrtValue** out);
    void* slots_50_to_50[1];
    OrtStatus*(ORT_API_CALL* GetTensorMutableData)(OrtValue* value, void** out);
    void* slots_52_to_54[3];
    OrtStatus*(ORT_API_CALL* CastTypeInfoToTensorInfo)(const OrtTypeInfo* info, const OrtTensorTypeAndShapeInfo** out);
    void* slots_56_to_56[1];
    OrtStatus*(ORT_API_CALL* CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo** out);
    OrtStatus*(ORT_API_CALL* SetTensorElementType)(OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType type);
    OrtStatus*(ORT_API_CALL* SetDimensions)(OrtTensorTypeAndShapeInfo* info, const int64_t* dims, size_t count);
    OrtStatus*(ORT_API_CALL* GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info,
                                                   ONNXTensorElementDataType* out);
    OrtStatus*(ORT_API_CALL* GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
    OrtStatus*(ORT_API_CALL* GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count);
    OrtStatus*(ORT_API_CALL* GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo* info, const char** names,
                                                    size_t count);
    void* slots_64_to_64[1];
    OrtStatus*(ORT_API_CALL* GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);
    void* slots_66_to_68[3];
    OrtStatus*(ORT_API_CALL* CreateCpuMemoryInfo)(enum OrtAllocatorType type, enum OrtMemType memory,
                                                  OrtMemoryInfo** out);
    void* slots_70_to_75[6];
    OrtStatus*(ORT_API_CALL* AllocatorFree)(OrtAllocator* allocator, void* data);
    void* slots_77_to_77[1];
    OrtStatus*(ORT_API_CALL* GetAllocatorWithDefaultOptions)(OrtAllocator** out);
    void* slots_79_to_84[6];
    OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* out);
    OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* out);
    OrtStatus*(ORT_API_CALL* KernelInfoGetAttribute_string)(const OrtKernelInfo* info, const char* name, char* out,
                                                            size_t* size);
    void* slots_88_to_89[2];
    OrtStatus*(ORT_API_CALL* KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                                     const OrtValue** out);
    OrtStatus*(ORT_API_CALL* KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dims,
                                                      size_t count, OrtValue** out);
    void(ORT_API_CALL* ReleaseEnv)(OrtEnv* env);
    void(ORT_API_CALL* ReleaseStatus)(OrtStatus* status);
    void(ORT_API_CALL* ReleaseMemoryInfo)(OrtMemoryInfo* info);
    void(ORT_API_CALL* ReleaseSession)(OrtSession* session);
    void(ORT_API_CALL* ReleaseValue)(OrtValue* value);
    void* slots_97_to_97[1];
    void(ORT_API_CALL* ReleaseTypeInfo)(OrtTypeInfo* info);
    void(ORT_API_CALL* ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
    void(ORT_API_CALL* ReleaseSessionOptions)(OrtSessionOptions* options);
    void* slots_101_to_110[10];
    OrtStatus*(ORT_API_CALL* SessionGetModelMetadata)(const OrtSession* session, OrtModelMetadata** out);
    void* slots_112_to_115[4];
    OrtStatus*(ORT_API_CALL* ModelMetadataLookupCustomMetadataMap)(const OrtModelMetadata* metadata,
                                                                   OrtAllocator* allocator, const char* key,
                                                                   char** out);
    void* slots_117_to_117[1];
    void(ORT_API_CALL* ReleaseModelMetadata)(OrtModelMetadata* metadata);
    void* slots_119_to_129[11];
    OrtStatus*(ORT_API_CALL* AddSessionConfigEntry)(OrtSessionOptions* options, const char* key, const char* value);
    void* slots_131_to_132[2];
    OrtStatus*(ORT_API_CALL* RunWithBinding)(OrtSession* session, const OrtRunOptions* options,
                                             const OrtIoBinding* binding);
    OrtStatus*(ORT_API_CALL* CreateIoBinding)(OrtSession* session, OrtIoBinding** out);
    void(ORT_API_CALL* ReleaseIoBinding)(OrtIoBinding* binding);
    OrtStatus*(ORT_API_CALL* BindInput)(OrtIoBinding* binding, const char* name, const OrtValue* value);
    OrtStatus*(ORT_API_CALL* BindOutput)(OrtIoBinding* binding, const char* name, const OrtValue* value);
    void* slots_138_to_227[90];
    OrtStatus*(ORT_API_CALL* RegisterCustomOpsLibrary_V2)(OrtSessionOptions* options, const ORTCHAR_T* path);
    OrtStatus*(ORT_API_CALL* RegisterCustomOpsUsingFunction)(OrtSessionOptions* options, const char* name);
    OrtStatus*(ORT_API_CALL* KernelInfo_GetInputCount)(const OrtKernelInfo* info, size_t* out);
    void* slots_231_to_231[1];
    OrtStatus*(ORT_API_CALL* KernelInfo_GetInputName)(const OrtKernelInfo* info, size_t index, char* out, size_t* size);
    void* slots_233_to_236[4];
    OrtStatus*(ORT_API_CALL* HasSessionConfigEntry)(const OrtSessionOptions* options, const char* key, int* out);
    OrtStatus*(ORT_API_CALL* GetSessionConfigEntry)(const OrtSessionOptions* options, const char* key, char* out,
                                                    size_t* size);
    void* slots_239_to_243[5];
    OrtStatus*(ORT_API_CALL* KernelInfo_GetNodeName)(const OrtKernelInfo* info, char* out, size_t* size);
    void* slots_245_to_248[4];
    OrtStatus*(ORT_API_CALL* KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index,
                                                                int* is_constant, const OrtValue** out);
    void* slots_250_to_267[18];
    OrtStatus*(ORT_API_CALL* ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                                  OrtTensorTypeAndShapeInfo** out);
    OrtStatus*(ORT_API_CALL* ShapeInferContext_GetAttribute)(const OrtShapeInferContext* context, const char* name,
                                                             const OrtOpAttr** out);
    OrtStatus*(ORT_API_CALL* ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext* context, size_t index,
                                                                   const OrtTensorTypeAndShapeInfo* info);
    OrtStatus*(ORT_API_CALL* SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo* info, const char** names, size_t count);
    OrtStatus*(ORT_API_CALL* ReadOpAttr)(const OrtOpAttr* attribute, OrtOpAttrType type, void* data, size_t bytes,
                                         size_t* out);
    void* slots_273_to_273[1];
    OrtStatus*(ORT_API_CALL* KernelContext_ParallelFor)(const OrtKernelContext* context, void (*fn)(void*, size_t),
                                                        size_t total, size_t num_batch, void* data);
    /* From here on API 24 (ONNX Runtime 1.24). */
    void* slots_275_to_413[139];
    OrtStatus*(ORT_API_CALL* GetTensorElementTypeAndShapeDataReference)(const OrtValue* value,
                                                                        ONNXTensorElementDataType* type,
                                                                        const int64_t** dims, size_t* rank);
} OrtApi;

typedef struct OrtApiBase {
    const OrtApi*(ORT_API_CALL* GetApi)(uint32_t version);
    const char*(ORT_API_CALL* GetVersionString)(void);
} OrtApiBase;

/* As of version 18: 208 bytes on 64-bit machines. Callbacks left null are not used by ONNX Runtime. */
struct OrtCustomOp {
    uint32_t version;
    void*(ORT_API_CALL* CreateKernel)(const struct OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char*(ORT_API_CALL* GetName)(const struct OrtCustomOp*);
    const char*(ORT_API_CALL* GetExecutionProviderType)(const struct OrtCustomOp*);
    ONNXTensorElementDataType(ORT_API_CALL* GetInputType)(const struct OrtCustomOp*, size_t index);
    size_t(ORT_API_CALL* GetInputTypeCount)(const struct OrtCustomOp*);
    ONNXTensorElementDataType(ORT_API_CALL* GetOutputType)(const struct OrtCustomOp*, size_t index);
    size_t(ORT_API_CALL* GetOutputTypeCount)(const struct OrtCustomOp*);
    void(ORT_API_CALL* KernelCompute)(void* kernel, OrtKernelContext*);
    void(ORT_API_CALL* KernelDestroy)(void* kernel);
    OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetInputCharacteristic)(const struct OrtCustomOp*, size_t index);
    OrtCustomOpInputOutputCharacteristic(ORT_API_CALL* GetOutputCharacteristic)(const struct OrtCustomOp*,
                                                                                size_t index);
    OrtMemType(ORT_API_CALL* GetInputMemoryType)(const struct OrtCustomOp*, size_t index);
    int(ORT_API_CALL* GetVariadicInputMinArity)(const struct OrtCustomOp*);
    int(ORT_API_CALL* GetVariadicInputHomogeneity)(const struct OrtCustomOp*);
    int(ORT_API_CALL* GetVariadicOutputMinArity)(const struct OrtCustomOp*);
    int(ORT_API_CALL* GetVariadicOutputHomogeneity)(const struct OrtCustomOp*);
    OrtStatus*(ORT_API_CALL* CreateKernelV2)(const struct OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                                             void** kernel);
    OrtStatus*(ORT_API_CALL* KernelComputeV2)(void* kernel, OrtKernelContext*);
    OrtStatus*(ORT_API_CALL* InferOutputShapeFn)(const struct OrtCustomOp*, OrtShapeInferContext*);
    int(ORT_API_CALL* GetStartVersion)(const struct OrtCustomOp*);
    int(ORT_API_CALL* GetEndVersion)(const struct OrtCustomOp*);
    size_t(ORT_API_CALL* GetMayInplace)(int** input_index, int** output_index);
    void(ORT_API_CALL* ReleaseMayInplace)(int* input_index, int* output_index);
    size_t(ORT_API_CALL* GetAliasMap)(int** input_index, int** output_index);
    void(ORT_API_CALL* ReleaseAliasMap)(int* input_index, int* output_index);
};

/* The op library never calls it (ONNX Runtime hands it the table), and so needs no ONNX Runtime to link with. */
#ifndef FBIEDGE_ORT_WITHOUT_ENTRY
#ifdef __cplusplus
extern "C" {
#endif
const OrtApiBase* ORT_API_CALL OrtGetApiBase(void);
#ifdef __cplusplus
}
#endif
#endif
