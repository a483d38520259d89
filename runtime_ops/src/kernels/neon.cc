// BinaryMatMul for every AArch64 processor (Armv8.0, e.g. Cortex-A53 and A72: Raspberry Pi 3 and 4), which have no int8
// dot product.
//
// int8. Four inputs have only 16 sign patterns, so their sums, sum of s * q, stand in a table that `prepare` makes once
// a token; the kernel looks the bits up, 16 rows at a time, and multiplies nothing. ld4 takes a tile apart into byte
// columns j: lane r is byte 4r + j, the signs of row r for inputs 8j ... 8j + 7, whose halves index two tables. A sum
// of four lies within +-508, so it is kept as 32 * high + low: low 0 ... 31, high -16 ... 15, a byte table each. The 8
// lookups of a tile then add up in bytes: low to 248, high to -128 ... 120. The group's I has 16 bits, |I| <= 16256.
// Two tiles of rows share a table while it is in registers.
//
// Vector instructions for a tile of 512 weights and one token, without loads:
//   tables                       8 to halve bytes, 16 tbl, 16 to add, 4 to widen            = 44
//   masks (tst, and, sadalp)     for 8 planes of 4 quarters                                 = 96
//   masks (tst, smlal, smlal2)   likewise; slower still where only one pipe multiplies      = 96
//   8 bit planes of q (and, cnt, add)  for 4 quarters                                       = 96
// The price is 8 bytes of tables an input, read once for two tiles, and 3 instructions an input to make them.

#include "neon_common.h"

namespace fbiedge {
namespace {

constexpr size_t kQuadInputs = 4;
constexpr size_t kTableBytes = 32;  // of 4 inputs: low of the 16 sums, then high
constexpr size_t kGroupTableBytes = kGroupInputs / kQuadInputs * kTableBytes;
constexpr size_t kTileTableBytes = kTileInputs / kQuadInputs * kTableBytes;
constexpr int kLowBits = 5;

// A prepared token: header, scale[groups], tables of every 4 inputs in natural order.
size_t tables_at(size_t k) { return kTokenHeaderBytes + align_up(ceil_div(k, kGroupInputs) * sizeof(float)); }
size_t token_bytes_int8_neon(size_t k) { return tables_at(k) + ceil_div(k, kGroupInputs) * kGroupTableBytes; }

// Table of the inputs in lanes kFirst ... kFirst + 3: entry e adds q where its bit is 1 and takes it away where it is
// 0.
template <int kFirst>
void store_table(int16x8_t q_i16x8, uint8_t* table) {
    alignas(16) static const int16_t signs[3][8] = {
        {-1, 1, -1, 1, -1, 1, -1, 1}, {-1, -1, 1, 1, -1, -1, 1, 1}, {-1, -1, -1, -1, 1, 1, 1, 1}};
    int16x8_t sum_i16x8 = vmulq_laneq_s16(vld1q_s16(signs[0]), q_i16x8, kFirst);
    sum_i16x8 = vmlaq_laneq_s16(sum_i16x8, vld1q_s16(signs[1]), q_i16x8, kFirst + 1);
    sum_i16x8 = vmlaq_laneq_s16(sum_i16x8, vld1q_s16(signs[2]), q_i16x8, kFirst + 2);
    const int16x8_t last_i16x8 = vdupq_laneq_s16(q_i16x8, kFirst + 3);
    const int16x8_t first_half_i16x8 = vsubq_s16(sum_i16x8, last_i16x8);
    const int16x8_t second_half_i16x8 = vaddq_s16(sum_i16x8, last_i16x8);
    const int8x16_t low_i8x16 = vcombine_s8(vmovn_s16(first_half_i16x8), vmovn_s16(second_half_i16x8));
    const int8x16_t high_i8x16 =
        vcombine_s8(vshrn_n_s16(first_half_i16x8, kLowBits), vshrn_n_s16(second_half_i16x8, kLowBits));
    vst1q_u8(table, vandq_u8(vreinterpretq_u8_s8(low_i8x16), vdupq_n_u8((1 << kLowBits) - 1)));
    vst1q_u8(table + 16, vreinterpretq_u8_s8(high_i8x16));
}

void prepare_int8_neon(const TokenInput& in, uint8_t* token) {
    float* scales = reinterpret_cast<float*>(token + kTokenHeaderBytes);
    uint8_t* tables = token + tables_at(in.k);
    quantise(in, token, [=](size_t group, float scale, const int8x16_t q_i8x16[8], int32_t) {
        scales[group] = scale;
        uint8_t* table = tables + group * kGroupTableBytes;
        for (size_t i = 0; i < 8; ++i, table += 4 * kTableBytes) {
            const int16x8_t low_i16x8 = vmovl_s8(vget_low_s8(q_i8x16[i]));
            const int16x8_t high_i16x8 = vmovl_high_s8(q_i8x16[i]);
            store_table<0>(low_i16x8, table);
            store_table<4>(low_i16x8, table + kTableBytes);
            store_table<0>(high_i16x8, table + 2 * kTableBytes);
            store_table<4>(high_i16x8, table + 3 * kTableBytes);
        }
    });
}

// Looks 16 rows up in one table.
struct ByteSums {
    uint8x16_t low_u8x16;
    int8x16_t high_i8x16;

    void add(uint8x16_t low_table_u8x16, int8x16_t high_table_i8x16, uint8x16_t index_u8x16) {
        low_u8x16 = vaddq_u8(low_u8x16, vqtbl1q_u8(low_table_u8x16, index_u8x16));
        high_i8x16 = vaddq_s8(high_i8x16, vqtbl1q_s8(high_table_i8x16, index_u8x16));
    }
};

// Sums of a group for 16 rows.
struct GroupSums {
    uint16x8_t low_u16x8[2];
    int16x8_t high_i16x8[2];

