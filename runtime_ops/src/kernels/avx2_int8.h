// AVX2: the int8 level by looking sums up.
//
// The signs of 4 inputs select one of 16 sums, tabulated once a token. vpshufb looks up 16 bytes at once in a table of
// 16, in each half of a register: so a half must hold the same 4 inputs of 16 rows. load_rows transposes a tile to
// that, with 6 shuffles. A sum needs 10 bits, so it comes in two parts from two tables: 64 multiply-accumulates for a
// vpshufb and a vpaddb, where vpmaddubsw and vpaddw do 32.
//
// With P the sum of q where the bit is 1, a table entry is split exactly into low = P mod 32 (0..31) and
// high = floor(P / 32) + 16 (0..31): |P| <= 4 * 127 = 508. Byte lanes gather 8 entries a group (4 tiles, 2 tables
// each), 248 at most. At the group's end vpmaddubsw weighs the parts by 2 and 64, and the 4 bytes of a row are added:
// I = 2P - S = 2 * low + 64 * high - (64 * 16 * entries + S). The sums wrap at 16 bits and I fits them, so I is right.
#pragma once

#include "avx2.h"

namespace fbiedge {
namespace {

// Where the tables of a tile are. Pass 0 is bytes 0 and 2 of a row, in the lower and the upper half of a register, pass
// 1 is bytes 1 and 3. Half 0 is the lower 4 bits of each byte.
constexpr size_t kPasses = 2, kHalves = 2;
constexpr size_t kPartBytes = 32;
constexpr size_t kHalfTables = 2 * kPartBytes;  // low, then high
constexpr size_t kPassTables = kHalves * kHalfTables;
constexpr size_t kTileTables = kPasses * kPassTables;
constexpr size_t kGroupTables = kGroupTiles * kTileTables;  // 1 KB: 8 bytes an input
constexpr int32_t kHighOffset = 16;
constexpr int32_t kEntries = 32;  // a row adds in a group, always of 4 tiles

FBIEDGE_ALWAYS_INLINE __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
FBIEDGE_ALWAYS_INLINE void store(void* at, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(at), v); }

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

// P of 16 entries for a quad of inputs in each half, as 16-bit: entries 0..7, then 8..15.
struct Sums {
    __m256i first_i16x16, last_i16x16;
};

int bits_as_bytes(int e) { return (e & 1) | (e & 2) << 7 | (e & 4) << 14 | (e & 8) << 21; }

// 4 entries, first to first + 3, as 4 bytes each: byte i is bit i of the entry.
__m256i chosen(int first) {
    const __m128i entries_u8x16 = _mm_setr_epi32(bits_as_bytes(first), bits_as_bytes(first + 1),
                                                 bits_as_bytes(first + 2), bits_as_bytes(first + 3));
    return _mm256_broadcastsi128_si256(entries_u8x16);
}

Sums all_sums(__m256i quad_i8x32) {
    return {
        _mm256_hadd_epi16(_mm256_maddubs_epi16(chosen(0), quad_i8x32), _mm256_maddubs_epi16(chosen(4), quad_i8x32)),
        _mm256_hadd_epi16(_mm256_maddubs_epi16(chosen(8), quad_i8x32), _mm256_maddubs_epi16(chosen(12), quad_i8x32))};
}

void store_tables(__m256i quad_i8x32, uint8_t* tables) {
    const Sums sums = all_sums(quad_i8x32);
    const __m256i mask_u16x16 = _mm256_set1_epi16(31);
    const __m256i low_u8x32 = _mm256_packus_epi16(_mm256_and_si256(sums.first_i16x16, mask_u16x16),
                                                  _mm256_and_si256(sums.last_i16x16, mask_u16x16));
    const __m256i high_i8x32 =
        _mm256_packs_epi16(_mm256_srai_epi16(sums.first_i16x16, 5), _mm256_srai_epi16(sums.last_i16x16, 5));
    store(tables, low_u8x32);
    store(tables + kPartBytes, _mm256_add_epi8(high_i8x32, _mm256_set1_epi8(kHighOffset)));
}

struct Token {
    const float* scales;
    const int32_t* corrections;
    const uint8_t* tables;
};

FBIEDGE_ALWAYS_INLINE Token token_at(const MultiplyArgs& a, const Int8Layout& layout, size_t index) {
    const uint8_t* token = a.tokens + index * a.token_stride_in_bytes;
    return {reinterpret_cast<const float*>(token + layout.scales_at),
            reinterpret_cast<const int32_t*>(token + layout.sums_at), token + layout.q_at};
}

// A tile by bytes: half h of pass p has byte 2h + p of the 16 rows.
struct Rows {
    __m256i pass_u8x32[kPasses];
};

FBIEDGE_ALWAYS_INLINE Rows load_rows(const uint8_t* tile) {
    // In each half 4 rows x 4 bytes -> byte 0 of the 4 rows, byte 1, ...; then bytes 0 and 1 of 8 rows | bytes 2 and 3.
    const __m256i transpose_u8x32 =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i together_u32x8 = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i upper_u8x32 =
        _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(load(tile), transpose_u8x32), together_u32x8);
    const __m256i lower_u8x32 =
        _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(load(tile + 32), transpose_u8x32), together_u32x8);
    return {{_mm256_unpacklo_epi64(upper_u8x32, lower_u8x32), _mm256_unpackhi_epi64(upper_u8x32, lower_u8x32)}};
}

