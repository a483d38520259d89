// AVX2 with F16C. A tile is two 256-bit halves of 8 rows: 32-bit lane r holds the 32 sign bits of row r.
//
// int8. As in the AVX-512 kernel, plane b is `v & (1 << b)`, and its 4-byte lanes line up with the activations of
// inputs b, 8+b, 16+b, 24+b broadcast to all rows. vpmaddubsw adds pairs of products into 16-bit lanes. It saturates,
// so the sizes matter:
//   One token: planes b and 4 + b (of v >> 4) share an accumulator for b = 0..3. A pair is at most 2 * 8 * 127 = 2032,
//   and a group adds 4 tiles * 2 planes * 2032 = 16256 < 32768. Shifted right by b at the group's end, all exact.
//   More tokens: planes are expanded to bytes 0/1 once a group (2 KB, stays in L1); 32 planes * 254 = 8128.
// Only then are the pairs widened to 32 bits, once a group.
//
// fp32. The sign bits of 3 inputs select one of 8 sums, tabulated once a token; vpermps does 8 rows x 3 inputs at a
// time and ignores the bits above the lowest 3. 32 inputs are 11 tables, the last one of 2 inputs.

#include <immintrin.h>

#include "../kernel_table.h"

namespace fbiedge {
namespace {

constexpr size_t kHalfRows = 8;
constexpr size_t kInputsPerTable = 3;
constexpr size_t kTableFloats = 8;
constexpr size_t kTablesPerTile = 11;
constexpr size_t kQuadsPerTile = 8;  // 32-bit words of 4 activations, one a plane
constexpr size_t kQuadsPerGroup = 32;

// Lanes 8, 4, 2, 1 apart: the order of the scalar kernel.
float sum_lanes(__m256 low_f32x8, __m256 high_f32x8) {
    const __m256 sum_f32x8 = _mm256_add_ps(low_f32x8, high_f32x8);
    __m128 sum_f32x4 = _mm_add_ps(_mm256_castps256_ps128(sum_f32x8), _mm256_extractf128_ps(sum_f32x8, 1));
    sum_f32x4 = _mm_add_ps(sum_f32x4, _mm_movehl_ps(sum_f32x4, sum_f32x4));
    return _mm_cvtss_f32(_mm_add_ss(sum_f32x4, _mm_shuffle_ps(sum_f32x4, sum_f32x4, 1)));
}

__m256 add_offsets(__m256 sum_f32x8, const GroupInput& in, size_t at) {
    const __m256 x_f32x8 = _mm256_loadu_ps(in.x + at);
    if (!in.beta) return _mm256_add_ps(sum_f32x8, x_f32x8);
    return _mm256_add_ps(sum_f32x8, _mm256_mul_ps(_mm256_loadu_ps(in.beta + at), x_f32x8));
}

__m256 scaled_inputs(const GroupInput& in, size_t at) {
    const __m256 x_f32x8 = _mm256_loadu_ps(in.x + at);
    return in.alpha ? _mm256_mul_ps(_mm256_loadu_ps(in.alpha + at), x_f32x8) : x_f32x8;
}

__m256 block_scales(const MultiplyArgs& a, size_t tile, size_t half, size_t group) {
    const size_t index = (tile * ceil_div(a.k, kGroupInputs) + group) * kTileRows + half * kHalfRows;
    if (!a.block_scales_fp16) return _mm256_loadu_ps(static_cast<const float*>(a.block_scales) + index);
    const uint16_t* halves = static_cast<const uint16_t*>(a.block_scales) + index;
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

void finish(const MultiplyArgs& a, size_t token, size_t tile, size_t half, __m256 total_f32x8) {
    const __m256 sum_f32x8 = _mm256_set1_ps(*offset_sum(a.tokens + token * a.token_stride_in_bytes));
    const size_t row = tile * a.row_step + half * kHalfRows;
    const size_t out = tile * kTileRows + half * kHalfRows;
    if (a.row_alpha) total_f32x8 = _mm256_mul_ps(_mm256_loadu_ps(a.row_alpha + row), total_f32x8);
    if (a.row_beta) {
        const __m256 offset_f32x8 = _mm256_mul_ps(_mm256_loadu_ps(a.row_beta + row), sum_f32x8);
        total_f32x8 = _mm256_add_ps(total_f32x8, offset_f32x8);
    }
    if (a.add_offset_sum) total_f32x8 = _mm256_add_ps(total_f32x8, sum_f32x8);
    if (a.bias) total_f32x8 = _mm256_add_ps(total_f32x8, _mm256_loadu_ps(a.bias + token * a.bias_stride + out));
    _mm256_storeu_ps(a.y + token * a.y_stride + out, total_f32x8);
}

// Brings in what is needed two tiles on: the hardware prefetcher restarts with every tile. A prefetch past the end does
// nothing.
void prefetch(const uint8_t* bits) { _mm_prefetch(reinterpret_cast<const char*>(bits), _MM_HINT_T1); }

__m256i load_half(const uint8_t* tile, size_t half) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + half * 32));
}

