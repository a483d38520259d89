// AVX-512 (F, BW, DQ, VL) with VNNI. One 512-bit load is one tile: 32-bit lane r holds the 32 sign bits of row r.
//
// int8. `v & (1 << b)`, as 64 bytes, is plane b: byte 4r + j is (1 << b) where row r has a 1 for input 8j + b. vpdpbusd
// multiplies it with 4 activations (inputs b, 8+b, 16+b, 24+b, broadcast to all rows) and adds into 32-bit lanes, so
// lane r gathers (1 << b) * sum of q where the bit is 1. Activations are permuted to that order once a token. With
// P = sum of q where the bit is 1 and S = sum of q, the group's result is the integer 2P - S.
//   One token: planes b and 4 + b (of v >> 4) share an accumulator, which is divided by 1 << b at the group's end.
//   More tokens: the planes of a group are expanded to bytes 0/2 once (4 KB for two tiles, stays in L1) and reused, and
//   accumulators start at -S: they end as 2P - S.

#include "avx512_fp32.h"

namespace fbiedge {
namespace {

constexpr size_t kQuadsPerTile = 8;  // 32-bit words of 4 activations, one a plane
constexpr size_t kQuadsPerGroup = 32;

// 32 int8 in natural order (8j + b) -> plane order (4b + j): the transpose of 4 x 8 bytes.
void store_plane_order(__m128i low_i8x16, __m128i high_i8x16, int32_t* quads) {
    const __m128i j01_i8x16 = _mm_unpacklo_epi8(low_i8x16, _mm_srli_si128(low_i8x16, 8));
    const __m128i j23_i8x16 = _mm_unpacklo_epi8(high_i8x16, _mm_srli_si128(high_i8x16, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quads), _mm_unpacklo_epi16(j01_i8x16, j23_i8x16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quads + 4), _mm_unpackhi_epi16(j01_i8x16, j23_i8x16));
}

void prepare_int8_avx512vnni(const TokenInput& in, uint8_t* token) {
    const Int8Layout layout = int8_layout(in.k);
    float* scales = reinterpret_cast<float*>(token + layout.scales_at);
    int32_t* sums = reinterpret_cast<int32_t*>(token + layout.sums_at);
    int32_t* quads = reinterpret_cast<int32_t*>(token + layout.q_at);
    GroupPadding padding;
    __m512 offsets_f32x16 = _mm512_setzero_ps();
    for (size_t group = 0; group < layout.groups; ++group, quads += kQuadsPerGroup) {
        const GroupInput group_in = group_input(in, group * kGroupInputs, padding);
        const QuantisedGroup quantised = quantise_group(group_in, offsets_f32x16);
        for (size_t t = 0; t < kGroupTiles; ++t) {
            store_plane_order(quantised.q_i8x16[2 * t], quantised.q_i8x16[2 * t + 1], quads + t * kQuadsPerTile);
        }
        scales[group] = in.multiplier * quantised.scale;
        sums[group] = quantised.sum;
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x16);
}

struct Int8Token {
    const float* scales;
    const int32_t* sums;
    const int32_t* quads;
};

Int8Token int8_token(const MultiplyArgs& a, const Int8Layout& layout, size_t index) {
    const uint8_t* token = a.tokens + index * a.token_stride_in_bytes;
    return {reinterpret_cast<const float*>(token + layout.scales_at),
            reinterpret_cast<const int32_t*>(token + layout.sums_at),
            reinterpret_cast<const int32_t*>(token + layout.q_at)};
}

// total += d * (scale * float(value)), every operation rounded on its own; value is 2P - S.
__m512 add_group(const MultiplyArgs& a, size_t tile, size_t group, __m512 total_f32x16, __m512i value_i32x16,
                 float scale) {
    __m512 value_f32x16 = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(value_i32x16));
    if (a.block_scales) value_f32x16 = _mm512_mul_ps(block_scales(a, tile, group), value_f32x16);
    return _mm512_add_ps(total_f32x16, value_f32x16);
}

template <int kTiles>
void one_token_int8(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t token_index) {
    const Int8Token token = int8_token(a, layout, token_index);
    const uint8_t* bits = a.tiles + tile * a.k_tiles * kTileBytes;
    const size_t tile_stride = a.k_tiles * kTileBytes;
    const size_t ahead = prefetch_distance(kTiles * tile_stride);
    __m512 total_f32x16[kTiles];
    for (int n = 0; n < kTiles; ++n) total_f32x16[n] = _mm512_setzero_ps();
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        __m512i acc_i32x16[kTiles][4];
        for (int n = 0; n < kTiles; ++n) {
            for (int b = 0; b < 4; ++b) acc_i32x16[n][b] = _mm512_setzero_si512();
        }
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            const int32_t* quads = token.quads + k_tile * kQuadsPerTile;
            for (int n = 0; n < kTiles; ++n) {
                const uint8_t* v = bits + n * tile_stride + k_tile * kTileBytes;
                prefetch(v + ahead);
                const __m512i low_u8x64 = _mm512_loadu_si512(v);
                const __m512i high_u8x64 = _mm512_srli_epi16(low_u8x64, 4);
                for (int b = 0; b < 4; ++b) {
                    const __m512i mask_u8x64 = _mm512_set1_epi8(static_cast<char>(1 << b));
                    acc_i32x16[n][b] = _mm512_dpbusd_epi32(acc_i32x16[n][b], _mm512_and_si512(low_u8x64, mask_u8x64),
                                                           _mm512_set1_epi32(quads[b]));
                    acc_i32x16[n][b] = _mm512_dpbusd_epi32(acc_i32x16[n][b], _mm512_and_si512(high_u8x64, mask_u8x64),
                                                           _mm512_set1_epi32(quads[4 + b]));
                }
            }
        }
        for (int n = 0; n < kTiles; ++n) {
            const __m512i low_i32x16 = _mm512_add_epi32(acc_i32x16[n][0], _mm512_srai_epi32(acc_i32x16[n][1], 1));
            const __m512i high_i32x16 =
                _mm512_add_epi32(_mm512_srai_epi32(acc_i32x16[n][2], 2), _mm512_srai_epi32(acc_i32x16[n][3], 3));
            const __m512i positive_i32x16 = _mm512_add_epi32(low_i32x16, high_i32x16);
            const __m512i value_i32x16 =
                _mm512_sub_epi32(_mm512_slli_epi32(positive_i32x16, 1), _mm512_set1_epi32(token.sums[group]));
            total_f32x16[n] = add_group(a, tile + n, group, total_f32x16[n], value_i32x16, token.scales[group]);
        }
    }
    for (int n = 0; n < kTiles; ++n) finish(a, token_index, tile + n, total_f32x16[n]);
}