    void clear() {
        for (int half = 0; half < 2; ++half) low_u16x8[half] = vdupq_n_u16(0), high_i16x8[half] = vdupq_n_s16(0);
    }
    void add(const ByteSums& sums) {
        low_u16x8[0] = vaddw_u8(low_u16x8[0], vget_low_u8(sums.low_u8x16));
        low_u16x8[1] = vaddw_high_u8(low_u16x8[1], sums.low_u8x16);
        high_i16x8[0] = vaddw_s8(high_i16x8[0], vget_low_s8(sums.high_i8x16));
        high_i16x8[1] = vaddw_high_s8(high_i16x8[1], sums.high_i8x16);
    }
    int16x8_t total(int half) const {
        return vaddq_s16(vshlq_n_s16(high_i16x8[half], kLowBits), vreinterpretq_s16_u16(low_u16x8[half]));
    }
};

// total += d * (scale * float(I)), every operation rounded on its own.
float32x4_t add_group(const MultiplyArgs& a, size_t tile, size_t quarter, size_t group, float32x4_t total_f32x4,
                      int16x4_t value_i16x4, float scale) {
    float32x4_t value_f32x4 = vmulq_f32(vdupq_n_f32(scale), vcvtq_f32_s32(vmovl_s16(value_i16x4)));
    if (a.block_scales) value_f32x4 = vmulq_f32(block_scales(a, tile, quarter, group), value_f32x4);
    return vaddq_f32(total_f32x4, value_f32x4);
}

template <int kTiles>
void tiles_int8(const MultiplyArgs& a, size_t first_tile, size_t token_index) {
    const size_t tile_row_bytes = a.k_tiles * kTileBytes;
    const uint8_t* bits = a.tiles + first_tile * tile_row_bytes;
    const uint8_t* token = a.tokens + token_index * a.token_stride_in_bytes;
    const float* scales = reinterpret_cast<const float*>(token + kTokenHeaderBytes);
    const uint8_t* tables = token + tables_at(a.k);
    const uint8x16_t low_half_u8x16 = vdupq_n_u8(15);
    float32x4_t total_f32x4[kTiles][kQuarters];
    for (int n = 0; n < kTiles; ++n) {
        for (size_t r = 0; r < kQuarters; ++r) total_f32x4[n][r] = vdupq_n_f32(0.0f);
    }
    for (size_t group = 0; group * kGroupTiles < a.k_tiles; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        GroupSums group_sums[kTiles];
        for (int n = 0; n < kTiles; ++n) group_sums[n].clear();
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            const uint8_t* table = tables + k_tile * kTileTableBytes;
            uint8x16x4_t columns_u8x16[kTiles];
            ByteSums sums[kTiles];
            for (int n = 0; n < kTiles; ++n) {
                columns_u8x16[n] = vld4q_u8(bits + n * tile_row_bytes + k_tile * kTileBytes);
                sums[n] = {vdupq_n_u8(0), vdupq_n_s8(0)};
            }
            for (int j = 0; j < 4; ++j, table += 2 * kTableBytes) {
                const uint8x16_t low0_u8x16 = vld1q_u8(table), low1_u8x16 = vld1q_u8(table + kTableBytes);
                const int8x16_t high0_i8x16 = vreinterpretq_s8_u8(vld1q_u8(table + 16));
                const int8x16_t high1_i8x16 = vreinterpretq_s8_u8(vld1q_u8(table + kTableBytes + 16));
                for (int n = 0; n < kTiles; ++n) {
                    const uint8x16_t column_u8x16 = columns_u8x16[n].val[j];
                    sums[n].add(low0_u8x16, high0_i8x16, vandq_u8(column_u8x16, low_half_u8x16));
                    sums[n].add(low1_u8x16, high1_i8x16, vshrq_n_u8(column_u8x16, 4));
                }
            }
            for (int n = 0; n < kTiles; ++n) group_sums[n].add(sums[n]);
        }
        for (int n = 0; n < kTiles; ++n) {
            for (size_t r = 0; r < kQuarters; ++r) {
                const int16x8_t value_i16x8 = group_sums[n].total(static_cast<int>(r / 2));
                const int16x4_t value_i16x4 = r % 2 ? vget_high_s16(value_i16x8) : vget_low_s16(value_i16x8);
                total_f32x4[n][r] =
                    add_group(a, first_tile + n, r, group, total_f32x4[n][r], value_i16x4, scales[group]);
            }
        }
    }
    for (int n = 0; n < kTiles; ++n) {
        for (size_t r = 0; r < kQuarters; ++r) finish(a, token_index, first_tile + n, r, total_f32x4[n][r]);
    }
}

// Tokens outside: the tables of one, up to 8 K bytes, stay in the cache for all its tiles.
void binary_matmul_int8_neon(const MultiplyArgs& a) {
    for (size_t token = 0; token < a.m; ++token) {
        size_t tile = 0;
        for (; tile + 2 <= a.n_tiles; tile += 2) tiles_int8<2>(a, tile, token);
        for (; tile < a.n_tiles; ++tile) tiles_int8<1>(a, tile, token);
    }
}

}  // namespace

const BinaryKernels kBinaryNeon = {
    {token_bytes_fp32_neon, prepare_fp32_neon, binary_matmul_fp32_neon},
    {token_bytes_int8_neon, prepare_int8_neon, binary_matmul_int8_neon},
};

}  // namespace fbiedge