// v >> 4 as a multiplication: Zen shifts where it shuffles, and shuffles are the bottleneck.
FBIEDGE_ALWAYS_INLINE __m256i index_of_half(__m256i v_u8x32, size_t half) {
    const __m256i bits_u8x32 = half == 0 ? v_u8x32 : _mm256_mulhi_epu16(v_u8x32, _mm256_set1_epi16(1 << 12));
    return _mm256_and_si256(bits_u8x32, _mm256_set1_epi8(15));
}

// Sums of one tile, token and pass over a group.
struct Gathered {
    __m256i low_u8x32, high_u8x32;
};

// Without the barrier, GCC moves all lookups before all additions and runs out of registers: half the speed.
FBIEDGE_ALWAYS_INLINE void gather(Gathered& sums, __m256i index_u8x32, __m256i low_table_u8x32,
                                  __m256i high_table_u8x32) {
    sums.low_u8x32 = _mm256_add_epi8(sums.low_u8x32, _mm256_shuffle_epi8(low_table_u8x32, index_u8x32));
    sums.high_u8x32 = _mm256_add_epi8(sums.high_u8x32, _mm256_shuffle_epi8(high_table_u8x32, index_u8x32));
#if defined(__GNUC__)
    __asm__("" : "+x"(sums.low_u8x32), "+x"(sums.high_u8x32));
#endif
}

// 2 * low + 64 * high, rows 0..7 and 8..15; the two halves are yet to be added.
struct Weighed {
    __m256i upper_i16x16, lower_i16x16;
};

FBIEDGE_ALWAYS_INLINE Weighed weigh(const Gathered& sums) {
    const __m256i weights_i8x32 = _mm256_set1_epi16(64 << 8 | 2);
    return {_mm256_maddubs_epi16(_mm256_unpacklo_epi8(sums.low_u8x32, sums.high_u8x32), weights_i8x32),
            _mm256_maddubs_epi16(_mm256_unpackhi_epi8(sums.low_u8x32, sums.high_u8x32), weights_i8x32)};
}

FBIEDGE_ALWAYS_INLINE Weighed add(const Weighed& a, const Weighed& b) {
    return {_mm256_add_epi16(a.upper_i16x16, b.upper_i16x16), _mm256_add_epi16(a.lower_i16x16, b.lower_i16x16)};
}

struct Totals {
    __m256 half_f32x8[2];
};

