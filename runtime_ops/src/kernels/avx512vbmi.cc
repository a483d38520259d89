// AVX-512 with VBMI and VNNI (Ice Lake and Zen 4 on): the int8 level by looking sums up. fp32: avx512_fp32.h.
//
// The signs of 4 inputs select one of 16 sums, tabulated once a token. vpermb looks up 64 bytes at once in a table of
// 64 bytes, which holds the 16 sums of each of the 4 bytes of a row in a tile: one instruction does 16 rows x 16
// inputs, where vpdpbusd does 16 rows x 4. A sum needs 10 bits, so it comes in two parts from two tables: 128
// multiply-accumulates for a vpermb and a vpaddb, where vpdpbusd does 64.
//
// With P the sum of q where the bit is 1, a table entry is split exactly into low = P mod 32 (0..31) and
// high = floor(P / 32) (-16..15): |P| <= 4 * 127 = 508. A byte lane gathers 8 entries a group (4 tiles, 2 tables each),
// so low stays within 248 and high within -128..120: bytes suffice. At the group's end two vpdpbusd add the 4 bytes of
// a row: I = 2P - S = -S + 2 * low + 64 * high.
//
// Tables are ordered so that packing instructions write them and that one vpternlogd makes the index: for byte j of a
// row,
//   half 0: (v & 0x33) | 4j          inputs 8j + 0, 1, 4, 5 are bits 0, 1, 4, 5 of the index
//   half 1: ((v >> 2) & 0x33) | 4j   inputs 8j + 2, 3, 6, 7

#include "avx512_fp32.h"

namespace fbiedge {
namespace {

constexpr size_t kHalves = 2;                   // of a tile's inputs
constexpr size_t kTableBytes = 64;              // of the low or the high parts
constexpr size_t kHalfBytes = 2 * kTableBytes;  // low, then high
constexpr size_t kTileTables = kHalves * kHalfBytes;
constexpr size_t kGroupTables = kGroupTiles * kTileTables;  // 1 KB: 8 bytes an input

// A prepared token: header, scale[groups], -S[groups], tables.
struct TableLayout {
    size_t groups;
    size_t scales_at;
    size_t sums_at;
    size_t tables_at;
};

TableLayout table_layout(size_t k) {
    const Int8Layout layout = int8_layout(k);
    return {layout.groups, layout.scales_at, layout.sums_at, layout.q_at};
}

size_t token_bytes_int8_avx512vbmi(size_t k) {
    const TableLayout layout = table_layout(k);
    return layout.tables_at + layout.groups * kGroupTables;
}

// P of 16 entries for each of 4 quads of inputs -> low and high parts, 64 bytes each: entry e of quad j is byte
// 16 * (e / 4) + 4 * j + e % 4, which is where two packs leave it.
void store_tables(const int32_t* quads, uint8_t* tables) {
    const __m512i entry_u32x16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i bit_u32x16 = _mm512_set1_epi32(0x01010101);
    // Byte i of lane e is bit i of e.
    const __m512i chosen_u8x64 = _mm512_and_si512(
        _mm512_or_si512(_mm512_or_si512(entry_u32x16, _mm512_slli_epi32(entry_u32x16, 7)),
                        _mm512_or_si512(_mm512_slli_epi32(entry_u32x16, 14), _mm512_slli_epi32(entry_u32x16, 21))),
        bit_u32x16);
    __m512i sum_i32x16[4];
    for (int j = 0; j < 4; ++j) {
        sum_i32x16[j] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), chosen_u8x64, _mm512_set1_epi32(quads[j]));
    }
    const __m512i sum01_i16x32 = _mm512_packs_epi32(sum_i32x16[0], sum_i32x16[1]);
    const __m512i sum23_i16x32 = _mm512_packs_epi32(sum_i32x16[2], sum_i32x16[3]);
    const __m512i low_mask_u16x32 = _mm512_set1_epi16(31);
    _mm512_store_si512(tables, _mm512_packus_epi16(_mm512_and_si512(sum01_i16x32, low_mask_u16x32),
                                                   _mm512_and_si512(sum23_i16x32, low_mask_u16x32)));
    _mm512_store_si512(tables + kTableBytes,
                       _mm512_packs_epi16(_mm512_srai_epi16(sum01_i16x32, 5), _mm512_srai_epi16(sum23_i16x32, 5)));
}

