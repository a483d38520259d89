// MatMulNBits with AArch64 NEON, for files that define first
//   int32x4_t dot_quads(int32x4_t sum, int8x16_t a, int8x16_t b)   each lane's four products, added to it
// with what their processors have. A plane is four 128-bit quarters of 4 rows x 4 codes.
//
// Both operands are signed. 8-bit codes less 128 are signed weights; 4-bit codes are small enough to be signed as they
// are, and their block's sum starts at its correction (matmul_nbits_kernels.h).
#pragma once

#include <arm_neon.h>

#include "../matmul_nbits_kernels.h"

namespace fbiedge {
namespace {

constexpr size_t kQuarters = 4;
constexpr size_t kQuarterRows = 4;
constexpr size_t kQuarterBytes = 16;  // of a plane

float32x4_t block_scales(const uint8_t* group, size_t block, size_t quarter) {
    const uint8_t* halves = group + (block * kTileRows + quarter * kQuarterRows) * sizeof(uint16_t);
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves)));
}

// The two planes of a line of 4-bit codes; of 8-bit codes, a line is a plane.
uint8x16_t low_codes(uint8x16_t line_u8x16) { return vandq_u8(line_u8x16, vdupq_n_u8(15)); }
uint8x16_t high_codes(uint8x16_t line_u8x16) { return vshrq_n_u8(line_u8x16, 4); }

// --- int8 level
// -------------------------------------------------------------------------------------------------------

// 16 int32 -> 16 int8 in order; the values fit.
int8x16_t narrow(const int32x4_t q_i32x4[4]) {
    const int16x8_t low_i16x8 = vcombine_s16(vmovn_s32(q_i32x4[0]), vmovn_s32(q_i32x4[1]));
    const int16x8_t high_i16x8 = vcombine_s16(vmovn_s32(q_i32x4[2]), vmovn_s32(q_i32x4[3]));
    return vcombine_s8(vmovn_s16(low_i16x8), vmovn_s16(high_i16x8));
}

// 16 int8 in natural order, of every 8 the even ones before the odd ones: planes of 4-bit codes.
int8x16_t nibble_order(int8x16_t q_i8x16) {
    const uint8_t order[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
    return vqtbl1q_s8(q_i8x16, vld1q_u8(order));
}

void prepare_int8_neon(const float* x, size_t k, unsigned bits, uint8_t* token) {
    const NBitsInt8Layout layout = nbits_int8_layout(ceil_div(k, kGroupInputs));
    float* scales = reinterpret_cast<float*>(token);
    int32_t* corrections = reinterpret_cast<int32_t*>(token + layout.corrections_at);
    int8_t* q = reinterpret_cast<int8_t*>(token + layout.q_at);
    for (size_t group = 0; group < layout.groups; ++group) {
        float padding[kGroupInputs];
        const float* in = nbits_group_input(x, k, group * kGroupInputs, padding);
        uint32x4_t peak_u32x4 = vdupq_n_u32(0);
        for (size_t i = 0; i < kGroupInputs; i += 4) {
            const uint32x4_t bits_u32x4 = vreinterpretq_u32_f32(vld1q_f32(in + i));
            peak_u32x4 = vmaxq_u32(peak_u32x4, vandq_u32(bits_u32x4, vdupq_n_u32(0x7fffffffu)));
        }
        const float scale = group_scale(vmaxvq_u32(peak_u32x4));
        const float32x4_t scale_f32x4 = vdupq_n_f32(scale);
        const int32x4_t usable_i32x4 = vdupq_n_s32(scale_is_usable(scale) ? -1 : 0);
        scales[group] = scale;
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            int32x4_t sum_i32x4 = vdupq_n_s32(0);
            for (size_t half = 0; half < 2; ++half, q += 16) {
                int32x4_t q_i32x4[4];
                for (size_t j = 0; j < 4; ++j) {
                    const float32x4_t x_f32x4 = vld1q_f32(in + block * kNBitsBlockInputs + 16 * half + 4 * j);
                    const int32x4_t rounded_i32x4 = vcvtnq_s32_f32(vdivq_f32(x_f32x4, scale_f32x4));  // half to even
                    q_i32x4[j] = vandq_s32(rounded_i32x4, usable_i32x4);
                    sum_i32x4 = vaddq_s32(sum_i32x4, q_i32x4[j]);
                }
                const int8x16_t q_i8x16 = narrow(q_i32x4);
                vst1q_s8(q, bits == 8 ? q_i8x16 : nibble_order(q_i8x16));
            }
            *corrections++ = -(1 << (bits - 1)) * vaddvq_s32(sum_i32x4);
        }
    }
}

int8x16_t broadcast_quad(const int8_t* q, size_t plane) {
    int32_t quad;
    memcpy(&quad, q + 4 * plane, sizeof quad);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}

