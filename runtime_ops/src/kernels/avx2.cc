// AVX2 with F16C: the fp32 level (int8: avx2_int8.h). A tile is two 256-bit halves of 8 rows: 32-bit lane r holds the
// 32 sign bits of row r.
//
// The sign bits of 3 inputs select one of 8 sums, tabulated once a token; vpermps does 8 rows x 3 inputs at a
// time and ignores the bits above the lowest 3. 32 inputs are 11 tables, the last one of 2 inputs.

#include "avx2_int8.h"

namespace fbiedge {
namespace {

constexpr size_t kInputsPerTable = 3;
constexpr size_t kTableFloats = 8;
constexpr size_t kTablesPerTile = 11;

size_t token_bytes_fp32_avx2(size_t k) {
    return kTokenHeaderBytes + align_up(ceil_div(k, kTileInputs) * kTablesPerTile * kTableFloats * sizeof(float));
}

// Entry i of a table: sum of +x[j] where bit j of i is 1, -x[j] where it is 0.
__m256 sign_sums(float x0, float x1, float x2) {
    const __m256 minus = _mm256_set1_ps(-0.0f);
    const __m256 negative0 = _mm256_castsi256_ps(_mm256_setr_epi32(-1, 0, -1, 0, -1, 0, -1, 0));
    const __m256 negative1 = _mm256_castsi256_ps(_mm256_setr_epi32(-1, -1, 0, 0, -1, -1, 0, 0));
    const __m256 negative2 = _mm256_castsi256_ps(_mm256_setr_epi32(-1, -1, -1, -1, 0, 0, 0, 0));
    const __m256 signed0_f32x8 = _mm256_xor_ps(_mm256_set1_ps(x0), _mm256_and_ps(minus, negative0));
    const __m256 signed1_f32x8 = _mm256_xor_ps(_mm256_set1_ps(x1), _mm256_and_ps(minus, negative1));
    const __m256 signed2_f32x8 = _mm256_xor_ps(_mm256_set1_ps(x2), _mm256_and_ps(minus, negative2));
    return _mm256_add_ps(_mm256_add_ps(signed0_f32x8, signed1_f32x8), signed2_f32x8);
}

void prepare_fp32_avx2(const TokenInput& in, uint8_t* token) {
    float* table = reinterpret_cast<float*>(token + kTokenHeaderBytes);
    GroupPadding padding;
    __m256 offsets_f32x8[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t first = 0; first < in.k; first += kGroupInputs) {
        const GroupInput group_in = group_input(in, first, padding);
        alignas(64) float xs[kGroupInputs];
        for (size_t i = 0; i < 16; ++i) {
            offsets_f32x8[i % 2] = add_offsets(offsets_f32x8[i % 2], group_in, 8 * i);
            _mm256_store_ps(xs + 8 * i, _mm256_mul_ps(_mm256_set1_ps(in.multiplier), scaled_inputs(group_in, 8 * i)));
        }
        const size_t k_tiles = min_size(ceil_div(in.k - first, kTileInputs), kGroupTiles);
        for (size_t t = 0; t < k_tiles; ++t) {
            const float* x = xs + t * kTileInputs;
            for (size_t i = 0; i < kTablesPerTile; ++i, x += kInputsPerTable, table += kTableFloats) {
                _mm256_store_ps(table, sign_sums(x[0], x[1], i + 1 < kTablesPerTile ? x[2] : 0.0f));
            }
        }
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x8[0], offsets_f32x8[1]);
}

// The order of additions of one output does not depend on kTiles and kTokens: tables of a group, then groups.
template <int kTiles, int kTokens>
void tokens_fp32(const MultiplyArgs& a, size_t tile, size_t first_token) {
    constexpr int kHalves = 2 * kTiles;
    const uint8_t* tables = a.tokens + first_token * a.token_stride_in_bytes + kTokenHeaderBytes;
    const uint8_t* bits = a.tiles + tile * a.k_tiles * kTileBytes;
    const size_t tile_stride = a.k_tiles * kTileBytes;
    __m256 total_f32x8[kHalves][kTokens];
    for (int h = 0; h < kHalves; ++h) {
        for (int t = 0; t < kTokens; ++t) total_f32x8[h][t] = _mm256_setzero_ps();
    }
    for (size_t group = 0; group * kGroupTiles < a.k_tiles; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        __m256 acc_f32x8[kHalves][kTokens];
        for (int h = 0; h < kHalves; ++h) {
            for (int t = 0; t < kTokens; ++t) acc_f32x8[h][t] = _mm256_setzero_ps();
        }
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            __m256i index_u32x8[kHalves];
            for (int h = 0; h < kHalves; ++h) {
                const uint8_t* tile_bits = bits + h / 2 * tile_stride + k_tile * kTileBytes;
                if (kTokens == 1) prefetch(tile_bits + kTiles * tile_stride);
                index_u32x8[h] = load_half(tile_bits, h % 2);
            }
            for (size_t i = 0; i < kTablesPerTile; ++i) {
                const size_t at = (k_tile * kTablesPerTile + i) * kTableFloats * sizeof(float);
                for (int t = 0; t < kTokens; ++t) {
                    const uint8_t* table = tables + t * a.token_stride_in_bytes + at;
                    const __m256 table_f32x8 = _mm256_load_ps(reinterpret_cast<const float*>(table));
                    for (int h = 0; h < kHalves; ++h) {
                        const __m256 sum_f32x8 = _mm256_permutevar8x32_ps(table_f32x8, index_u32x8[h]);
                        acc_f32x8[h][t] = _mm256_add_ps(acc_f32x8[h][t], sum_f32x8);
                    }
                }
                for (int h = 0; h < kHalves; ++h) index_u32x8[h] = _mm256_srli_epi32(index_u32x8[h], kInputsPerTable);
            }
        }
        for (int h = 0; h < kHalves; ++h) {
            for (int t = 0; t < kTokens; ++t) {
                __m256 value_f32x8 = acc_f32x8[h][t];
                if (a.block_scales) {
                    value_f32x8 = _mm256_mul_ps(block_scales(a, tile + h / 2, h % 2, group), value_f32x8);
                }
                total_f32x8[h][t] = _mm256_add_ps(total_f32x8[h][t], value_f32x8);
            }
        }
    }
    for (int h = 0; h < kHalves; ++h) {
        for (int t = 0; t < kTokens; ++t) finish(a, first_token + t, tile + h / 2, h % 2, total_f32x8[h][t]);
    }
}

void binary_matmul_fp32_avx2(const MultiplyArgs& a) {
    size_t token = 0;
    for (; token + 4 <= a.m; token += 4) {
        for (size_t tile = 0; tile < a.n_tiles; ++tile) tokens_fp32<1, 4>(a, tile, token);
    }
    for (; token < a.m; ++token) {
        size_t tile = 0;
        for (; tile + 2 <= a.n_tiles; tile += 2) tokens_fp32<2, 1>(a, tile, token);
        for (; tile < a.n_tiles; ++tile) tokens_fp32<1, 1>(a, tile, token);
    }
}

}  // namespace

const BinaryKernels kBinaryAvx2 = {
    {token_bytes_fp32_avx2, prepare_fp32_avx2, binary_matmul_fp32_avx2},
    {token_bytes_int8_avx2, prepare_int8_avx2, binary_matmul_int8_avx2},
};

}  // namespace fbiedge
