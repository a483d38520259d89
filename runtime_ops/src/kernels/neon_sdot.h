// The int8 level with sdot (FEAT_DotProd): all of the set `neon_dotprod`, and single tokens of `neon_i8mm`.
//
// vtst(v, 1 << b) is plane b as bytes -1 / 0, whose 4-byte lanes line up with the activations of inputs b, 8+b, 16+b,
// 24+b broadcast to all rows: sdot gathers -P, P = sum of q where the bit is 1, with no shift and no overflow. With
// S = sum of q, the group's result is the integer 2P - S. A plane serves up to 4 tokens.
#pragma once

#include "neon_common.h"

namespace fbiedge {

// 32 int8 in natural order (8j + b) -> plane order (4b + j): an interleaving store of four rows of 8.
static inline void store_plane_order(int8x16_t low_i8x16, int8x16_t high_i8x16, int8_t* q) {
    int8x8x4_t rows;
    rows.val[0] = vget_low_s8(low_i8x16);
    rows.val[1] = vget_high_s8(low_i8x16);
    rows.val[2] = vget_low_s8(high_i8x16);
    rows.val[3] = vget_high_s8(high_i8x16);
    vst4_s8(q, rows);
}

static inline void prepare_int8_planes(const TokenInput& in, uint8_t* token) {
    const Int8Layout layout = int8_layout(in.k);
    float* scales = reinterpret_cast<float*>(token + layout.scales_at);
    int32_t* sums = reinterpret_cast<int32_t*>(token + layout.sums_at);
    int8_t* q = reinterpret_cast<int8_t*>(token + layout.q_at);
    quantise(in, token, [=](size_t group, float scale, const int8x16_t q_i8x16[8], int32_t sum) {
        for (size_t t = 0; t < kGroupTiles; ++t) {
            store_plane_order(q_i8x16[2 * t], q_i8x16[2 * t + 1], q + group * kGroupInputs + t * kTileInputs);
        }
        scales[group] = scale;
        sums[group] = sum;
    });
}

// total += d * (scale * float(2P - S)), every operation rounded on its own; `negative` is -P, `minus_sum` -S.
static inline float32x4_t add_group(const MultiplyArgs& a, size_t tile, size_t quarter, size_t group,
                                    float32x4_t total_f32x4, int32x4_t negative_i32x4, float scale, int32_t minus_sum) {
    const int32x4_t value_i32x4 = vsubq_s32(vdupq_n_s32(minus_sum), vshlq_n_s32(negative_i32x4, 1));
    float32x4_t value_f32x4 = vmulq_f32(vdupq_n_f32(scale), vcvtq_f32_s32(value_i32x4));
    if (a.block_scales) value_f32x4 = vmulq_f32(block_scales(a, tile, quarter, group), value_f32x4);
    return vaddq_f32(total_f32x4, value_f32x4);
}

template <int kTokens>
static inline void tokens_sdot(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t first_token) {
    constexpr int kChains = kTokens == 1 ? 2 : 1;  // one token has only 4 sums: two chains each hide sdot's latency
    const uint8_t* tokens = a.tokens + first_token * a.token_stride_in_bytes;
    const uint8_t* bits = a.tiles + tile * a.k_tiles * kTileBytes;
    float32x4_t total_f32x4[kQuarters][kTokens];
    for (size_t r = 0; r < kQuarters; ++r) {
        for (int t = 0; t < kTokens; ++t) total_f32x4[r][t] = vdupq_n_f32(0.0f);
    }
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        int32x4_t acc_i32x4[kQuarters][kTokens * kChains];
        for (size_t r = 0; r < kQuarters; ++r) {
            for (int t = 0; t < kTokens * kChains; ++t) acc_i32x4[r][t] = vdupq_n_s32(0);
        }
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            const uint8x16x4_t v_u8x16 = vld1q_u8_x4(bits + k_tile * kTileBytes);
            for (int b = 0; b < 8; ++b) {
                const uint8x16_t mask_u8x16 = vdupq_n_u8(static_cast<uint8_t>(1 << b));
                int8x16_t plane_i8x16[kQuarters];
                for (size_t r = 0; r < kQuarters; ++r) {
                    plane_i8x16[r] = vreinterpretq_s8_u8(vtstq_u8(v_u8x16.val[r], mask_u8x16));
                }
                for (int t = 0; t < kTokens; ++t) {
                    const uint8_t* q = tokens + t * a.token_stride_in_bytes + layout.q_at + k_tile * kTileInputs;
                    const int32_t* quads = reinterpret_cast<const int32_t*>(q);
                    const int8x16_t q_i8x16 = vreinterpretq_s8_s32(vld1q_dup_s32(quads + b));
                    const int chain = kChains == 2 ? b % 2 : t;
                    for (size_t r = 0; r < kQuarters; ++r) {
                        acc_i32x4[r][chain] = vdotq_s32(acc_i32x4[r][chain], plane_i8x16[r], q_i8x16);
                    }
                }
            }
        }
        for (int t = 0; t < kTokens; ++t) {
            const uint8_t* token = tokens + t * a.token_stride_in_bytes;
            const float scale = reinterpret_cast<const float*>(token + layout.scales_at)[group];
            const int32_t sum = reinterpret_cast<const int32_t*>(token + layout.sums_at)[group];
            for (size_t r = 0; r < kQuarters; ++r) {
                int32x4_t negative_i32x4 = acc_i32x4[r][t];
                if (kChains == 2) negative_i32x4 = vaddq_s32(negative_i32x4, acc_i32x4[r][kChains - 1]);
                total_f32x4[r][t] = add_group(a, tile, r, group, total_f32x4[r][t], negative_i32x4, scale, -sum);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        for (size_t r = 0; r < kQuarters; ++r) finish(a, first_token + t, tile, r, total_f32x4[r][t]);
    }
}

}  // namespace fbiedge
