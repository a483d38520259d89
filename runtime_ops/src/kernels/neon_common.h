// What the NEON kernel sets share: the quantiser, the last steps of an output, and the fp32 level. All of it is
// Armv8.0, but every file that includes this compiles its own copy for its own instructions, so everything here is
// static.
//
// A tile is four 128-bit quarters of 4 rows: 32-bit lane r of a quarter holds the 32 sign bits of its row r.
//
// fp32. The sign bit shifted to the top and put on 1.0 gives +-1; a fused multiply-add of +-1 rounds once, as an add
// does.
#pragma once

#include <arm_neon.h>

#include "../kernel_table.h"

namespace fbiedge {

constexpr size_t kQuarters = 4;
constexpr size_t kQuarterRows = 4;

// Lanes 8, 4, 2, 1 apart of 16: the order of the scalar kernel.
static inline float sum_lanes(const float32x4_t sums_f32x4[4]) {
    const float32x4_t low_f32x4 = vaddq_f32(sums_f32x4[0], sums_f32x4[2]);
    const float32x4_t high_f32x4 = vaddq_f32(sums_f32x4[1], sums_f32x4[3]);
    const float32x4_t sum_f32x4 = vaddq_f32(low_f32x4, high_f32x4);
    const float32x2_t sum_f32x2 = vadd_f32(vget_low_f32(sum_f32x4), vget_high_f32(sum_f32x4));
    return vget_lane_f32(sum_f32x2, 0) + vget_lane_f32(sum_f32x2, 1);
}

static inline float32x4_t add_offsets(float32x4_t sum_f32x4, const GroupInput& in, size_t at) {
    const float32x4_t x_f32x4 = vld1q_f32(in.x + at);
    if (!in.beta) return vaddq_f32(sum_f32x4, x_f32x4);
    return vaddq_f32(sum_f32x4, vmulq_f32(vld1q_f32(in.beta + at), x_f32x4));
}

static inline float32x4_t scaled_inputs(const GroupInput& in, size_t at) {
    const float32x4_t x_f32x4 = vld1q_f32(in.x + at);
    return in.alpha ? vmulq_f32(vld1q_f32(in.alpha + at), x_f32x4) : x_f32x4;
}

static inline float32x4_t block_scales(const MultiplyArgs& a, size_t tile, size_t quarter, size_t group) {
    const size_t index = (tile * ceil_div(a.k, kGroupInputs) + group) * kTileRows + quarter * kQuarterRows;
    if (!a.block_scales_fp16) return vld1q_f32(static_cast<const float*>(a.block_scales) + index);
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t*>(a.block_scales) + index)));
}

static inline void finish(const MultiplyArgs& a, size_t token, size_t tile, size_t quarter, float32x4_t total_f32x4) {
    const float32x4_t sum_f32x4 = vdupq_n_f32(*offset_sum(a.tokens + token * a.token_stride_in_bytes));
    const size_t row = tile * a.row_step + quarter * kQuarterRows;
    const size_t out = tile * kTileRows + quarter * kQuarterRows;
    if (a.row_alpha) total_f32x4 = vmulq_f32(vld1q_f32(a.row_alpha + row), total_f32x4);
    if (a.row_beta) total_f32x4 = vaddq_f32(total_f32x4, vmulq_f32(vld1q_f32(a.row_beta + row), sum_f32x4));
    if (a.add_offset_sum) total_f32x4 = vaddq_f32(total_f32x4, sum_f32x4);
    if (a.bias) total_f32x4 = vaddq_f32(total_f32x4, vld1q_f32(a.bias + token * a.bias_stride + out));
    vst1q_f32(a.y + token * a.y_stride + out, total_f32x4);
}

// --- int8 level: the quantiser
// ----------------------------------------------------------------------------------------

// 16 int32 -> 16 int8 in order; the values fit.
static inline int8x16_t narrow(const int32x4_t q_i32x4[4]) {
    const int16x8_t low_i16x8 = vcombine_s16(vmovn_s32(q_i32x4[0]), vmovn_s32(q_i32x4[1]));
    const int16x8_t high_i16x8 = vcombine_s16(vmovn_s32(q_i32x4[2]), vmovn_s32(q_i32x4[3]));
    return vcombine_s8(vmovn_s16(low_i16x8), vmovn_s16(high_i16x8));
}

// Calls store_group(group, scale, q_i8x16[8], sum of q) for every group, with q in natural order.
template <typename StoreGroup>
static inline void quantise(const TokenInput& in, uint8_t* token, StoreGroup store_group) {
    const size_t groups = ceil_div(in.k, kGroupInputs);
    GroupPadding padding;
    float32x4_t offsets_f32x4[4];
    for (int i = 0; i < 4; ++i) offsets_f32x4[i] = vdupq_n_f32(0.0f);
    for (size_t group = 0; group < groups; ++group) {
        const GroupInput group_in = group_input(in, group * kGroupInputs, padding);
        float32x4_t xs_f32x4[32];
        uint32x4_t peak_u32x4 = vdupq_n_u32(0);
        for (size_t i = 0; i < 32; ++i) {
            offsets_f32x4[i % 4] = add_offsets(offsets_f32x4[i % 4], group_in, 4 * i);
            xs_f32x4[i] = scaled_inputs(group_in, 4 * i);
            peak_u32x4 = vmaxq_u32(peak_u32x4, vandq_u32(vreinterpretq_u32_f32(xs_f32x4[i]), vdupq_n_u32(0x7fffffffu)));
        }
        const float scale = group_scale(vmaxvq_u32(peak_u32x4));
        const float32x4_t scale_f32x4 = vdupq_n_f32(scale);
        const int32x4_t usable_i32x4 = vdupq_n_s32(scale_is_usable(scale) ? -1 : 0);
        int32x4_t sum_i32x4 = vdupq_n_s32(0);
        int8x16_t q_i8x16[8];
        for (size_t i = 0; i < 8; ++i) {
            int32x4_t q_i32x4[4];
            for (size_t j = 0; j < 4; ++j) {
                const float32x4_t ratio_f32x4 = vdivq_f32(xs_f32x4[4 * i + j], scale_f32x4);
                q_i32x4[j] = vandq_s32(vcvtnq_s32_f32(ratio_f32x4), usable_i32x4);  // rounds half to even
                sum_i32x4 = vaddq_s32(sum_i32x4, q_i32x4[j]);
            }
            q_i8x16[i] = narrow(q_i32x4);
        }
        store_group(group, in.multiplier * scale, q_i8x16, vaddvq_s32(sum_i32x4));
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x4);
}