// total += d * (scale * float(I)), every operation rounded on its own.
FBIEDGE_ALWAYS_INLINE void add_group(const MultiplyArgs& a, size_t tile, size_t group, Totals& totals,
                                     const Weighed& sums, int32_t correction, float scale) {
    const __m256i both_i16x16 = _mm256_add_epi16(_mm256_permute2x128_si256(sums.upper_i16x16, sums.lower_i16x16, 0x20),
                                                 _mm256_permute2x128_si256(sums.upper_i16x16, sums.lower_i16x16, 0x31));
    const __m256i value_i16x16 = _mm256_sub_epi16(both_i16x16, _mm256_set1_epi16(static_cast<int16_t>(correction)));
    const __m128i value_i16x8[2] = {_mm256_castsi256_si128(value_i16x16), _mm256_extracti128_si256(value_i16x16, 1)};
    for (int h = 0; h < 2; ++h) {
        const __m256 value_f32x8 = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(value_i16x8[h]));
        __m256 scaled_f32x8 = _mm256_mul_ps(_mm256_set1_ps(scale), value_f32x8);
        if (a.block_scales) scaled_f32x8 = _mm256_mul_ps(block_scales(a, tile, h, group), scaled_f32x8);
        totals.half_f32x8[h] = _mm256_add_ps(totals.half_f32x8[h], scaled_f32x8);
    }
}

FBIEDGE_ALWAYS_INLINE void gather_tile(Gathered& first, Gathered& second, const uint8_t* tile, const uint8_t* tables) {
    const Rows rows = load_rows(tile);
    gather(first, index_of_half(rows.pass_u8x32[0], 0), load(tables), load(tables + 32));
    gather(first, index_of_half(rows.pass_u8x32[0], 1), load(tables + 64), load(tables + 96));
    gather(second, index_of_half(rows.pass_u8x32[1], 0), load(tables + 128), load(tables + 160));
    gather(second, index_of_half(rows.pass_u8x32[1], 1), load(tables + 192), load(tables + 224));
}

// One tile row of a group, straight from the weights.
FBIEDGE_ALWAYS_INLINE Weighed gather_group(const uint8_t* bits, const uint8_t* tables) {
    const __m256i zero = _mm256_setzero_si256();
    Gathered first = {zero, zero}, second = first;
    gather_tile(first, second, bits, tables);
    gather_tile(first, second, bits + kTileBytes, tables + kTileTables);
    gather_tile(first, second, bits + 2 * kTileBytes, tables + 2 * kTileTables);
    gather_tile(first, second, bits + 3 * kTileBytes, tables + 3 * kTileTables);
    return add(weigh(first), weigh(second));
}

// The tiles of a last group that ends early, filled up.
struct GroupBits {
    alignas(32) uint8_t bytes[kGroupTiles * kTileBytes];
};

const uint8_t* whole_group(const uint8_t* bits, size_t k_tiles, GroupBits& filled) {
    if (k_tiles == kGroupTiles) return bits;
    memset(filled.bytes, 0, sizeof filled.bytes);
    memcpy(filled.bytes, bits, k_tiles * kTileBytes);
    return filled.bytes;
}

// One token: weights come from memory, once, and indices are made as they come.
template <int kTiles>
void stream_tiles(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t token_index) {
    const Token token = token_at(a, layout, token_index);
    const size_t tile_stride = a.k_tiles * kTileBytes;
    const size_t ahead = prefetch_distance(kTiles * tile_stride);
    Totals totals[kTiles];
    GroupBits filled;
    for (int n = 0; n < kTiles; ++n) totals[n] = {{_mm256_setzero_ps(), _mm256_setzero_ps()}};
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t first_k_tile = group * kGroupTiles, k_tiles = min_size(a.k_tiles - first_k_tile, kGroupTiles);
        for (int n = 0; n < kTiles; ++n) {
            const uint8_t* bits = a.tiles + (tile + n) * tile_stride + first_k_tile * kTileBytes;
            for (size_t t = 0; t < kGroupTiles; ++t) prefetch(bits + ahead + t * kTileBytes);
            const Weighed sums = gather_group(whole_group(bits, k_tiles, filled), token.tables + group * kGroupTables);
            add_group(a, tile + n, group, totals[n], sums, token.corrections[group], token.scales[group]);
        }
    }
    for (int n = 0; n < kTiles; ++n) {
        for (size_t h = 0; h < 2; ++h) finish(a, token_index, tile + n, h, totals[n].half_f32x8[h]);
    }
}