// Sums of weight * q of one block, for 16 rows and each token.
template <unsigned kBits, int kTokens>
void block_sums(const uint8_t* lines, const int8_t* const q[kTokens], const int32_t corrections[kTokens],
                int32x4_t sum_i32x4[kQuarters][kTokens]) {
    for (size_t r = 0; r < kQuarters; ++r) {
        for (int t = 0; t < kTokens; ++t) sum_i32x4[r][t] = vdupq_n_s32(kBits == 8 ? 0 : corrections[t]);
    }
    for (size_t line = 0; line < kNBitsBlockPlanes * kBits / 8; ++line) {
        for (size_t r = 0; r < kQuarters; ++r) {
            const uint8x16_t line_u8x16 = vld1q_u8(lines + line * kNBitsPlaneBytes + r * kQuarterBytes);
            if (kBits == 8) {
                const int8x16_t w_i8x16 = vreinterpretq_s8_u8(veorq_u8(line_u8x16, vdupq_n_u8(128)));
                for (int t = 0; t < kTokens; ++t) {
                    sum_i32x4[r][t] = dot_quads(sum_i32x4[r][t], w_i8x16, broadcast_quad(q[t], line));
                }
            } else {
                const int8x16_t low_i8x16 = vreinterpretq_s8_u8(low_codes(line_u8x16));
                const int8x16_t high_i8x16 = vreinterpretq_s8_u8(high_codes(line_u8x16));
                for (int t = 0; t < kTokens; ++t) {
                    sum_i32x4[r][t] = dot_quads(sum_i32x4[r][t], low_i8x16, broadcast_quad(q[t], 2 * line));
                    sum_i32x4[r][t] = dot_quads(sum_i32x4[r][t], high_i8x16, broadcast_quad(q[t], 2 * line + 1));
                }
            }
        }
    }
}

template <unsigned kBits, int kTokens>
void tokens_int8(const NBitsMultiplyArgs& a, const NBitsInt8Layout& layout, size_t tile, size_t first_token) {
    constexpr size_t kGroupBytes = kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * kBits;
    constexpr size_t kBlockBytes = kNBitsBlockPlanes * kBits / 8 * kNBitsPlaneBytes;
    const uint8_t* group = a.tiles + tile * a.groups * kGroupBytes;
    NBitsInt8Token token[kTokens];
    float32x4_t total_f32x4[kQuarters][kTokens];
    for (int t = 0; t < kTokens; ++t) {
        token[t] = nbits_int8_token(a, layout, first_token + t);
        for (size_t r = 0; r < kQuarters; ++r) total_f32x4[r][t] = vdupq_n_f32(0.0f);
    }
    for (size_t g = 0; g < a.groups; ++g, group += kGroupBytes) {
        float32x4_t v_f32x4[kQuarters][kTokens];
        for (size_t r = 0; r < kQuarters; ++r) {
            for (int t = 0; t < kTokens; ++t) v_f32x4[r][t] = vdupq_n_f32(0.0f);
        }
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            const size_t at = g * kNBitsGroupBlocks + block;
            const int8_t* q[kTokens];
            int32_t corrections[kTokens];
            for (int t = 0; t < kTokens; ++t) {
                q[t] = token[t].q + at * kNBitsBlockInputs;
                corrections[t] = token[t].corrections[at];
            }
            int32x4_t sum_i32x4[kQuarters][kTokens];
            block_sums<kBits, kTokens>(group + kNBitsScaleBytes + block * kBlockBytes, q, corrections, sum_i32x4);
            for (size_t r = 0; r < kQuarters; ++r) {
                const float32x4_t d_f32x4 = block_scales(group, block, r);
                for (int t = 0; t < kTokens; ++t) {
                    const float32x4_t value_f32x4 = vmulq_f32(d_f32x4, vcvtq_f32_s32(sum_i32x4[r][t]));
                    v_f32x4[r][t] = vaddq_f32(v_f32x4[r][t], value_f32x4);
                }
            }
        }
        for (size_t r = 0; r < kQuarters; ++r) {
            for (int t = 0; t < kTokens; ++t) {
                const float32x4_t scaled_f32x4 = vmulq_f32(vdupq_n_f32(token[t].scales[g]), v_f32x4[r][t]);
                total_f32x4[r][t] = vaddq_f32(total_f32x4[r][t], scaled_f32x4);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        float* y = a.y + (first_token + t) * a.y_stride + tile * kTileRows;
        for (size_t r = 0; r < kQuarters; ++r) vst1q_f32(y + r * kQuarterRows, total_f32x4[r][t]);
    }
}

template <unsigned kBits>
void matmul_nbits_int8(const NBitsMultiplyArgs& a) {
    const NBitsInt8Layout layout = nbits_int8_layout(a.groups);
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        size_t token = 0;
        for (; token + 2 <= a.m; token += 2) tokens_int8<kBits, 2>(a, layout, tile, token);
        for (; token < a.m; ++token) tokens_int8<kBits, 1>(a, layout, tile, token);
    }
}

