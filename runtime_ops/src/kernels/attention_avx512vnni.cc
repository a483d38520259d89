// AVX-512 VNNI: 64 products of a u8 and an s8 in one vpdpbusd, four neighbours added into each 32-bit lane.
//
// Scores. Keys are packed to [d / 4][16 tokens][4 numbers], so that a lane gathers one token and needs no sum across
// lanes; + 128 makes them u8. A query is two s8 planes, q = 256 high + low:
//   sum q * k = 256 * sum high * (k + 128) + sum low * (k + 128) - 128 * sum q
// Mixing. Values are packed to [4 tokens] neighbours in the lane of their number of the head; a share is two u8 planes.

#include <immintrin.h>

#include "attention_body.h"

namespace fbiedge {
namespace {

constexpr size_t kQuad = 4;
constexpr size_t kChunk = 64;  // numbers of a head that one register holds

// The registers' bytes k .. k + 3 of token t become lane t of register k / 4: a transpose of 16 x 16 words.
void transpose(__m512i (&rows)[16]) {
    __m512i pairs[16], quads[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    // quads[4 g + j] holds word 4 p + j of tokens 4 g .. 4 g + 3 in its 128-bit part p.
    for (int j = 0; j < 4; ++j) {
        const __m512i low_02 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
        const __m512i low_13 = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
        const __m512i high_02 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512i high_13 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_i32x4(low_02, high_02, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(low_13, high_13, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(low_02, high_02, 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(low_13, high_13, 0xdd);
    }
}

__mmask64 chunk_mask(size_t count) { return count >= kChunk ? ~0ull : (1ull << count) - 1; }

struct Planes {
    alignas(kAlignment) int8_t high[kMaxHeadDim];
    alignas(kAlignment) int8_t low[kMaxHeadDim];
    int32_t correction;
};

void split(const int16_t* query, size_t d, Planes& planes) {
    int32_t sum = 0;
    for (size_t i = 0; i < d; ++i) {
        const int32_t high = (query[i] + 128) >> 8;
        planes.high[i] = static_cast<int8_t>(high);
        planes.low[i] = static_cast<int8_t>(query[i] - 256 * high);
        sum += query[i];
    }
    planes.correction = -128 * sum;
}

int32_t word(const void* bytes, size_t index) {
    int32_t value;
    memcpy(&value, static_cast<const uint8_t*>(bytes) + kQuad * index, sizeof value);
    return value;
}

template <int kQueries, int kGroups>
void score_groups(const Planes* planes, size_t quads, const uint8_t* packed, size_t group,
                  int32_t (*scores)[kBlockTokens]) {
    __m512i high_i32x16[kQueries][kGroups], low_i32x16[kQueries][kGroups];
    for (int i = 0; i < kQueries; ++i) {
        for (int g = 0; g < kGroups; ++g) high_i32x16[i][g] = low_i32x16[i][g] = _mm512_setzero_si512();
    }
    const uint8_t* keys = packed + group * quads * kChunk;
    for (size_t quad = 0; quad < quads; ++quad) {
        __m512i k_u8x64[kGroups];
        for (int g = 0; g < kGroups; ++g) k_u8x64[g] = _mm512_load_si512(keys + (g * quads + quad) * kChunk);
        for (int i = 0; i < kQueries; ++i) {
            const __m512i high_i8x64 = _mm512_set1_epi32(word(planes[i].high, quad));
            const __m512i low_i8x64 = _mm512_set1_epi32(word(planes[i].low, quad));
            for (int g = 0; g < kGroups; ++g) {
                high_i32x16[i][g] = _mm512_dpbusd_epi32(high_i32x16[i][g], k_u8x64[g], high_i8x64);
                low_i32x16[i][g] = _mm512_dpbusd_epi32(low_i32x16[i][g], k_u8x64[g], low_i8x64);
            }
        }
    }
    for (int i = 0; i < kQueries; ++i) {
        const __m512i correction_i32x16 = _mm512_set1_epi32(planes[i].correction);
        for (int g = 0; g < kGroups; ++g) {
            const __m512i sum_i32x16 = _mm512_add_epi32(_mm512_slli_epi32(high_i32x16[i][g], 8), low_i32x16[i][g]);
            _mm512_store_si512(scores[i] + (group + g) * kLanes, _mm512_add_epi32(sum_i32x16, correction_i32x16));
        }
    }
}

template <int kQueries>
void score_all(const Planes* planes, size_t d, const uint8_t* packed, size_t n_tokens,
               int32_t (*scores)[kBlockTokens]) {
    constexpr int kGroups = kQueries == 1 ? 4 : 2;
    const size_t groups = n_tokens / kLanes, quads = d / kQuad;
    size_t group = 0;
    for (; group + kGroups <= groups; group += kGroups) {
        score_groups<kQueries, kGroups>(planes, quads, packed, group, scores);
    }
    for (; group < groups; ++group) score_groups<kQueries, 1>(planes, quads, packed, group, scores);
}

struct SumsAvx512Vnni {
    static constexpr size_t kKeyBytes = kBlockTokens * kMaxHeadDim;
    static constexpr size_t kValueBytes = kBlockTokens * kMaxHeadDim;

    struct Shares {
        alignas(kAlignment) uint8_t high[kBlockTokens];
        alignas(kAlignment) uint8_t low[kBlockTokens];
    };
    static void store_shares(const int32_t* units, size_t first, Shares& shares) {
        const __m512i units_i32x16 = _mm512_loadu_si512(units);
        const __m128i low_u8x16 = _mm512_cvtepi32_epi8(units_i32x16);
        const __m128i high_u8x16 = _mm512_cvtepi32_epi8(_mm512_srli_epi32(units_i32x16, 8));
        _mm_store_si128(reinterpret_cast<__m128i*>(shares.low + first), low_u8x16);
        _mm_store_si128(reinterpret_cast<__m128i*>(shares.high + first), high_u8x16);
    }

    static void pack_keys(const int8_t* keys, size_t n_tokens, size_t d, uint8_t* packed) {
        const __m512i to_unsigned = _mm512_set1_epi8(static_cast<char>(0x80));
        for (size_t first = 0; first < n_tokens; first += kLanes) {
            const size_t tokens = min_size(n_tokens - first, kLanes);
            for (size_t at = 0; at < d; at += kChunk) {
                const __mmask64 mask = chunk_mask(d - at);
                __m512i rows[kLanes];
                for (size_t t = 0; t < kLanes; ++t) {
                    rows[t] =
                        _mm512_maskz_loadu_epi8(t < tokens ? mask : 0, keys + (first + (t < tokens ? t : 0)) * d + at);
                }
                transpose(rows);
                const size_t quads = min_size(d - at, kChunk) / kQuad;
                uint8_t* out = packed + (first * d + at * kLanes);
                for (size_t quad = 0; quad < quads; ++quad) {
                    _mm512_store_si512(out + quad * kChunk, _mm512_xor_si512(rows[quad], to_unsigned));
                }
            }
        }
    }

    // [d / 64][tokens / 4][4 registers]: register j holds, in its 128-bit part p, numbers 16 p + 4 j .. + 3 of the
    // chunk.
    static void pack_values(const int8_t* values, size_t n_tokens, size_t d, uint8_t* packed) {
        for (size_t at = 0; at < d; at += kChunk) {
            const __mmask64 mask = chunk_mask(d - at);
            for (size_t first = 0; first < ceil_div(n_tokens, kLanes) * kLanes; first += kQuad) {
                __m512i rows[kQuad];
                for (size_t t = 0; t < kQuad; ++t) {
                    const bool held = first + t < n_tokens;
                    rows[t] = _mm512_maskz_loadu_epi8(held ? mask : 0, values + (held ? first + t : 0) * d + at);
                }
                const __m512i low_01 = _mm512_unpacklo_epi8(rows[0], rows[1]);
                const __m512i high_01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
                const __m512i low_23 = _mm512_unpacklo_epi8(rows[2], rows[3]);
                const __m512i high_23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
                uint8_t* out = packed + at * kBlockTokens + first * kChunk;
                _mm512_store_si512(out, _mm512_unpacklo_epi16(low_01, low_23));
                _mm512_store_si512(out + kChunk, _mm512_unpackhi_epi16(low_01, low_23));
                _mm512_store_si512(out + 2 * kChunk, _mm512_unpacklo_epi16(high_01, high_23));
                _mm512_store_si512(out + 3 * kChunk, _mm512_unpackhi_epi16(high_01, high_23));
            }
        }
    }

    static void scores(const int16_t* queries, size_t n, size_t d, const uint8_t* packed, size_t n_tokens,
                       int32_t (*scores)[kBlockTokens]) {
        Planes planes[kQueriesAtOnce];
        for (size_t i = 0; i < n; ++i) split(queries + i * d, d, planes[i]);
        if (n == kQueriesAtOnce) return score_all<kQueriesAtOnce>(planes, d, packed, n_tokens, scores);
        for (size_t i = 0; i < n; ++i) score_all<1>(planes + i, d, packed, n_tokens, scores + i);
    }

    template <int kQueries>
    static void mix_chunk(const Shares* shares, const uint8_t* values, size_t n_tokens, size_t at, size_t d,
                          int32_t (*sums)[kMaxHeadDim]) {
        __m512i high_i32x16[kQueries][kQuad], low_i32x16[kQueries][kQuad];
        for (int i = 0; i < kQueries; ++i) {
            for (size_t j = 0; j < kQuad; ++j) high_i32x16[i][j] = low_i32x16[i][j] = _mm512_setzero_si512();
        }
        for (size_t first = 0; first < n_tokens; first += kQuad) {
            __m512i v_i8x64[kQuad];
            for (size_t j = 0; j < kQuad; ++j) v_i8x64[j] = _mm512_load_si512(values + first * kChunk + j * kChunk);
            for (int i = 0; i < kQueries; ++i) {
                const __m512i high_u8x64 = _mm512_set1_epi32(word(shares[i].high, first / kQuad));
                const __m512i low_u8x64 = _mm512_set1_epi32(word(shares[i].low, first / kQuad));
                for (size_t j = 0; j < kQuad; ++j) {
                    high_i32x16[i][j] = _mm512_dpbusd_epi32(high_i32x16[i][j], high_u8x64, v_i8x64[j]);
                    low_i32x16[i][j] = _mm512_dpbusd_epi32(low_i32x16[i][j], low_u8x64, v_i8x64[j]);
                }
            }
        }
        for (int i = 0; i < kQueries; ++i) {
            __m512i sum_i32x16[kQuad];
            for (size_t j = 0; j < kQuad; ++j) {
                sum_i32x16[j] = _mm512_add_epi32(_mm512_slli_epi32(high_i32x16[i][j], 8), low_i32x16[i][j]);
            }
            // Back to the head's order: a transpose of the 4 x 4 parts.
            const __m512i low_01 = _mm512_shuffle_i32x4(sum_i32x16[0], sum_i32x16[1], 0x44);
            const __m512i low_23 = _mm512_shuffle_i32x4(sum_i32x16[2], sum_i32x16[3], 0x44);
            const __m512i high_01 = _mm512_shuffle_i32x4(sum_i32x16[0], sum_i32x16[1], 0xee);
            const __m512i high_23 = _mm512_shuffle_i32x4(sum_i32x16[2], sum_i32x16[3], 0xee);
            int32_t* out = sums[i] + at;
            _mm512_store_si512(out, _mm512_shuffle_i32x4(low_01, low_23, 0x88));
            if (at + 16 < d) _mm512_store_si512(out + 16, _mm512_shuffle_i32x4(low_01, low_23, 0xdd));
            if (at + 32 < d) _mm512_store_si512(out + 32, _mm512_shuffle_i32x4(high_01, high_23, 0x88));
            if (at + 48 < d) _mm512_store_si512(out + 48, _mm512_shuffle_i32x4(high_01, high_23, 0xdd));
        }
    }

    static void mix(const Shares* shares, size_t n, size_t d, const uint8_t* packed, size_t n_tokens,
                    int32_t (*sums)[kMaxHeadDim]) {
        for (size_t at = 0; at < d; at += kChunk) {
            const uint8_t* values = packed + at * kBlockTokens;
            size_t i = 0;
            for (; i + 2 <= n; i += 2) mix_chunk<2>(shares + i, values, n_tokens, at, d, sums + i);
            for (; i < n; ++i) mix_chunk<1>(shares + i, values, n_tokens, at, d, sums + i);
        }
    }
};

}  // namespace

const AttentionKernels kAttentionAvx512Vnni = attention_kernels<SumsAvx512Vnni>();

}  // namespace fbiedge
