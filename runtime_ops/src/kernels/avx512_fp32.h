// The fp32 level with AVX-512, for the kernels that differ in the int8 level only.
//
// A row's sign bits of 4 inputs select one of the 16 sums +-x0 +-x1 +-x2 +-x3, tabulated once a token: vpermps
// does 16 rows x 4 inputs at a time, and ignores the bits above the lowest 4, so a shift of v is all the unpacking
// there is. That is 64 multiply-accumulates for a shift, a permute and an add, against 16 for an FMA.
#pragma once

#include "avx512.h"

namespace fbiedge {
namespace {

constexpr size_t kInputsPerTable = 4;
constexpr size_t kTableFloats = 16;
constexpr size_t kTablesPerTile = kTileInputs / kInputsPerTable;

size_t token_bytes_fp32_avx512(size_t k) {
    const size_t tables = ceil_div(k, kTileInputs) * kTablesPerTile;
    return kTokenHeaderBytes + tables * kTableFloats * sizeof(float);
}

// Entry i of a table: sum of +x[j] where bit j of i is 1, -x[j] where it is 0.
__m512 sign_sums(const float* x) {
    __m512 signed_f32x16[kInputsPerTable];
    const __m512i index_u32x16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int j = 0; j < 4; ++j) {
        const __mmask16 negative = _mm512_testn_epi32_mask(index_u32x16, _mm512_set1_epi32(1 << j));
        const __m512 x_f32x16 = _mm512_set1_ps(x[j]);
        signed_f32x16[j] = _mm512_mask_xor_ps(x_f32x16, negative, x_f32x16, _mm512_set1_ps(-0.0f));
    }
    return _mm512_add_ps(_mm512_add_ps(signed_f32x16[0], signed_f32x16[1]),
                         _mm512_add_ps(signed_f32x16[2], signed_f32x16[3]));
}

void prepare_fp32_avx512(const TokenInput& in, uint8_t* token) {
    float* table = reinterpret_cast<float*>(token + kTokenHeaderBytes);
    GroupPadding padding;
    __m512 offsets_f32x16 = _mm512_setzero_ps();
    for (size_t first = 0; first < in.k; first += kGroupInputs) {
        const GroupInput group_in = group_input(in, first, padding);
        alignas(64) float xs[kGroupInputs];
        for (size_t i = 0; i < kGroupInputs; i += 16) {
            offsets_f32x16 = add_offsets(offsets_f32x16, group_in, i);
            _mm512_store_ps(xs + i, _mm512_mul_ps(_mm512_set1_ps(in.multiplier), scaled_inputs(group_in, i)));
        }
        const size_t inputs = min_size(ceil_div(in.k - first, kTileInputs) * kTileInputs, kGroupInputs);
        for (size_t i = 0; i < inputs; i += kInputsPerTable, table += kTableFloats) {
            _mm512_store_ps(table, sign_sums(xs + i));
        }
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x16);
}

// The order of additions of one output does not depend on kTiles and kTokens: tables of a group, then groups.
template <int kTiles, int kTokens>
void tokens_fp32(const MultiplyArgs& a, size_t tile, size_t first_token) {
    const uint8_t* tables = a.tokens + first_token * a.token_stride_in_bytes + kTokenHeaderBytes;
    const uint8_t* bits = a.tiles + tile * a.k_tiles * kTileBytes;
    const size_t tile_stride = a.k_tiles * kTileBytes;
    __m512 total_f32x16[kTiles][kTokens];
    for (int n = 0; n < kTiles; ++n) {
        for (int t = 0; t < kTokens; ++t) total_f32x16[n][t] = _mm512_setzero_ps();
    }
    for (size_t group = 0; group * kGroupTiles < a.k_tiles; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        __m512 acc_f32x16[kTiles][kTokens];
        for (int n = 0; n < kTiles; ++n) {
            for (int t = 0; t < kTokens; ++t) acc_f32x16[n][t] = _mm512_setzero_ps();
        }
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            __m512i index_u32x16[kTiles];
            for (int n = 0; n < kTiles; ++n) {
                const uint8_t* v = bits + n * tile_stride + k_tile * kTileBytes;
                if (kTokens == 1) prefetch(v + kTiles * tile_stride);
                index_u32x16[n] = _mm512_loadu_si512(v);
            }
            for (size_t i = 0; i < kTablesPerTile; ++i) {
                const size_t at = (k_tile * kTablesPerTile + i) * kTableFloats * sizeof(float);
                for (int t = 0; t < kTokens; ++t) {
                    const __m512 table_f32x16 = _mm512_load_ps(tables + t * a.token_stride_in_bytes + at);
                    for (int n = 0; n < kTiles; ++n) {
                        const __m512 sum_f32x16 = _mm512_permutexvar_ps(index_u32x16[n], table_f32x16);
                        acc_f32x16[n][t] = _mm512_add_ps(acc_f32x16[n][t], sum_f32x16);
                    }
                }
                for (int n = 0; n < kTiles; ++n) index_u32x16[n] = _mm512_srli_epi32(index_u32x16[n], 4);
            }
        }
        for (int n = 0; n < kTiles; ++n) {
            for (int t = 0; t < kTokens; ++t) {
                __m512 value_f32x16 = acc_f32x16[n][t];
                if (a.block_scales) value_f32x16 = _mm512_mul_ps(block_scales(a, tile + n, group), value_f32x16);
                total_f32x16[n][t] = _mm512_add_ps(total_f32x16[n][t], value_f32x16);
            }
        }
    }
    for (int n = 0; n < kTiles; ++n) {
        for (int t = 0; t < kTokens; ++t) finish(a, first_token + t, tile + n, total_f32x16[n][t]);
    }
}

template <int kTiles>
void all_tokens_fp32(const MultiplyArgs& a, size_t tile) {
    size_t token = 0;
    for (; token + 4 <= a.m; token += 4) tokens_fp32<kTiles, 4>(a, tile, token);
    for (; token + 2 <= a.m; token += 2) tokens_fp32<kTiles, 2>(a, tile, token);
    for (; token < a.m; ++token) tokens_fp32<kTiles, 1>(a, tile, token);
}

void binary_matmul_fp32_avx512(const MultiplyArgs& a) {
    size_t tile = 0;
    for (; tile + 4 <= a.n_tiles; tile += 4) all_tokens_fp32<4>(a, tile);
    for (; tile < a.n_tiles; ++tile) all_tokens_fp32<1>(a, tile);
}

}  // namespace
}  // namespace fbiedge