constexpr size_t kBlockTokens = 4;  // 4 tokens x 2 tiles = 8 accumulators; with 16, less of the epilogue overlaps

// Two tiles' state over all tokens, for one group after the other.
struct GemmState {
    alignas(64) uint8_t planes[2][kQuadsPerGroup][64];
    alignas(64) float totals[kMaxTokens][2][kTileRows];
};

template <int kTiles>
void expand_planes(const MultiplyArgs& a, size_t tile, size_t first_k_tile, size_t k_tiles, GemmState& state) {
    for (int n = 0; n < kTiles; ++n) {
        const uint8_t* bits = a.tiles + ((tile + n) * a.k_tiles + first_k_tile) * kTileBytes;
        for (size_t t = 0; t < k_tiles; ++t) {
            const __m512i v_u8x64 = _mm512_loadu_si512(bits + t * kTileBytes);
            for (int b = 0; b < 8; ++b) {
                const __m512i plane_u8x64 = _mm512_and_si512(v_u8x64, _mm512_set1_epi8(static_cast<char>(1 << b)));
                const __m512i byte_0_2_u8x64 =
                    b == 0 ? _mm512_slli_epi16(plane_u8x64, 1) : _mm512_srli_epi16(plane_u8x64, b - 1);
                _mm512_store_si512(state.planes[n][t * kQuadsPerTile + b], byte_0_2_u8x64);
            }
        }
    }
}