// --- int8 level
// -------------------------------------------------------------------------------------------------------

uint32_t max_lane(__m256i v_u32x8) {
    __m128i max_u32x4 = _mm_max_epu32(_mm256_castsi256_si128(v_u32x8), _mm256_extracti128_si256(v_u32x8, 1));
    max_u32x4 = _mm_max_epu32(max_u32x4, _mm_shuffle_epi32(max_u32x4, 0x4e));
    max_u32x4 = _mm_max_epu32(max_u32x4, _mm_shuffle_epi32(max_u32x4, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(max_u32x4));
}

int32_t add_lanes(__m256i v_i32x8) {
    __m128i sum_i32x4 = _mm_add_epi32(_mm256_castsi256_si128(v_i32x8), _mm256_extracti128_si256(v_i32x8, 1));
    sum_i32x4 = _mm_add_epi32(sum_i32x4, _mm_shuffle_epi32(sum_i32x4, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum_i32x4, _mm_shuffle_epi32(sum_i32x4, 0xb1)));
}

// 16 int32 -> 16 int8 in order. The values fit, so the saturating packs change nothing.
__m128i narrow(__m256i low_i32x8, __m256i high_i32x8) {
    const __m256i i16x16 = _mm256_permute4x64_epi64(_mm256_packs_epi32(low_i32x8, high_i32x8), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(i16x16), _mm256_extracti128_si256(i16x16, 1));
}

// 32 int8 in natural order (8j + b) -> plane order (4b + j): the transpose of 4 x 8 bytes.
void store_plane_order(__m128i low_i8x16, __m128i high_i8x16, int32_t* quads) {
    const __m128i j01_i8x16 = _mm_unpacklo_epi8(low_i8x16, _mm_srli_si128(low_i8x16, 8));
    const __m128i j23_i8x16 = _mm_unpacklo_epi8(high_i8x16, _mm_srli_si128(high_i8x16, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quads), _mm_unpacklo_epi16(j01_i8x16, j23_i8x16));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quads + 4), _mm_unpackhi_epi16(j01_i8x16, j23_i8x16));
}