constexpr int kSharedTiles = 4;

// State of some tiles over all tokens, for one group after the other.
struct SharedState {
    alignas(64) uint8_t indices[kPasses][kGroupTiles * kHalves][kSharedTiles][32];
    alignas(64) float totals[kMaxTokens][kSharedTiles][kTileRows];
};

void make_indices(const MultiplyArgs& a, size_t tile, size_t first_k_tile, size_t k_tiles, SharedState& state) {
    GroupBits filled;
    for (size_t n = 0; n < kSharedTiles; ++n) {
        const uint8_t* own_bits = a.tiles + ((tile + n) * a.k_tiles + first_k_tile) * kTileBytes;
        const uint8_t* bits = whole_group(own_bits, k_tiles, filled);
        for (size_t t = 0; t < kGroupTiles; ++t) {
            const Rows rows = load_rows(bits + t * kTileBytes);
            for (size_t pass = 0; pass < kPasses; ++pass) {
                for (size_t half = 0; half < kHalves; ++half) {
                    store(state.indices[pass][t * kHalves + half][n], index_of_half(rows.pass_u8x32[pass], half));
                }
            }
        }
    }
}

// Named and not in an array, so that they stay in registers: 8 accumulators of 16.
struct FourTiles {
    Gathered n0, n1, n2, n3;
};

FBIEDGE_ALWAYS_INLINE void gather_half(FourTiles& sums, const uint8_t* tables,
                                       const uint8_t (&indices)[kSharedTiles][32]) {
    const __m256i low_table_u8x32 = load(tables), high_table_u8x32 = load(tables + kPartBytes);
    gather(sums.n0, load(indices[0]), low_table_u8x32, high_table_u8x32);
    gather(sums.n1, load(indices[1]), low_table_u8x32, high_table_u8x32);
    gather(sums.n2, load(indices[2]), low_table_u8x32, high_table_u8x32);
    gather(sums.n3, load(indices[3]), low_table_u8x32, high_table_u8x32);
}

// One pass of one token over a group. Written out: GCC copies accumulators around in loops.
FBIEDGE_ALWAYS_INLINE void gather_pass(const uint8_t* tables, const uint8_t (*indices)[kSharedTiles][32],
                                       Weighed (&weighed)[kSharedTiles]) {
    const __m256i zero = _mm256_setzero_si256();
    FourTiles sums = {{zero, zero}, {zero, zero}, {zero, zero}, {zero, zero}};
    gather_half(sums, tables, indices[0]);
    gather_half(sums, tables + kHalfTables, indices[1]);
    gather_half(sums, tables + kTileTables, indices[2]);
    gather_half(sums, tables + kTileTables + kHalfTables, indices[3]);
    gather_half(sums, tables + 2 * kTileTables, indices[4]);
    gather_half(sums, tables + 2 * kTileTables + kHalfTables, indices[5]);
    gather_half(sums, tables + 3 * kTileTables, indices[6]);
    gather_half(sums, tables + 3 * kTileTables + kHalfTables, indices[7]);
    weighed[0] = weigh(sums.n0);
    weighed[1] = weigh(sums.n1);
    weighed[2] = weigh(sums.n2);
    weighed[3] = weigh(sums.n3);
}

