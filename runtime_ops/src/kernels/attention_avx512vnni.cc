// AVX-512 VNNI: 64 products of a u8 and an s8 in one vpdpbusd, four neighbours added into each 32-bit lane.
//
// Scores. Keys are packed to [d / 4][16 tokens][4 numbers], so that a lane gathers one token and needs no sum across
// lanes; + 128 makes them u8. A query is two s8 planes, q = 256 high + low:
//   sum q * k = 256 * sum high * (k + 128) + sum low * (k + 128) - 128 * sum q
// Mixing. Values are packed to [4 tokens] neighbours in the lane of their number of the head; a share is two u8 planes.

#include "lanes_avx512.h"
#include "shared_attention.h"

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
    __m512i sums_i32x16 = _mm512_setzero_si512();
    for (size_t i = 0; i < align_up(d); i += 32) {  // whole chunks
        const __mmask32 mask = d >= i + 32 ? ~0u : d > i ? (1u << (d - i)) - 1 : 0;
        const __m512i q_i16x32 = _mm512_maskz_loadu_epi16(mask, query + i);
        const __m512i high_i16x32 = _mm512_srai_epi16(_mm512_add_epi16(q_i16x32, _mm512_set1_epi16(128)), 8);
        _mm256_store_si256(reinterpret_cast<__m256i*>(planes.high + i), _mm512_cvtepi16_epi8(high_i16x32));
        _mm256_store_si256(reinterpret_cast<__m256i*>(planes.low + i), _mm512_cvtepi16_epi8(q_i16x32));
        sums_i32x16 = _mm512_add_epi32(sums_i32x16, _mm512_madd_epi16(q_i16x32, _mm512_set1_epi16(1)));
    }
    planes.correction = -128 * _mm512_reduce_add_epi32(sums_i32x16);
}

// To the second cache: prefetches to the first wait for one another.
void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1); }

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

// --- a few queries: rows as they lie in memory

