/* The entry point that adds the op library's operators to the options of an ONNX Runtime session, for programs that
 * link the library. To load it from a file, give its path to RegisterCustomOpsLibrary_V2 instead, and this header isn't
 * needed.
 *
 *   OrtStatus* status = FBIEDGE_REGISTER_FUNCTION(options, OrtGetApiBase());
 *
 * The types are those of onnxruntime_c_api.h, which may be included before or after. ONNX Runtime 1.18 or later.
 */
#ifndef FBIEDGE_REGISTER_H
#define FBIEDGE_REGISTER_H

/* As the library was built; fbiedge_ops::fbiedge_ops and pkg-config define it. */
#ifndef FBIEDGE_REGISTER_FUNCTION
#define FBIEDGE_REGISTER_FUNCTION RegisterCustomOps
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct OrtApiBase;
struct OrtSessionOptions;
struct OrtStatus;

/* Null, or why the operators can't be added; the caller releases it (OrtApi.ReleaseStatus). */
#if defined(_WIN32)
struct OrtStatus* __stdcall FBIEDGE_REGISTER_FUNCTION(struct OrtSessionOptions* options, const struct OrtApiBase* api);
#else
struct OrtStatus* FBIEDGE_REGISTER_FUNCTION(struct OrtSessionOptions* options, const struct OrtApiBase* api);
#endif

#ifdef __cplusplus
}
#endif

#endif /* FBIEDGE_REGISTER_H */