void gather_token(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, size_t group, size_t token_index,
                  SharedState& state) {
    const Token token = token_at(a, layout, token_index);
    const uint8_t* tables = token.tables + group * kGroupTables;
    Weighed first[kSharedTiles], second[kSharedTiles];
    gather_pass(tables, state.indices[0], first);
    gather_pass(tables + kPassTables, state.indices[1], second);
    for (int n = 0; n < kSharedTiles; ++n) {
        float* at = state.totals[token_index][n];
        Totals totals;
        for (int h = 0; h < 2; ++h) totals.half_f32x8[h] = _mm256_load_ps(at + h * kHalfRows);
        const Weighed sums = add(first[n], second[n]);
        add_group(a, tile + n, group, totals, sums, token.corrections[group], token.scales[group]);
        for (int h = 0; h < 2; ++h) _mm256_store_ps(at + h * kHalfRows, totals.half_f32x8[h]);
    }
}

void share_tiles(const MultiplyArgs& a, const Int8Layout& layout, size_t tile, SharedState& state) {
    memset(state.totals, 0, a.m * sizeof state.totals[0]);
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t first_k_tile = group * kGroupTiles;
        make_indices(a, tile, first_k_tile, min_size(a.k_tiles - first_k_tile, kGroupTiles), state);
        for (size_t token = 0; token < a.m; ++token) gather_token(a, layout, tile, group, token, state);
    }
    for (size_t token = 0; token < a.m; ++token) {
        for (int n = 0; n < kSharedTiles; ++n) {
            const float* totals = state.totals[token][n];
            for (size_t h = 0; h < 2; ++h) finish(a, token, tile + n, h, _mm256_load_ps(totals + h * kHalfRows));
        }
    }
}

template <int kTiles>
void stream_tokens(const MultiplyArgs& a, const Int8Layout& layout, size_t tile) {
    for (size_t token = 0; token < a.m; ++token) stream_tiles<kTiles>(a, layout, tile, token);
}

size_t token_bytes_int8_avx2(size_t k) {
    const Int8Layout layout = int8_layout(k);
    return layout.q_at + layout.groups * kGroupTables;
}

void prepare_int8_avx2(const TokenInput& in, uint8_t* token) {
    const Int8Layout layout = int8_layout(in.k);
    float* scales = reinterpret_cast<float*>(token + layout.scales_at);
    int32_t* corrections = reinterpret_cast<int32_t*>(token + layout.sums_at);
    uint8_t* tables = token + layout.q_at;
    GroupPadding padding;
    __m256 offsets_f32x8[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t group = 0; group < layout.groups; ++group) {
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
        for (size_t t = 0; t < kGroupTiles; ++t, tables += kTileTables) {
            const __m256i q_i8x32 =
                _mm256_inserti128_si256(_mm256_castsi128_si256(q_i8x16[2 * t]), q_i8x16[2 * t + 1], 1);
            // Quad 2j + half is inputs 8j + 4 * half to + 3. Bytes j and j + 2 are in the two halves of the register.
            store_tables(_mm256_shuffle_epi32(q_i8x32, 0x00), tables);
            store_tables(_mm256_shuffle_epi32(q_i8x32, 0x55), tables + kHalfTables);
            store_tables(_mm256_shuffle_epi32(q_i8x32, 0xaa), tables + kPassTables);
            store_tables(_mm256_shuffle_epi32(q_i8x32, 0xff), tables + kPassTables + kHalfTables);
        }
        scales[group] = in.multiplier * scale;
        corrections[group] = 64 * kHighOffset * kEntries + add_lanes(sum_i32x8);
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x8[0], offsets_f32x8[1]);
}

// From 3 tokens on, sharing indices is worth writing them down.
void binary_matmul_int8_avx2(const MultiplyArgs& a) {
    const Int8Layout layout = int8_layout(a.k);
    SharedState state;
    size_t tile = 0;
    if (a.m >= 3) {
        for (; tile + kSharedTiles <= a.n_tiles; tile += kSharedTiles) share_tiles(a, layout, tile, state);
    }
    for (; tile + 2 <= a.n_tiles; tile += 2) stream_tokens<2>(a, layout, tile);
    for (; tile < a.n_tiles; ++tile) stream_tokens<1>(a, layout, tile);
}

}  // namespace
}  // namespace fbiedge