void prepare_int8_avx2(const TokenInput& in, uint8_t* token) {
    const Int8Layout layout = int8_layout(in.k);
    float* scales = reinterpret_cast<float*>(token + layout.scales_at);
    int32_t* sums = reinterpret_cast<int32_t*>(token + layout.sums_at);
    int32_t* quads = reinterpret_cast<int32_t*>(token + layout.q_at);
    GroupPadding padding;
    __m256 offsets_f32x8[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t group = 0; group < layout.groups; ++group, quads += kQuadsPerGroup) {
        const GroupInput group_in = group_input(in, group * kGroupInputs, padding);
        __m256 xs_f32x8[16];
        __m256i peak_u32x8 = _mm256_setzero_si256();
        for (size_t i = 0; i < 16; ++i) {
            offsets_f32x8[i % 2] = add_offsets(offsets_f32x8[i % 2], group_in, 8 * i);
            xs_f32x8[i] = scaled_inputs(group_in, 8 * i);
            const __m256i magnitude_u32x8 =
                _mm256_and_si256(_mm256_castps_si256(xs_f32x8[i]), _mm256_set1_epi32(0x7fffffff));
            peak_u32x8 = _mm256_max_epu32(peak_u32x8, magnitude_u32x8);
        }
        const float scale = group_scale(max_lane(peak_u32x8));
        const __m256 scale_f32x8 = _mm256_set1_ps(scale);
        const __m256i usable_i32x8 = _mm256_set1_epi32(scale_is_usable(scale) ? -1 : 0);
        __m256i sum_i32x8 = _mm256_setzero_si256();
        __m128i q_i8x16[8];
        for (size_t i = 0; i < 8; ++i) {
            __m256i q_i32x8[2];
            for (size_t j = 0; j < 2; ++j) {
                const __m256 ratio_f32x8 = _mm256_div_ps(xs_f32x8[2 * i + j], scale_f32x8);
                const __m256 rounded_f32x8 =
                    _mm256_round_ps(ratio_f32x8, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                q_i32x8[j] = _mm256_and_si256(_mm256_cvtps_epi32(rounded_f32x8), usable_i32x8);
                sum_i32x8 = _mm256_add_epi32(sum_i32x8, q_i32x8[j]);
            }
            q_i8x16[i] = narrow(q_i32x8[0], q_i32x8[1]);
        }
        for (size_t t = 0; t < kGroupTiles; ++t) {
            store_plane_order(q_i8x16[2 * t], q_i8x16[2 * t + 1], quads + t * kQuadsPerTile);
        }
        scales[group] = in.multiplier * scale;
        sums[group] = add_lanes(sum_i32x8);
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x8[0], offsets_f32x8[1]);
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

// total += d * (scale * float(2P - S)), every operation rounded on its own. `pairs` holds P as two 16-bit halves a row.
__m256 add_group(const MultiplyArgs& a, size_t tile, size_t half, size_t group, __m256 total_f32x8,
                 __m256i pairs_i16x16, float scale, int32_t sum) {
    const __m256i positive_i32x8 = _mm256_madd_epi16(pairs_i16x16, _mm256_set1_epi16(1));
    const __m256i value_i32x8 = _mm256_sub_epi32(_mm256_slli_epi32(positive_i32x8, 1), _mm256_set1_epi32(sum));
    __m256 value_f32x8 = _mm256_mul_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(value_i32x8));
    if (a.block_scales) value_f32x8 = _mm256_mul_ps(block_scales(a, tile, half, group), value_f32x8);
    return _mm256_add_ps(total_f32x8, value_f32x8);
}

void one_token_int8(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t token_index) {
    const Int8Token token = int8_token(a, layout, token_index);
    const uint8_t* bits = a.tiles + tile * a.k_tiles * kTileBytes;
    __m256 total_f32x8[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        __m256i acc_i16x16[2][4];
        for (int h = 0; h < 2; ++h) {
            for (int b = 0; b < 4; ++b) acc_i16x16[h][b] = _mm256_setzero_si256();
        }
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            const int32_t* quads = token.quads + k_tile * kQuadsPerTile;
            prefetch(bits + (2 * a.k_tiles + k_tile) * kTileBytes);
            const __m256i low_u8x32[2] = {load_half(bits + k_tile * kTileBytes, 0),
                                          load_half(bits + k_tile * kTileBytes, 1)};
            const __m256i high_u8x32[2] = {_mm256_srli_epi16(low_u8x32[0], 4), _mm256_srli_epi16(low_u8x32[1], 4)};
            for (int b = 0; b < 4; ++b) {
                const __m256i mask_u8x32 = _mm256_set1_epi8(static_cast<char>(1 << b));
                const __m256i low_q_i8x32 = _mm256_set1_epi32(quads[b]), high_q_i8x32 = _mm256_set1_epi32(quads[4 + b]);
                for (int h = 0; h < 2; ++h) {
                    const __m256i low_i16x16 =
                        _mm256_maddubs_epi16(_mm256_and_si256(low_u8x32[h], mask_u8x32), low_q_i8x32);
                    const __m256i high_i16x16 =
                        _mm256_maddubs_epi16(_mm256_and_si256(high_u8x32[h], mask_u8x32), high_q_i8x32);
                    acc_i16x16[h][b] = _mm256_add_epi16(acc_i16x16[h][b], _mm256_add_epi16(low_i16x16, high_i16x16));
                }
            }
        }
        for (int h = 0; h < 2; ++h) {
            const __m256i low_i16x16 = _mm256_add_epi16(acc_i16x16[h][0], _mm256_srai_epi16(acc_i16x16[h][1], 1));
            const __m256i high_i16x16 =
                _mm256_add_epi16(_mm256_srai_epi16(acc_i16x16[h][2], 2), _mm256_srai_epi16(acc_i16x16[h][3], 3));
            total_f32x8[h] = add_group(a, tile, h, group, total_f32x8[h], _mm256_add_epi16(low_i16x16, high_i16x16),
                                       token.scales[group], token.sums[group]);
        }
    }
    for (int h = 0; h < 2; ++h) finish(a, token_index, tile, h, total_f32x8[h]);
}