// Four registers of sums by lane -> one with the 4 sums within each 128-bit part.
__m512i add_within_parts(const __m512i (&rows)[4]) {
    const __m512i sums_01 =
        _mm512_add_epi32(_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
    const __m512i sums_23 =
        _mm512_add_epi32(_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(sums_01, sums_23), _mm512_unpackhi_epi64(sums_01, sums_23));
}
__m512i add_parts(__m512i a, __m512i b) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Some numbers of row t, or of the last where there is no such row: what is computed with it is not used.
__m512i row_chunk(const int8_t* rows, size_t t, size_t n_tokens, size_t d, size_t at, __mmask64 mask) {
    return _mm512_maskz_loadu_epi8(mask, rows + min_size(t, n_tokens - 1) * d + at);
}

template <int kQueries>
void score_rows(const AttendArgs& a, const Planes* planes, size_t n_tokens, int32_t (*scores)[kBlockTokens]) {
    const __m512i to_unsigned = _mm512_set1_epi8(static_cast<char>(0x80));
    for (size_t first = 0; first < n_tokens; first += kLanes) {
        prefetch(a.key_scales + kBlockTokens + first);
        prefetch(a.value_scales + kBlockTokens + first);
        __m512i parts_i32x16[kQueries][4];
        for (size_t part = 0; part < 4; ++part) {
            __m512i high_i32x16[kQueries][4], low_i32x16[kQueries][4];
            for (int i = 0; i < kQueries; ++i) {
                for (size_t t = 0; t < 4; ++t) high_i32x16[i][t] = low_i32x16[i][t] = _mm512_setzero_si512();
            }
            for (size_t at = 0; at < a.d; at += kChunk) {
                const __mmask64 mask = chunk_mask(a.d - at);
                __m512i k_u8x64[4];
                for (size_t t = 0; t < 4; ++t) {
                    const size_t token = first + 4 * part + t;
                    prefetch(a.values + token * a.d + at);
                    k_u8x64[t] = _mm512_xor_si512(row_chunk(a.keys, token, a.n_tokens, a.d, at, mask), to_unsigned);
                }
                for (int i = 0; i < kQueries; ++i) {
                    const __m512i high_i8x64 = _mm512_load_si512(planes[i].high + at);
                    const __m512i low_i8x64 = _mm512_load_si512(planes[i].low + at);
                    for (size_t t = 0; t < 4; ++t) {
                        high_i32x16[i][t] = _mm512_dpbusd_epi32(high_i32x16[i][t], k_u8x64[t], high_i8x64);
                        low_i32x16[i][t] = _mm512_dpbusd_epi32(low_i32x16[i][t], k_u8x64[t], low_i8x64);
                    }
                }
            }
            for (int i = 0; i < kQueries; ++i) {
                __m512i sums_i32x16[4];
                for (size_t t = 0; t < 4; ++t) {
                    sums_i32x16[t] = _mm512_add_epi32(_mm512_slli_epi32(high_i32x16[i][t], 8), low_i32x16[i][t]);
                }
                parts_i32x16[i][part] = add_within_parts(sums_i32x16);
            }
        }
        for (int i = 0; i < kQueries; ++i) {
            const __m512i sums_i32x16 = add_parts(add_parts(parts_i32x16[i][0], parts_i32x16[i][1]),
                                                  add_parts(parts_i32x16[i][2], parts_i32x16[i][3]));
            _mm512_store_si512(scores[i] + first,
                               _mm512_add_epi32(sums_i32x16, _mm512_set1_epi32(planes[i].correction)));
        }
    }
}

// Four tokens' chunks of 64 numbers -> 4 registers of quads: register j holds, in its 128-bit part p, the numbers
// 16 p + 4 j .. 16 p + 4 j + 3 of the chunk, 4 tokens of each.
void interleave(const __m512i (&rows)[kQuad], __m512i (&quads)[kQuad]) {
    const __m512i low_01 = _mm512_unpacklo_epi8(rows[0], rows[1]), high_01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const __m512i low_23 = _mm512_unpacklo_epi8(rows[2], rows[3]), high_23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
    quads[0] = _mm512_unpacklo_epi16(low_01, low_23);
    quads[1] = _mm512_unpackhi_epi16(low_01, low_23);
    quads[2] = _mm512_unpacklo_epi16(high_01, high_23);
    quads[3] = _mm512_unpackhi_epi16(high_01, high_23);
}

class SumsAvx512Vnni {
  public:
    explicit SumsAvx512Vnni(const AttendArgs& args) : a_(args), packs_(args.n_queries > kQueriesAtOnce) {
        if (packs_) pack_keys();
    }

    struct Shares {
        alignas(kAlignment) uint8_t high[kBlockTokens];
        alignas(kAlignment) uint8_t low[kBlockTokens];
        void store(F32x16 shifted, size_t first) {
            shifted.store_low_bytes(reinterpret_cast<int8_t*>(low) + first);
            const __m128i high_u8x16 = _mm512_cvtepi32_epi8(_mm512_srli_epi32(shifted.bits(), 8));
            _mm_store_si128(reinterpret_cast<__m128i*>(high + first), high_u8x16);
        }
    };

    void scores(size_t first, size_t n, size_t n_tokens, int32_t (*scores)[kBlockTokens]) {
        Planes planes[kQueriesAtOnce];
        for (size_t i = 0; i < n; ++i) split(a_.queries + (first + i) * a_.d, a_.d, planes[i]);
        if (!packs_) {
            for (size_t i = 0; i < n; i += 2) {
                if (i + 2 <= n)
                    score_rows<2>(a_, planes + i, n_tokens, scores + i);
                else
                    score_rows<1>(a_, planes + i, n_tokens, scores + i);
            }
            return;
        }
        if (n == kQueriesAtOnce) return score_all<kQueriesAtOnce>(planes, a_.d, keys_, n_tokens, scores);
        for (size_t i = 0; i < n; ++i) score_all<1>(planes + i, a_.d, keys_, n_tokens, scores + i);
    }

    void mix(const Shares* shares, size_t n, size_t n_tokens, int32_t (*sums)[kMaxHeadDim]) {
        if (packs_ && !packed_values_) pack_values();
        for (size_t at = 0; at < a_.d; at += kChunk) {
            size_t i = 0;
            for (; i + 2 <= n; i += 2) mix_chunk<2>(shares + i, n_tokens, at, sums + i);
            for (; i < n; ++i) mix_chunk<1>(shares + i, n_tokens, at, sums + i);
        }
    }

  private:
    void pack_keys() {
        const __m512i to_unsigned = _mm512_set1_epi8(static_cast<char>(0x80));
        for (size_t first = 0; first < a_.n_tokens; first += kLanes) {
            for (size_t at = 0; at < a_.d; at += kChunk) {
                const __mmask64 mask = chunk_mask(a_.d - at);
                __m512i rows[kLanes];
                for (size_t t = 0; t < kLanes; ++t)
                    rows[t] = row_chunk(a_.keys, first + t, a_.n_tokens, a_.d, at, mask);
                transpose(rows);
                const size_t quads = min_size(a_.d - at, kChunk) / kQuad;
                uint8_t* out = keys_ + (first * a_.d + at * kLanes);
                for (size_t quad = 0; quad < quads; ++quad) {
                    _mm512_store_si512(out + quad * kChunk, _mm512_xor_si512(rows[quad], to_unsigned));
                }
            }
        }
    }

    void load_quads(size_t first, size_t at, __mmask64 mask, __m512i (&quads)[kQuad]) const {
        __m512i rows[kQuad];
        for (size_t t = 0; t < kQuad; ++t) rows[t] = row_chunk(a_.values, first + t, a_.n_tokens, a_.d, at, mask);
        interleave(rows, quads);
    }

    uint8_t* packed_values(size_t first, size_t at) { return values_ + at * kBlockTokens + first * kChunk; }

    void pack_values() {
        for (size_t at = 0; at < a_.d; at += kChunk) {
            const __mmask64 mask = chunk_mask(a_.d - at);
            for (size_t first = 0; first < whole_lanes(a_.n_tokens); first += kQuad) {
                __m512i quads[kQuad];
                load_quads(first, at, mask, quads);
                for (size_t j = 0; j < kQuad; ++j) _mm512_store_si512(packed_values(first, at) + j * kChunk, quads[j]);
            }
        }
        packed_values_ = true;
    }

    template <int kQueries>
    void mix_chunk(const Shares* shares, size_t n_tokens, size_t at, int32_t (*sums)[kMaxHeadDim]) {
        const __mmask64 mask = chunk_mask(a_.d - at);
        __m512i high_i32x16[kQueries][kQuad], low_i32x16[kQueries][kQuad];
        for (int i = 0; i < kQueries; ++i) {
            for (size_t j = 0; j < kQuad; ++j) high_i32x16[i][j] = low_i32x16[i][j] = _mm512_setzero_si512();
        }
        for (size_t first = 0; first < n_tokens; first += kQuad) {
            __m512i v_i8x64[kQuad];
            if (packs_) {
                for (size_t j = 0; j < kQuad; ++j)
                    v_i8x64[j] = _mm512_load_si512(packed_values(first, at) + j * kChunk);
            } else {
                for (size_t t = 0; t < kQuad; ++t) prefetch(a_.keys + (kBlockTokens + first + t) * a_.d + at);
                load_quads(first, at, mask, v_i8x64);
            }
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
            store_in_order(sum_i32x16, a_.d - at, sums[i] + at);
        }
    }

    // From quads as interleave() leaves them to the order of the head: a transpose of the 4 x 4 parts.
    static void store_in_order(const __m512i (&sums)[kQuad], size_t count, int32_t* out) {
        const __m512i low_01 = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44);
        const __m512i low_23 = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44);
        const __m512i high_01 = _mm512_shuffle_i32x4(sums[0], sums[1], 0xee);
        const __m512i high_23 = _mm512_shuffle_i32x4(sums[2], sums[3], 0xee);
        _mm512_store_si512(out, _mm512_shuffle_i32x4(low_01, low_23, 0x88));
        if (count > 16) _mm512_store_si512(out + 16, _mm512_shuffle_i32x4(low_01, low_23, 0xdd));
        if (count > 32) _mm512_store_si512(out + 32, _mm512_shuffle_i32x4(high_01, high_23, 0x88));
        if (count > 48) _mm512_store_si512(out + 48, _mm512_shuffle_i32x4(high_01, high_23, 0xdd));
    }

    const AttendArgs& a_;
    const bool packs_;
    bool packed_values_ = false;
    alignas(kAlignment) uint8_t keys_[kBlockTokens * kMaxHeadDim];
    alignas(kAlignment) uint8_t values_[kBlockTokens * kMaxHeadDim];
};

}  // namespace

const AttentionKernels kAttentionAvx512Vnni = attention_kernels<SumsAvx512Vnni>();

}  // namespace fbiedge