void prepare_int8_avx512vbmi(const TokenInput& in, uint8_t* token) {
    const TableLayout layout = table_layout(in.k);
    float* scales = reinterpret_cast<float*>(token + layout.scales_at);
    int32_t* negative_sums = reinterpret_cast<int32_t*>(token + layout.sums_at);
    uint8_t* tables = token + layout.tables_at;
    // In 8 bytes: 0, 1, 4, 5 to the front, 2, 3, 6, 7 behind. Then halves together.
    const __m128i halves_u8x16 = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    GroupPadding padding;
    __m512 offsets_f32x16 = _mm512_setzero_ps();
    for (size_t group = 0; group < layout.groups; ++group) {
        const GroupInput group_in = group_input(in, group * kGroupInputs, padding);
        const QuantisedGroup quantised = quantise_group(group_in, offsets_f32x16);
        for (size_t t = 0; t < kGroupTiles; ++t) {
            const __m128i front_i8x16 = _mm_shuffle_epi8(quantised.q_i8x16[2 * t], halves_u8x16);
            const __m128i back_i8x16 = _mm_shuffle_epi8(quantised.q_i8x16[2 * t + 1], halves_u8x16);
            alignas(16) int32_t quads[kHalves][4];
            _mm_store_si128(reinterpret_cast<__m128i*>(quads[0]), _mm_unpacklo_epi64(front_i8x16, back_i8x16));
            _mm_store_si128(reinterpret_cast<__m128i*>(quads[1]), _mm_unpackhi_epi64(front_i8x16, back_i8x16));
            for (size_t half = 0; half < kHalves; ++half, tables += kHalfBytes) store_tables(quads[half], tables);
        }
        scales[group] = in.multiplier * quantised.scale;
        negative_sums[group] = -quantised.sum;
    }
    *offset_sum(token) = in.multiplier * sum_lanes(offsets_f32x16);
}

__m512i index_of_half(__m512i v_u8x64, size_t half) {
    const __m512i bits_u8x64 = half == 0 ? v_u8x64 : _mm512_srli_epi16(v_u8x64, 2);
    const int and_then_or = 0xea;  // (a & b) | c
    return _mm512_ternarylogic_epi32(bits_u8x64, _mm512_set1_epi8(0x33), _mm512_set1_epi32(0x0c080400), and_then_or);
}

// Sums of one tile and token over a group.
struct Gathered {
    __m512i low_u8x64, high_i8x64;
};

// The tables of one half of a tile's inputs.
struct Tables {
    __m512i low_u8x64, high_i8x64;
};

Tables tables_at(const uint8_t* at) { return {_mm512_load_si512(at), _mm512_load_si512(at + kTableBytes)}; }

void gather(Gathered& sums, __m512i index_u8x64, const Tables& tables) {
    sums.low_u8x64 = _mm512_add_epi8(sums.low_u8x64, _mm512_permutexvar_epi8(index_u8x64, tables.low_u8x64));
    sums.high_i8x64 = _mm512_add_epi8(sums.high_i8x64, _mm512_permutexvar_epi8(index_u8x64, tables.high_i8x64));
}

// total + d * (scale * float(I)), every operation rounded on its own.
template <bool kBlocks>
__m512 add_group(const MultiplyArgs& a, size_t tile, size_t group, __m512 total_f32x16, const Gathered& sums,
                 int32_t negative_sum, float scale) {
    __m512i value_i32x16 = _mm512_set1_epi32(negative_sum);
    value_i32x16 = _mm512_dpbusd_epi32(value_i32x16, sums.low_u8x64, _mm512_set1_epi8(2));
    value_i32x16 = _mm512_dpbusd_epi32(value_i32x16, _mm512_set1_epi8(64), sums.high_i8x64);
    __m512 value_f32x16 = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_cvtepi32_ps(value_i32x16));
    if (kBlocks) value_f32x16 = _mm512_mul_ps(block_scales(a, tile, group), value_f32x16);
    return _mm512_add_ps(total_f32x16, value_f32x16);
}