constexpr size_t kBlockTokens = 4;  // 4 tokens x 2 halves = 8 accumulators of 16 registers

// One tile's state over all tokens, for one group after the other.
struct GemmState {
    alignas(64) uint8_t planes[kQuadsPerGroup][2][32];
    alignas(64) float totals[kMaxTokens][2][kHalfRows];
};

void expand_planes(const MultiplyArgs& a, size_t tile, size_t first_k_tile, size_t k_tiles, GemmState& state) {
    const uint8_t* bits = a.tiles + (tile * a.k_tiles + first_k_tile) * kTileBytes;
    for (size_t t = 0; t < k_tiles; ++t) {
        for (int h = 0; h < 2; ++h) {
            const __m256i v_u8x32 = load_half(bits + t * kTileBytes, h);
            for (int b = 0; b < 8; ++b) {
                const __m256i plane_u8x32 = _mm256_and_si256(v_u8x32, _mm256_set1_epi8(static_cast<char>(1 << b)));
                _mm256_store_si256(reinterpret_cast<__m256i*>(state.planes[t * kQuadsPerTile + b][h]),
                                   _mm256_srli_epi16(plane_u8x32, b));
            }
        }
    }
}

void block_int8(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t group, size_t n_planes,
                size_t first_token, GemmState& state) {
    const uint8_t* quads = a.tokens + first_token * a.token_stride_in_bytes + layout.q_at + group * kGroupInputs;
    __m256i acc_i16x16[2][kBlockTokens];
    for (int h = 0; h < 2; ++h) {
        for (size_t t = 0; t < kBlockTokens; ++t) acc_i16x16[h][t] = _mm256_setzero_si256();
    }
    for (size_t p = 0; p < n_planes; ++p) {
        const __m256i low_u8x32 = _mm256_load_si256(reinterpret_cast<const __m256i*>(state.planes[p][0]));
        const __m256i high_u8x32 = _mm256_load_si256(reinterpret_cast<const __m256i*>(state.planes[p][1]));
        for (size_t t = 0; t < kBlockTokens; ++t) {
            const int32_t* token_quads = reinterpret_cast<const int32_t*>(quads + t * a.token_stride_in_bytes);
            const __m256i q_i8x32 = _mm256_set1_epi32(token_quads[p]);
            acc_i16x16[0][t] = _mm256_add_epi16(acc_i16x16[0][t], _mm256_maddubs_epi16(low_u8x32, q_i8x32));
            acc_i16x16[1][t] = _mm256_add_epi16(acc_i16x16[1][t], _mm256_maddubs_epi16(high_u8x32, q_i8x32));
        }
    }
    for (size_t t = 0; t < kBlockTokens; ++t) {
        const Int8Token token = int8_token(a, layout, first_token + t);
        for (int h = 0; h < 2; ++h) {
            float* totals = state.totals[first_token + t][h];
            const __m256 total_f32x8 = group == 0 ? _mm256_setzero_ps() : _mm256_load_ps(totals);
            _mm256_store_ps(totals, add_group(a, tile, h, group, total_f32x8, acc_i16x16[h][t], token.scales[group],
                                              token.sums[group]));
        }
    }
}

void many_tokens_int8(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t n_tokens, GemmState& state) {
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t first_k_tile = group * kGroupTiles, k_tiles = min_size(a.k_tiles - first_k_tile, kGroupTiles);
        const size_t n_planes = k_tiles * kQuadsPerTile;
        expand_planes(a, tile, first_k_tile, k_tiles, state);
        for (size_t token = 0; token < n_tokens; token += kBlockTokens) {
            block_int8(a, layout, tile, group, n_planes, token, state);
        }
    }
    for (size_t token = 0; token < n_tokens; ++token) {
        for (int h = 0; h < 2; ++h) finish(a, token, tile, h, _mm256_load_ps(state.totals[token][h]));
    }
}

void binary_matmul_int8_avx2(const MultiplyArgs& a) {
    const Int8Layout layout = int8_layout(a.k);
    const size_t in_blocks = a.m / kBlockTokens * kBlockTokens;
    GemmState state;
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        if (in_blocks > 0) many_tokens_int8(a, layout, tile, in_blocks, state);
        for (size_t token = in_blocks; token < a.m; ++token) one_token_int8(a, layout, tile, token);
    }
}

// --- fp32 level
// -------------------------------------------------------------------------------------------------------

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
    {int8_token_bytes, prepare_int8_avx2, binary_matmul_int8_avx2},
};

}  // namespace fbiedge