void matmul_nbits_int8_neon(const NBitsMultiplyArgs& a) {
    a.bits == 8 ? matmul_nbits_int8<8>(a) : matmul_nbits_int8<4>(a);
}

// --- fp32 level
// -------------------------------------------------------------------------------------------------------

// sum += weight * x, for the codes of a quarter of a plane.
template <unsigned kBits, int kTokens>
void add_plane_fp32(uint8x16_t codes_u8x16, const float* const x[kTokens], size_t at, float32x4_t sum_f32x4[kTokens]) {
    const uint32x4_t codes_u32x4 = vreinterpretq_u32_u8(codes_u8x16);
    for (int j = 0; j < 4; ++j) {
        const uint32x4_t byte_u32x4 =
            vandq_u32(vshlq_u32(codes_u32x4, vdupq_n_s32(-8 * j)), vdupq_n_u32(255));  // shifts right
        const int32x4_t weight_i32x4 = vsubq_s32(vreinterpretq_s32_u32(byte_u32x4), vdupq_n_s32(1 << (kBits - 1)));
        const float32x4_t weight_f32x4 = vcvtq_f32_s32(weight_i32x4);
        for (int t = 0; t < kTokens; ++t) sum_f32x4[t] = vfmaq_n_f32(sum_f32x4[t], weight_f32x4, x[t][at + j]);
    }
}

// The order of additions of one output does not depend on kTokens.
template <unsigned kBits, int kTokens>
void tokens_fp32(const NBitsMultiplyArgs& a, size_t tile, size_t first_token) {
    constexpr size_t kGroupBytes = kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * kBits;
    constexpr size_t kBlockLines = kNBitsBlockPlanes * kBits / 8;
    const uint8_t* group = a.tiles + tile * a.groups * kGroupBytes;
    const float* x[kTokens];
    float32x4_t total_f32x4[kQuarters][kTokens];
    for (int t = 0; t < kTokens; ++t) {
        x[t] = reinterpret_cast<const float*>(a.tokens + (first_token + t) * a.token_stride_in_bytes);
        for (size_t r = 0; r < kQuarters; ++r) total_f32x4[r][t] = vdupq_n_f32(0.0f);
    }
    for (size_t g = 0; g < a.groups; ++g, group += kGroupBytes) {
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            const uint8_t* lines = group + kNBitsScaleBytes + block * kBlockLines * kNBitsPlaneBytes;
            size_t at = (g * kNBitsGroupBlocks + block) * kNBitsBlockInputs;
            float32x4_t sum_f32x4[kQuarters][kTokens];
            for (size_t r = 0; r < kQuarters; ++r) {
                for (int t = 0; t < kTokens; ++t) sum_f32x4[r][t] = vdupq_n_f32(0.0f);
            }
            for (size_t line = 0; line < kBlockLines; ++line, at += kNBitsBlockInputs / kBlockLines) {
                for (size_t r = 0; r < kQuarters; ++r) {
                    const uint8x16_t line_u8x16 = vld1q_u8(lines + line * kNBitsPlaneBytes + r * kQuarterBytes);
                    if (kBits == 8) {
                        add_plane_fp32<kBits, kTokens>(line_u8x16, x, at, sum_f32x4[r]);
                    } else {
                        add_plane_fp32<kBits, kTokens>(low_codes(line_u8x16), x, at, sum_f32x4[r]);
                        add_plane_fp32<kBits, kTokens>(high_codes(line_u8x16), x, at + 4, sum_f32x4[r]);
                    }
                }
            }
            for (size_t r = 0; r < kQuarters; ++r) {
                const float32x4_t d_f32x4 = block_scales(group, block, r);
                for (int t = 0; t < kTokens; ++t) {
                    total_f32x4[r][t] = vfmaq_f32(total_f32x4[r][t], d_f32x4, sum_f32x4[r][t]);
                }
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        float* y = a.y + (first_token + t) * a.y_stride + tile * kTileRows;
        for (size_t r = 0; r < kQuarters; ++r) vst1q_f32(y + r * kQuarterRows, total_f32x4[r][t]);
    }
}

template <unsigned kBits>
void matmul_nbits_fp32(const NBitsMultiplyArgs& a) {
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        size_t token = 0;
        for (; token + 4 <= a.m; token += 4) tokens_fp32<kBits, 4>(a, tile, token);
        for (; token < a.m; ++token) tokens_fp32<kBits, 1>(a, tile, token);
    }
}

void matmul_nbits_fp32_neon(const NBitsMultiplyArgs& a) {
    a.bits == 8 ? matmul_nbits_fp32<8>(a) : matmul_nbits_fp32<4>(a);
}

}  // namespace
}  // namespace fbiedge