template <int kTiles>
void block_int8(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t group, size_t n_planes,
                size_t first_token, GemmState& state) {
    const uint8_t* tokens = a.tokens + first_token * a.token_stride_in_bytes;
    const uint8_t* quads = tokens + layout.q_at + group * kGroupInputs;
    __m512i acc_i32x16[kTiles][kBlockTokens];  // starts at -S and gathers 2P
    for (size_t t = 0; t < kBlockTokens; ++t) {
        const int32_t sum = int8_token(a, layout, first_token + t).sums[group];
        for (int n = 0; n < kTiles; ++n) acc_i32x16[n][t] = _mm512_set1_epi32(-sum);
    }
    for (size_t p = 0; p < n_planes; ++p) {
        __m512i plane_u8x64[kTiles];
        for (int n = 0; n < kTiles; ++n) plane_u8x64[n] = _mm512_load_si512(state.planes[n][p]);
        for (size_t t = 0; t < kBlockTokens; ++t) {
            const int32_t* token_quads = reinterpret_cast<const int32_t*>(quads + t * a.token_stride_in_bytes);
            const __m512i q_i8x64 = _mm512_set1_epi32(token_quads[p]);
            for (int n = 0; n < kTiles; ++n) {
                acc_i32x16[n][t] = _mm512_dpbusd_epi32(acc_i32x16[n][t], plane_u8x64[n], q_i8x64);
            }
        }
    }
    for (size_t t = 0; t < kBlockTokens; ++t) {
        const Int8Token token = int8_token(a, layout, first_token + t);
        for (int n = 0; n < kTiles; ++n) {
            float* totals = state.totals[first_token + t][n];
            const __m512 total_f32x16 = group == 0 ? _mm512_setzero_ps() : _mm512_load_ps(totals);
            _mm512_store_ps(totals, add_group(a, tile + n, group, total_f32x16, acc_i32x16[n][t], token.scales[group]));
        }
    }
}

template <int kTiles>
void many_tokens_int8(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t n_tokens, GemmState& state) {
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t first_k_tile = group * kGroupTiles, k_tiles = min_size(a.k_tiles - first_k_tile, kGroupTiles);
        const size_t n_planes = k_tiles * kQuadsPerTile;
        expand_planes<kTiles>(a, tile, first_k_tile, k_tiles, state);
        for (size_t token = 0; token < n_tokens; token += kBlockTokens) {
            block_int8<kTiles>(a, layout, tile, group, n_planes, token, state);
        }
    }
    for (size_t token = 0; token < n_tokens; ++token) {
        for (int n = 0; n < kTiles; ++n) finish(a, token, tile + n, _mm512_load_ps(state.totals[token][n]));
    }
}

// Whole blocks of tokens share expanded planes; below 8 tokens, expanding costs more than it saves.
template <int kTiles>
void tiles_int8(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, GemmState& state) {
    const size_t in_blocks = a.m / kBlockTokens * kBlockTokens;
    if (in_blocks > 0) many_tokens_int8<kTiles>(a, layout, tile, in_blocks, state);
    for (size_t token = in_blocks; token < a.m; ++token) one_token_int8<kTiles>(a, layout, tile, token);
}

void binary_matmul_int8_avx512vnni(const MultiplyArgs& a) {
    const Int8Layout layout = int8_layout(a.k);
    GemmState state;
    size_t tile = 0;
    for (; tile + 2 <= a.n_tiles; tile += 2) tiles_int8<2>(a, layout, tile, state);
    for (; tile < a.n_tiles; ++tile) tiles_int8<1>(a, layout, tile, state);
}

}  // namespace

const BinaryKernels kBinaryAvx512Vnni = {
    {token_bytes_fp32_avx512, prepare_fp32_avx512, binary_matmul_fp32_avx512},
    {int8_token_bytes, prepare_int8_avx512vnni, binary_matmul_int8_avx512vnni},
};

}  // namespace fbiedge
