/* C API of the fbiedge op library: the operator BinaryMatMul without ONNX Runtime, and what the library can run here.
 *
 * Every function may be called from any thread. None prints, aborts or throws. Sizes are counts of elements unless the
 * name says bytes. The operator is defined in SPECIFICATION.md.
 */
#ifndef FBIEDGE_OPS_H
#define FBIEDGE_OPS_H

#include <stddef.h>
#include <stdint.h>

/* The version of this header; fbiedge_version() tells that of the library. */
#define FBIEDGE_VERSION "0.1.0"
#define FBIEDGE_VERSION_MAJOR 0
#define FBIEDGE_VERSION_MINOR 1
#define FBIEDGE_VERSION_PATCH 0

#if !defined(FBIEDGE_OPS_BUILD)
#define FBIEDGE_EXPORT /* whoever uses the library, shared or static, needs no more than the declaration */
#elif defined(_WIN32)
#define FBIEDGE_EXPORT __declspec(dllexport)
#else
#define FBIEDGE_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum fbiedge_status {
    FBIEDGE_OK = 0,
    FBIEDGE_NULL_POINTER = 1,    /* a pointer that must be given is null */
    FBIEDGE_BAD_SIZE = 2,        /* K or N is 0 or above 2^31 - 1, or a buffer is too small */
    FBIEDGE_BAD_SCALES = 3,      /* unknown scale form, or offsets given in block form */
    FBIEDGE_BAD_ACCURACY = 4,    /* accuracy level other than 0, 1, 4 */
    FBIEDGE_UNKNOWN_ISA = 5,     /* no kernel of that name in any build */
    FBIEDGE_UNAVAILABLE_ISA = 6, /* a kernel that this build or machine can't run */
    FBIEDGE_OUT_OF_MEMORY = 7
} fbiedge_status;

typedef enum fbiedge_scale_form {
    FBIEDGE_COLUMN = 0, /* alpha, beta [K]: one pair an input */
    FBIEDGE_ROW = 1,    /* alpha, beta [N]: one pair an output */
    FBIEDGE_SINGLE = 2, /* alpha, beta [1] */
    FBIEDGE_BLOCK = 3   /* scales [ceil(N/16), ceil(K/128), 16], no offsets */
} fbiedge_scale_form;

/* Same numbers as accuracy_level of ONNX Runtime's MatMulNBits. */
typedef enum fbiedge_accuracy_level {
    FBIEDGE_DEFAULT = 0, /* int8 */
    FBIEDGE_FP32 = 1,    /* float32 activations */
    FBIEDGE_INT8 = 4     /* int8 activations, one scale a token and 128 inputs */
} fbiedge_accuracy_level;

typedef struct fbiedge_matmul_args {
    size_t struct_bytes; /* sizeof(fbiedge_matmul_args): later versions append fields */
    const char* isa;     /* kernel to use; null: FBIEDGE_ISA if set, else the best */
    int accuracy_level;  /* fbiedge_accuracy_level */
    int scale_form;      /* fbiedge_scale_form */
    int scales_are_fp16; /* block form only: scales are IEEE binary16 */
    size_t m;            /* tokens; 0 is allowed */
    size_t n;            /* outputs */
    size_t k;            /* inputs */
    const float* a;      /* [m, k] */
    const uint8_t* b;    /* [ceil(n/16), ceil(k/32), 64] */
    const void* scales;
    const float* offsets; /* null: none */
    const float* bias;    /* [n]; null: none */
    float* y;             /* [m, n] */
} fbiedge_matmul_args;

/* Version of the library, such as "0.1.0". */
FBIEDGE_EXPORT const char* fbiedge_version(void);

/* One line of English for a status code; never null. */
FBIEDGE_EXPORT const char* fbiedge_status_message(int status);

/* Kernels that this machine can run, best first; the last is always "scalar". Null when index is out of range. */
FBIEDGE_EXPORT int fbiedge_isa_count(void);
FBIEDGE_EXPORT const char* fbiedge_isa_name(int index);

/* The kernel used now: the one that the environment variable FBIEDGE_ISA names, else the best.
 * Null when FBIEDGE_ISA names a kernel that is unknown or can't run here. */
FBIEDGE_EXPORT const char* fbiedge_active_isa(void);

/* Bytes of the packed form of an [n, k] matrix; 0 when a size is bad. */
FBIEDGE_EXPORT size_t fbiedge_packed_bytes(size_t n, size_t k);

/* Packs the signs of weight [n, k] (>= 0 is +1; NaN is -1) into tiles [ceil(n/16), ceil(k/32), 64]. */
FBIEDGE_EXPORT int fbiedge_pack(const float* weight, size_t n, size_t k, uint8_t* tiles, size_t tiles_bytes);

/* y = a * W_eff^T + bias, on the calling thread. */
FBIEDGE_EXPORT int fbiedge_matmul(const fbiedge_matmul_args* args);

#ifdef __cplusplus
}
#endif

#endif /* FBIEDGE_OPS_H */
