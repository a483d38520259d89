// The contract of the kernels of MatMulNBits (spec/MatMulNBits.md), in two steps as in kernel_table.h:
//   prepare   one token's K inputs -> a buffer in the order in which the tiles are read
//   multiply  M prepared tokens x whole N tiles -> outputs
//
// A tile is 16 rows, a tile group its 128 inputs as stored: the scales of its 4 blocks, fp16 [4][16], then its codes in
// pieces of 4 bytes of 16 rows. Kernels see codes as planes of 64 bytes, whose 32-bit lane r holds the codes of row r
// for 4 inputs: 32 planes a group, one for each 4 bytes of 8-bit codes, and two for each 4 bytes of 4-bit codes, the
// low nibbles (inputs 0, 2, 4, 6 of 8) before the high ones (1, 3, 5, 7). Prepared tokens hold their inputs plane by
// plane.
#pragma once

#include "kernel_table.h"

namespace fbiedge {

constexpr size_t kNBitsBlockInputs = 32;  // inputs that share one scale of a row
constexpr size_t kNBitsGroupBlocks = kGroupInputs / kNBitsBlockInputs;
constexpr size_t kNBitsBlockPlanes = kNBitsBlockInputs / 4;
constexpr size_t kNBitsGroupPlanes = kGroupInputs / 4;
constexpr size_t kNBitsScaleBytes = kNBitsGroupBlocks * kTileRows * sizeof(uint16_t);
constexpr size_t kNBitsPlaneBytes = kTileRows * 4;

static inline size_t nbits_group_bytes(unsigned bits) { return kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * bits; }

struct NBitsMultiplyArgs {
    const uint8_t* tiles;  // [n_tiles, groups, nbits_group_bytes(bits)], first tile to compute
    size_t n_tiles;
    size_t groups;
    unsigned bits;          // 4 or 8
    const uint8_t* tokens;  // m prepared tokens
    size_t token_stride_in_bytes;
    size_t m;         // 1..kMaxTokens
    float* y;         // [m, n_tiles * 16] with a row stride
    size_t y_stride;  // in floats
};

struct NBitsLevelKernels {
    size_t (*token_bytes)(size_t k);  // size of a prepared token, a multiple of kAlignment
    void (*prepare)(const float* x, size_t k, unsigned bits, uint8_t* token);
    void (*multiply)(const NBitsMultiplyArgs& args);
};

struct NBitsKernels {
    NBitsLevelKernels fp32;
    NBitsLevelKernels int8;
};

extern const NBitsKernels kNBitsScalar;
extern const NBitsKernels kNBitsAvx2;
extern const NBitsKernels kNBitsAvx512Vnni;
extern const NBitsKernels kNBitsNeon;
extern const NBitsKernels kNBitsNeonDotprod;

// int8 level, the same for every ISA: scale[groups], correction[groups * 4], q (128 a group, plane by plane).
// Codes are unsigned: with z = 2^(bits - 1), sum((code - z) * q) = sum(code * q) - z * sum(q), and -z * sum(q) of each
// block is its correction.
struct NBitsInt8Layout {
    size_t groups;
    size_t corrections_at;
    size_t q_at;
    size_t bytes;
};

static inline NBitsInt8Layout nbits_int8_layout(size_t groups) {
    NBitsInt8Layout layout;
    layout.groups = groups;
    layout.corrections_at = groups * sizeof(float);
    layout.q_at = align_up(layout.corrections_at + groups * kNBitsGroupBlocks * sizeof(int32_t));
    layout.bytes = layout.q_at + groups * kGroupInputs;
    return layout;
}

static inline size_t nbits_int8_token_bytes(size_t k) { return nbits_int8_layout(ceil_div(k, kGroupInputs)).bytes; }

struct NBitsInt8Token {
    const float* scales;         // [groups]
    const int32_t* corrections;  // [groups * 4]
    const int8_t* q;             // [groups, 32, 4]
};

static inline NBitsInt8Token nbits_int8_token(const NBitsMultiplyArgs& a, const NBitsInt8Layout& layout, size_t index) {
    const uint8_t* token = a.tokens + index * a.token_stride_in_bytes;
    return {reinterpret_cast<const float*>(token), reinterpret_cast<const int32_t*>(token + layout.corrections_at),
            reinterpret_cast<const int8_t*>(token + layout.q_at)};
}

// fp32 level, the same for every ISA: x (128 a group, plane by plane), zeros behind input K.
static inline size_t nbits_fp32_token_bytes(size_t k) {
    return ceil_div(k, kGroupInputs) * kGroupInputs * sizeof(float);
}

// The 128 inputs from `first` on, padded with zeros when the token ends among them.
static inline const float* nbits_group_input(const float* x, size_t k, size_t first, float padding[kGroupInputs]) {
    const size_t count = min_size(k - first, kGroupInputs);
    if (count == kGroupInputs) return x + first;
    memset(padding, 0, kGroupInputs * sizeof(float));
    memcpy(padding, x + first, count * sizeof(float));
    return padding;
}

static inline void nbits_prepare_fp32(const float* x, size_t k, unsigned bits, uint8_t* token) {
    float* out = reinterpret_cast<float*>(token);
    for (size_t first = 0; first < k; first += kGroupInputs, out += kGroupInputs) {
        float padding[kGroupInputs];
        const float* in = nbits_group_input(x, k, first, padding);
        if (bits == 8) {
            memcpy(out, in, kGroupInputs * sizeof(float));
            continue;
        }
        for (size_t i = 0; i < kGroupInputs; i += 8) {
            for (size_t j = 0; j < 4; ++j) {
                out[i + j] = in[i + 2 * j];
                out[i + 4 + j] = in[i + 2 * j + 1];
            }
        }
    }
}

}  // namespace fbiedge
