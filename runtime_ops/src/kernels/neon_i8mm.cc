// BinaryMatMul for AArch64 with int8 matrix multiplication (Armv8.6 FEAT_I8MM), for two tokens or more.
//
// smmla multiplies 2 rows x 8 inputs by 2 tokens x 8 inputs into a 2 x 2 block of int32: twice the work of sdot. Lanes
// of such a block: [row 0 token 0, row 0 token 1, row 1 token 0, row 1 token 1].
//
// Weights. A row has 4 bytes in each bit plane, so 8 inputs of a row are two planes side by side. With the row's 32
// bits doubled, [r0 r0 r1 r1], one vtst against [2^b 2^b+1 2^b 2^b+1] makes planes b and b+1 of two rows, as bytes -1 /
// 0. Tokens. In plane order those 8 inputs of a token are 8 bytes in a row; pairs of tokens are interleaved for a group
// of 128 inputs at a time, which then serves all tiles of the call's block.
//
// As with sdot, the sum is -P and the group's result 2P - S.

#include "neon_sdot.h"

namespace fbiedge {
namespace {

constexpr int kMaxPairs = 8;       // of tokens, computed side by side
constexpr size_t kBlockTiles = 4;  // tiles that an interleaved group serves
constexpr size_t kPlanePairs = 4;  // in a tile: planes 0 1, 2 3, 4 5, 6 7
constexpr size_t kGroupPlanePairs = kGroupTiles * kPlanePairs;
constexpr size_t kRowPairs = kTileRows / 2;

// One group of up to 8 pairs of tokens: [plane pair][pair] of 16 bytes.
struct InterleavedGroup {
    int8_t q[kGroupPlanePairs * kMaxPairs * 16];
    float32x4_t scale_f32x4[kMaxPairs];
    int32x4_t minus_sum_i32x4[kMaxPairs];
};

template <int kPairs>
void interleave(const MultiplyArgs& a, const Int8Layout& layout, size_t first_token, size_t group,
                InterleavedGroup& out) {
    for (int pair = 0; pair < kPairs; ++pair) {
        const uint8_t* token0 = a.tokens + (first_token + 2 * pair) * a.token_stride_in_bytes;
        const uint8_t* token1 = token0 + a.token_stride_in_bytes;
        const int8_t* q0 = reinterpret_cast<const int8_t*>(token0 + layout.q_at) + group * kGroupInputs;
        const int8_t* q1 = reinterpret_cast<const int8_t*>(token1 + layout.q_at) + group * kGroupInputs;
        for (size_t p = 0; p < kGroupPlanePairs; ++p) {
            vst1q_s8(out.q + (p * kPairs + pair) * 16, vcombine_s8(vld1_s8(q0 + 8 * p), vld1_s8(q1 + 8 * p)));
        }
        const float scale0 = reinterpret_cast<const float*>(token0 + layout.scales_at)[group];
        const float scale1 = reinterpret_cast<const float*>(token1 + layout.scales_at)[group];
        const float scales[4] = {scale0, scale1, scale0, scale1};
        const int32_t sum0 = reinterpret_cast<const int32_t*>(token0 + layout.sums_at)[group];
        const int32_t sum1 = reinterpret_cast<const int32_t*>(token1 + layout.sums_at)[group];
        const int32_t minus_sums[4] = {-sum0, -sum1, -sum0, -sum1};
        out.scale_f32x4[pair] = vld1q_f32(scales);
        out.minus_sum_i32x4[pair] = vld1q_s32(minus_sums);
    }
}

// Adds one group to the totals of kQuartersAtOnce quarters of a tile: [row pair of the tile][pair of tokens].
template <int kPairs, int kQuartersAtOnce>
void add_group_smmla(const MultiplyArgs& a, size_t tile, size_t first_quarter, size_t group, const InterleavedGroup& in,
                     float32x4_t (*total_f32x4)[kPairs]) {
    constexpr int kRowPairsAtOnce = 2 * kQuartersAtOnce;
    const size_t first = group * kGroupTiles, last = min_size(first + kGroupTiles, a.k_tiles);
    const uint8_t* bits = a.tiles + tile * a.k_tiles * kTileBytes + first_quarter * 16;
    int32x4_t acc_i32x4[kRowPairsAtOnce][kPairs];
    for (int r = 0; r < kRowPairsAtOnce; ++r) {
        for (int t = 0; t < kPairs; ++t) acc_i32x4[r][t] = vdupq_n_s32(0);
    }
    const int8_t* q = in.q;
    for (size_t k_tile = first; k_tile < last; ++k_tile) {
        uint8x16_t rows_u8x16[kRowPairsAtOnce];  // of two rows, each 32 bits twice
        for (int r = 0; r < kQuartersAtOnce; ++r) {
            const uint32x4_t v_u32x4 = vreinterpretq_u32_u8(vld1q_u8(bits + k_tile * kTileBytes + r * 16));
            rows_u8x16[2 * r] = vreinterpretq_u8_u32(vzip1q_u32(v_u32x4, v_u32x4));
            rows_u8x16[2 * r + 1] = vreinterpretq_u8_u32(vzip2q_u32(v_u32x4, v_u32x4));
        }
        for (size_t p = 0; p < kPlanePairs; ++p, q += kPairs * 16) {
            const uint8x16_t mask_u8x16 = vreinterpretq_u8_u64(vdupq_n_u64(0x0202020201010101u << (2 * p)));
            int8x16_t q_i8x16[kPairs];
            for (int t = 0; t < kPairs; ++t) q_i8x16[t] = vld1q_s8(q + t * 16);
            for (int r = 0; r < kRowPairsAtOnce; ++r) {
                const int8x16_t plane_i8x16 = vreinterpretq_s8_u8(vtstq_u8(rows_u8x16[r], mask_u8x16));
                for (int t = 0; t < kPairs; ++t) {
                    acc_i32x4[r][t] = vmmlaq_s32(acc_i32x4[r][t], plane_i8x16, q_i8x16[t]);
                }
            }
        }
    }
    for (int r = 0; r < kRowPairsAtOnce; ++r) {
        float32x4_t d_f32x4 = vdupq_n_f32(1.0f);
        if (a.block_scales) {
            d_f32x4 = block_scales(a, tile, first_quarter + r / 2, group);
            d_f32x4 = r % 2 ? vzip2q_f32(d_f32x4, d_f32x4) : vzip1q_f32(d_f32x4, d_f32x4);
        }
        for (int t = 0; t < kPairs; ++t) {
            const int32x4_t value_i32x4 = vsubq_s32(in.minus_sum_i32x4[t], vshlq_n_s32(acc_i32x4[r][t], 1));
            float32x4_t value_f32x4 = vmulq_f32(in.scale_f32x4[t], vcvtq_f32_s32(value_i32x4));
            if (a.block_scales) value_f32x4 = vmulq_f32(d_f32x4, value_f32x4);
            total_f32x4[r][t] = vaddq_f32(total_f32x4[r][t], value_f32x4);
        }
    }
}

// 2 * kPairs tokens x up to kBlockTiles tiles.
template <int kPairs>
void block_smmla(const MultiplyArgs& a, const Int8Layout& layout, size_t first_tile, size_t first_token) {
    // 16 sums at once: more hide no latency, and the registers hold no more.
    constexpr int kQuartersAtOnce = kPairs >= 8 ? 1 : kPairs == 4 ? 2 : 4;
    const size_t n_tiles = min_size(a.n_tiles - first_tile, kBlockTiles);
    InterleavedGroup interleaved;
    float32x4_t total_f32x4[kBlockTiles][kRowPairs][kPairs];
    memset(total_f32x4, 0, sizeof total_f32x4);
    for (size_t group = 0; group < layout.groups; ++group) {
        interleave<kPairs>(a, layout, first_token, group, interleaved);
        for (size_t n = 0; n < n_tiles; ++n) {
            for (size_t quarter = 0; quarter < kQuarters; quarter += kQuartersAtOnce) {
                add_group_smmla<kPairs, kQuartersAtOnce>(a, first_tile + n, quarter, group, interleaved,
                                                         total_f32x4[n] + 2 * quarter);
            }
        }
    }
    for (int t = 0; t < kPairs; ++t) {
        for (size_t n = 0; n < n_tiles; ++n) {
            for (size_t quarter = 0; quarter < kQuarters; ++quarter) {
                const float32x4_t low_f32x4 = total_f32x4[n][2 * quarter][t];
                const float32x4_t high_f32x4 = total_f32x4[n][2 * quarter + 1][t];
                const size_t token = first_token + 2 * t;
                finish(a, token, first_tile + n, quarter, vuzp1q_f32(low_f32x4, high_f32x4));
                finish(a, token + 1, first_tile + n, quarter, vuzp2q_f32(low_f32x4, high_f32x4));
            }
        }
    }
}

void binary_matmul_int8_neon_i8mm(const MultiplyArgs& a) {
    const Int8Layout layout = int8_layout(a.k);
    for (size_t tile = 0; tile < a.n_tiles; tile += kBlockTiles) {
        size_t token = 0;
        for (; token + 16 <= a.m; token += 16) block_smmla<8>(a, layout, tile, token);
        if (token + 8 <= a.m) block_smmla<4>(a, layout, tile, token), token += 8;
        if (token + 4 <= a.m) block_smmla<2>(a, layout, tile, token), token += 4;
        if (token + 2 <= a.m) block_smmla<1>(a, layout, tile, token), token += 2;
        if (token == a.m) continue;
        for (size_t n = tile; n < min_size(tile + kBlockTiles, a.n_tiles); ++n) tokens_sdot<1>(a, layout, n, token);
    }
}

}  // namespace

const BinaryKernels kBinaryNeonI8mm = {
    {token_bytes_fp32_neon, prepare_fp32_neon, binary_matmul_fp32_neon},
    {int8_token_bytes, prepare_int8_planes, binary_matmul_int8_neon_i8mm},
};

}  // namespace fbiedge