// --- fp32 level
// -------------------------------------------------------------------------------------------------------

static inline size_t token_bytes_fp32_neon(size_t k) {
    return kTokenHeaderBytes + ceil_div(k, kGroupInputs) * kGroupInputs * sizeof(float);
}

static inline void prepare_fp32_neon(const TokenInput& in, uint8_t* token) {
    float* xs = reinterpret_cast<float*>(token + kTokenHeaderBytes);
    GroupPadding padding;
    float32x4_t offsets_f32x4[4];
    for (int i = 0; i < 4; ++i) offsets_f32x4[i] = vdupq_n_f32(0.0f);
    for (size_t first = 0; first < in.k; first += kGroupInputs, xs += kGroupInputs) {
        const GroupInput group_in = group_input(in, first, padding);
        for (size_t i = 0; i < 32; ++i) {
            offsets_f32x4[i % 4] = add_offsets(offsets_f32x4[i % 4], group_in, 4 * i);
            vst1q_f32(xs + 4 * i, vmulq_n_f32(scaled_inputs(group_in, 4 * i), in.multiplier));
        }
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x4);
}

// The order of additions of one output does not depend on kTokens: inputs of a group, then groups.
template <int kTokens>
static inline void tokens_fp32(const MultiplyArgs& a, size_t tile, size_t first_token) {
    const uint8_t* tokens = a.tokens + first_token * a.token_stride_in_bytes;
    const uint8_t* bits = a.tiles + tile * a.k_tiles * kTileBytes;
    const uint32x4_t sign_u32x4 = vdupq_n_u32(0x80000000u);
    const uint32x4_t one_u32x4 = vreinterpretq_u32_f32(vdupq_n_f32(1.0f));
    float32x4_t total_f32x4[kQuarters][kTokens];
    for (size_t r = 0; r < kQuarters; ++r) {
        for (int t = 0; t < kTokens; ++t) total_f32x4[r][t] = vdupq_n_f32(0.0f);
    }
    for (size_t group = 0; group * kGroupTiles < a.k_tiles; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        float32x4_t acc_f32x4[kQuarters][kTokens];
        for (size_t r = 0; r < kQuarters; ++r) {
            for (int t = 0; t < kTokens; ++t) acc_f32x4[r][t] = vdupq_n_f32(0.0f);
        }
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            uint32x4_t negative_u32x4[kQuarters];  // inverted bits: a set top bit is the float's minus sign
            for (size_t r = 0; r < kQuarters; ++r) {
                const uint8x16_t v_u8x16 = vld1q_u8(bits + k_tile * kTileBytes + r * 16);
                negative_u32x4[r] = vmvnq_u32(vreinterpretq_u32_u8(v_u8x16));
            }
            for (size_t i = 0; i < kTileInputs; ++i) {
                const int32x4_t shift_i32x4 = vdupq_n_s32(static_cast<int32_t>(31 - i));
                float32x4_t sign_f32x4[kQuarters];
                for (size_t r = 0; r < kQuarters; ++r) {
                    const uint32x4_t top_u32x4 = vshlq_u32(negative_u32x4[r], shift_i32x4);
                    sign_f32x4[r] = vreinterpretq_f32_u32(vbslq_u32(sign_u32x4, top_u32x4, one_u32x4));
                }
                for (int t = 0; t < kTokens; ++t) {
                    const uint8_t* token = tokens + t * a.token_stride_in_bytes + kTokenHeaderBytes;
                    const float x = reinterpret_cast<const float*>(token)[k_tile * kTileInputs + i];
                    for (size_t r = 0; r < kQuarters; ++r) {
                        acc_f32x4[r][t] = vfmaq_n_f32(acc_f32x4[r][t], sign_f32x4[r], x);
                    }
                }
            }
        }
        for (size_t r = 0; r < kQuarters; ++r) {
            for (int t = 0; t < kTokens; ++t) {
                float32x4_t value_f32x4 = acc_f32x4[r][t];
                if (a.block_scales) value_f32x4 = vmulq_f32(block_scales(a, tile, r, group), value_f32x4);
                total_f32x4[r][t] = vaddq_f32(total_f32x4[r][t], value_f32x4);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (size_t r = 0; r < kQuarters; ++r) finish(a, first_token + t, tile, r, total_f32x4[r][t]);
    }
}

static inline void binary_matmul_fp32_neon(const MultiplyArgs& a) {
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        size_t token = 0;
        for (; token + 4 <= a.m; token += 4) tokens_fp32<4>(a, tile, token);
        for (; token < a.m; ++token) tokens_fp32<1>(a, tile, token);
    }
}

}  // namespace fbiedge