struct Token {
    const float* scales;
    const int32_t* negative_sums;
    const uint8_t* tables;
};

Token token_at(const MultiplyArgs& a, const TableLayout& layout, size_t index) {
    const uint8_t* token = a.tokens + index * a.token_stride_in_bytes;
    return {reinterpret_cast<const float*>(token + layout.scales_at),
            reinterpret_cast<const int32_t*>(token + layout.sums_at), token + layout.tables_at};
}

// Few tokens: weights come from memory, once, and indices are made as they come. Tables are loaded once for all tiles:
// a core loads 64 bytes a cycle, and with tables for each tile loading would take as long as adding up.
template <int kTiles, int kTokens, bool kBlocks>
void stream_tiles(const MultiplyArgs& a, const TableLayout& layout, size_t tile, size_t first_token) {
    const size_t tile_stride = a.k_tiles * kTileBytes;
    const size_t ahead = prefetch_distance(kTiles * tile_stride);
    const uint8_t* bits = a.tiles + tile * tile_stride;
    Token tokens[kTokens];
    for (int t = 0; t < kTokens; ++t) tokens[t] = token_at(a, layout, first_token + t);
    __m512 total_f32x16[kTiles][kTokens];
    for (int n = 0; n < kTiles; ++n) {
        for (int t = 0; t < kTokens; ++t) total_f32x16[n][t] = _mm512_setzero_ps();
    }
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t last = min_size((group + 1) * kGroupTiles, a.k_tiles);
        Gathered sums[kTiles][kTokens];
        for (int n = 0; n < kTiles; ++n) {
            for (int t = 0; t < kTokens; ++t) sums[n][t] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        }
        for (size_t k_tile = group * kGroupTiles; k_tile < last; ++k_tile) {
            Tables tables[kHalves][kTokens];
            for (int t = 0; t < kTokens; ++t) {
                const uint8_t* at = tokens[t].tables + k_tile * kTileTables;
                for (size_t half = 0; half < kHalves; ++half) tables[half][t] = tables_at(at + half * kHalfBytes);
            }
            for (int n = 0; n < kTiles; ++n) {
                const uint8_t* at = bits + n * tile_stride + k_tile * kTileBytes;
                // In the order of memory, though the tiles are read in turns: 5 % sooner (1.3B shapes).
                prefetch(bits + ahead + (k_tile * kTiles + n) * kTileBytes);
                const __m512i v_u8x64 = _mm512_loadu_si512(at);
                for (size_t half = 0; half < kHalves; ++half) {
                    const __m512i index_u8x64 = index_of_half(v_u8x64, half);
                    for (int t = 0; t < kTokens; ++t) gather(sums[n][t], index_u8x64, tables[half][t]);
                }
            }
        }
        for (int n = 0; n < kTiles; ++n) {
            for (int t = 0; t < kTokens; ++t) {
                total_f32x16[n][t] = add_group<kBlocks>(a, tile + n, group, total_f32x16[n][t], sums[n][t],
                                                        tokens[t].negative_sums[group], tokens[t].scales[group]);
            }
        }
    }
    for (int n = 0; n < kTiles; ++n) {
        for (int t = 0; t < kTokens; ++t) finish(a, first_token + t, tile + n, total_f32x16[n][t]);
    }
}

constexpr int kSharedTiles = 4;
constexpr int kBlockTokens = 2;

// State of some tiles over all tokens, for one group after the other.
struct SharedState {
    alignas(64) uint8_t indices[kGroupTiles * kHalves][kSharedTiles][64];
    alignas(64) float totals[kMaxTokens][kSharedTiles][kTileRows];
};

void make_indices(const MultiplyArgs& a, size_t tile, size_t first_k_tile, size_t k_tiles, SharedState& state) {
    for (size_t n = 0; n < kSharedTiles; ++n) {
        const uint8_t* bits = a.tiles + ((tile + n) * a.k_tiles + first_k_tile) * kTileBytes;
        for (size_t t = 0; t < k_tiles; ++t) {
            const __m512i v_u8x64 = _mm512_loadu_si512(bits + t * kTileBytes);
            for (size_t half = 0; half < kHalves; ++half) {
                _mm512_store_si512(state.indices[t * kHalves + half][n], index_of_half(v_u8x64, half));
            }
        }
    }
}

