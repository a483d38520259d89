// The contract between the kernels and everything else: plain structs and function pointers, no ORT, no C++ library.
//
// A kernel works in two steps, at either accuracy level:
//   prepare   one token's K inputs -> a buffer the kernel likes (quantised inputs, or lookup tables)
//   multiply  M prepared tokens x whole N tiles -> outputs, scales applied
// so what depends on the token alone is done once and not once per N tile.
//
// Kernel files are compiled with instructions that the machine may lack. Everything inline here is `static`: an inline
// function with external linkage, compiled there with AVX-512, could be the copy that the linker keeps for all.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// For the small functions of inner loops: a call would put the registers that they share into memory.
#if defined(_MSC_VER)
#define FBIEDGE_ALWAYS_INLINE static __forceinline
#else
#define FBIEDGE_ALWAYS_INLINE static inline __attribute__((always_inline))
#endif

namespace fbiedge {

constexpr size_t kTileRows = 16;
constexpr size_t kTileInputs = 32;
constexpr size_t kTileBytes = kTileRows * kTileInputs / 8;
constexpr size_t kGroupInputs = 128;  // inputs that share one int8 scale of a token, or one block scale of a row
constexpr size_t kGroupTiles = kGroupInputs / kTileInputs;
constexpr size_t kMaxTokens = 128;  // most tokens of one multiply call
constexpr size_t kAlignment = 64;   // bytes, of prepared tokens

struct TokenInput {
    const float* x;      // [K]
    const float* alpha;  // [K], multiplies x (column form), or null
    const float* beta;   // [K], the offset sum is sum(beta * x) (column form); null: sum(x)
    size_t k;
    float multiplier = 1.0f;  // of the token: every scaled input and the offset sum, 1 / RMS of a fused norm
};

struct MultiplyArgs {
    const uint8_t* tiles;  // [n_tiles, k_tiles, 64], first tile to compute
    size_t n_tiles;
    size_t k_tiles;
    size_t k;
    const uint8_t* tokens;  // m prepared tokens
    size_t token_stride_in_bytes;
    size_t m;                  // 1..kMaxTokens
    const float* row_alpha;    // [n_tiles * 16] with step 16, or 16 values with step 0, or null
    const float* row_beta;     // likewise; y += row_beta * offset sum
    size_t row_step;           // 16: one value a row; 0: `single`, the same 16 for every tile
    bool add_offset_sum;       // column form with beta: y += offset sum
    const void* block_scales;  // [n_tiles, groups, 16] fp16 or fp32, or null
    bool block_scales_fp16;
    const float* bias;   // [n_tiles * 16], of token t at bias + t * bias_stride, or null
    size_t bias_stride;  // in floats: 0 for one bias of all tokens, more for a residual
    float* y;            // [m, n_tiles * 16] with a row stride
    size_t y_stride;     // in floats
};

struct LevelKernels {
    size_t (*token_bytes)(size_t k);  // size of a prepared token, a multiple of kAlignment
    void (*prepare)(const TokenInput& in, uint8_t* token);
    void (*multiply)(const MultiplyArgs& args);
};

struct BinaryKernels {
    LevelKernels fp32;
    LevelKernels int8;
};

extern const BinaryKernels kBinaryScalar;
extern const BinaryKernels kBinaryAvx2;
extern const BinaryKernels kBinaryAvx512Vnni;
extern const BinaryKernels kBinaryAvx512Vbmi;
extern const BinaryKernels kBinaryNeon;
extern const BinaryKernels kBinaryNeonDotprod;
extern const BinaryKernels kBinaryNeonI8mm;

struct ActivationKernels;  // activation_kernels.h
struct AttentionKernels;   // attention_kernels.h
struct NBitsKernels;       // matmul_nbits_kernels.h

// All kernels of one instruction set (kernels/tables.cc).
struct KernelTable {
    const char* isa;
    const BinaryKernels* binary;
    const ActivationKernels* activations;
    const AttentionKernels* attention;
    const NBitsKernels* nbits;
};

static inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
static inline size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
// How far ahead of tiles computed side by side, which are `bytes` long, to prefetch: whole such steps, but not so near
// that memory is late (130M shapes: 3 KB ahead 60 % of reading, 8 KB ahead 85 %).
static inline size_t prefetch_distance(size_t bytes) { return ceil_div(8 * 1024, bytes) * bytes; }
static inline size_t align_up(size_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

// A prepared token starts with its offset sum, in a cache line of its own; the rest is the kernel's.
constexpr size_t kTokenHeaderBytes = 64;
static inline float* offset_sum(uint8_t* token) { return reinterpret_cast<float*>(token); }
static inline const float* offset_sum(const uint8_t* token) { return reinterpret_cast<const float*>(token); }

// int8 level, of every kernel that multiplies (those that look sums up have their own): header, scale[groups], sum of
// q[groups], q (128 a group, permuted by the kernel).
struct Int8Layout {
    size_t groups;
    size_t scales_at;
    size_t sums_at;
    size_t q_at;
    size_t bytes;
};

static inline Int8Layout int8_layout(size_t k) {
    Int8Layout layout;
    layout.groups = ceil_div(k, kGroupInputs);
    layout.scales_at = kTokenHeaderBytes;
    layout.sums_at = layout.scales_at + layout.groups * sizeof(float);
    layout.q_at = align_up(layout.sums_at + layout.groups * sizeof(int32_t));
    layout.bytes = layout.q_at + layout.groups * kGroupInputs;
    return layout;
}

static inline size_t int8_token_bytes(size_t k) { return int8_layout(k).bytes; }

// The scale of a group from the largest bit pattern of |x| in it. Bit patterns, because a float maximum treats NaN
// differently on each ISA, and as integers NaN > infinity > every finite value. A group that holds one gets the scale
// NaN, so its outputs are NaN; a group too small for a normal scale gets 0 (so flush-to-zero modes change nothing).
static inline float group_scale(uint32_t peak_bits) {
    const uint32_t nan_bits = 0x7fc00000u, infinity_bits = 0x7f800000u;
    const float smallest_normal = 1.17549435e-38f;
    float peak;
    if (peak_bits >= infinity_bits) peak_bits = nan_bits;
    memcpy(&peak, &peak_bits, sizeof peak);
    const float scale = peak / 127.0f;
    return scale < smallest_normal ? 0.0f : scale;
}
static inline bool scale_is_usable(float scale) { return scale > 0.0f; }  // false for 0 and NaN: q is 0 then

// The inputs of one group, padded with zeros to 128 when the token ends inside it.
struct GroupInput {
    const float* x;
    const float* alpha;
    const float* beta;
};
struct GroupPadding {
    float x[kGroupInputs], alpha[kGroupInputs], beta[kGroupInputs];
};

static inline GroupInput group_input(const TokenInput& in, size_t first, GroupPadding& padding) {
    const size_t count = min_size(in.k - first, kGroupInputs);
    if (count == kGroupInputs) {
        return {in.x + first, in.alpha ? in.alpha + first : nullptr, in.beta ? in.beta + first : nullptr};
    }
    memset(&padding, 0, sizeof padding);
    memcpy(padding.x, in.x + first, count * sizeof(float));
    if (in.alpha) memcpy(padding.alpha, in.alpha + first, count * sizeof(float));
    if (in.beta) memcpy(padding.beta, in.beta + first, count * sizeof(float));
    return {padding.x, in.alpha ? padding.alpha : nullptr, in.beta ? padding.beta : nullptr};
}

}  // namespace fbiedge