template <bool kBlocks>
void gather_block(const MultiplyArgs& a, const TableLayout& layout, size_t tile, size_t group, size_t n_halves,
                  size_t first_token, SharedState& state) {
    Token tokens[kBlockTokens];
    for (int t = 0; t < kBlockTokens; ++t) tokens[t] = token_at(a, layout, first_token + t);
    Gathered sums[kSharedTiles][kBlockTokens];
    for (int n = 0; n < kSharedTiles; ++n) {
        for (int t = 0; t < kBlockTokens; ++t) sums[n][t] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    }
    for (size_t half = 0; half < n_halves; ++half) {
        for (int t = 0; t < kBlockTokens; ++t) {
            const Tables tables = tables_at(tokens[t].tables + group * kGroupTables + half * kHalfBytes);
            for (int n = 0; n < kSharedTiles; ++n) {
                gather(sums[n][t], _mm512_load_si512(state.indices[half][n]), tables);
            }
        }
    }
    const __mmask16 not_first = group == 0 ? 0 : 0xffff;
    for (int t = 0; t < kBlockTokens; ++t) {
        for (int n = 0; n < kSharedTiles; ++n) {
            float* totals = state.totals[first_token + t][n];
            const __m512 total_f32x16 = _mm512_maskz_load_ps(not_first, totals);
            _mm512_store_ps(totals, add_group<kBlocks>(a, tile + n, group, total_f32x16, sums[n][t],
                                                       tokens[t].negative_sums[group], tokens[t].scales[group]));
        }
    }
}

template <bool kBlocks>
void share_tiles(const MultiplyArgs& a, const TableLayout& layout, size_t tile, size_t n_tokens, SharedState& state) {
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t first_k_tile = group * kGroupTiles, k_tiles = min_size(a.k_tiles - first_k_tile, kGroupTiles);
        make_indices(a, tile, first_k_tile, k_tiles, state);
        for (size_t token = 0; token < n_tokens; token += kBlockTokens) {
            gather_block<kBlocks>(a, layout, tile, group, k_tiles * kHalves, token, state);
        }
    }
    for (size_t token = 0; token < n_tokens; ++token) {
        for (int n = 0; n < kSharedTiles; ++n) finish(a, token, tile + n, _mm512_load_ps(state.totals[token][n]));
    }
}

template <int kTiles, bool kBlocks>
void stream_tokens(const MultiplyArgs& a, const TableLayout& layout, size_t tile, size_t token) {
    constexpr int kPairTiles = kTiles < 2 ? kTiles : 2;  // of two tokens; more would not fit the registers
    for (; token + 2 <= a.m; token += 2) {
        for (int n = 0; n < kTiles; n += kPairTiles) {
            stream_tiles<kPairTiles, 2, kBlocks>(a, layout, tile + n, token);
        }
    }
    if (token < a.m) stream_tiles<kTiles, 1, kBlocks>(a, layout, tile, token);
}

template <bool kBlocks>
void multiply(const MultiplyArgs& a) {
    const TableLayout layout = table_layout(a.k);
    const size_t shared = a.m < 8 ? 0 : a.m / kBlockTokens * kBlockTokens;
    SharedState state;
    size_t tile = 0;
    for (; tile + kSharedTiles <= a.n_tiles; tile += kSharedTiles) {
        if (shared > 0) share_tiles<kBlocks>(a, layout, tile, shared, state);
        stream_tokens<kSharedTiles, kBlocks>(a, layout, tile, shared);
    }
    for (; tile < a.n_tiles; ++tile) stream_tokens<1, kBlocks>(a, layout, tile, 0);
}

void binary_matmul_int8_avx512vbmi(const MultiplyArgs& a) { a.block_scales ? multiply<true>(a) : multiply<false>(a); }

}  // namespace

const BinaryKernels kBinaryAvx512Vbmi = {
    {token_bytes_fp32_avx512, prepare_fp32_avx512, binary_matmul_fp32_avx512},
    {token_bytes_int8_avx512vbmi, prepare_int8_avx512vbmi, binary_matmul_int8_avx512vbmi},
};

}  // namespace fbiedge
