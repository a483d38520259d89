// AVX2: keys and values are widened to 16 bits as they are read, and vpmaddwd adds two products of 16-bit numbers into
// each 32-bit lane: a query's and a share's 16 bits are used as they are.

#include "lanes_avx2.h"
#include "shared_attention.h"

namespace fbiedge {
namespace {

constexpr size_t kChunk = 16;  // numbers of a head that one register of 16-bit numbers holds
constexpr size_t kTokensAtOnce = 4;

// Numbers at .. at + 15 of row t, or of the last where there is no such row: what is computed with it is not used.
// Zeros where the row ends before.
__m256i row_chunk(const int8_t* rows, size_t t, size_t n_tokens, size_t d, size_t at) {
    const int8_t* from = rows + min_size(t, n_tokens - 1) * d + at;
    const __m128i bytes = d - at < kChunk ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))
                                          : _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi8_epi16(bytes);
}

class SumsAvx2 {
  public:
    explicit SumsAvx2(const AttendArgs& args) : a_(args) {}

    struct Shares {
        int16_t at[kBlockTokens];
        void store(F32x16 shifted, size_t first) { shifted.store_low_halves(at + first); }
    };

    void scores(size_t first, size_t n, size_t n_tokens, int32_t (*scores)[kBlockTokens]) {
        alignas(kAlignment) int16_t queries[kQueriesAtOnce][kMaxHeadDim];
        for (size_t i = 0; i < n; ++i) {
            memset(queries[i] + whole_lanes(a_.d) - kLanes, 0, kLanes * sizeof(int16_t));
            memcpy(queries[i], a_.queries + (first + i) * a_.d, a_.d * sizeof(int16_t));
        }
        size_t i = 0;
        for (; i + 2 <= n; i += 2) score_rows<2>(queries + i, n_tokens, scores + i);
        for (; i < n; ++i) score_rows<1>(queries + i, n_tokens, scores + i);
    }

    void mix(const Shares* shares, size_t n, size_t n_tokens, int32_t (*sums)[kMaxHeadDim]) {
        for (size_t at = 0; at < a_.d; at += kChunk) {
            size_t i = 0;
            for (; i + 2 <= n; i += 2) mix_chunk<2>(shares + i, n_tokens, at, sums + i);
            for (; i < n; ++i) mix_chunk<1>(shares + i, n_tokens, at, sums + i);
        }
    }

  private:
    template <int kQueries>
    void score_rows(const int16_t (*queries)[kMaxHeadDim], size_t n_tokens, int32_t (*scores)[kBlockTokens]) {
        for (size_t first = 0; first < n_tokens; first += kTokensAtOnce) {
            __m256i sums_i32x8[kQueries][kTokensAtOnce];
            for (int i = 0; i < kQueries; ++i) {
                for (size_t t = 0; t < kTokensAtOnce; ++t) sums_i32x8[i][t] = _mm256_setzero_si256();
            }
            for (size_t at = 0; at < a_.d; at += kChunk) {
                __m256i k_i16x16[kTokensAtOnce];
                for (size_t t = 0; t < kTokensAtOnce; ++t) {
                    _mm_prefetch(reinterpret_cast<const char*>(a_.values + (first + t) * a_.d + at), _MM_HINT_T0);
                    k_i16x16[t] = row_chunk(a_.keys, first + t, a_.n_tokens, a_.d, at);
                }
                for (int i = 0; i < kQueries; ++i) {
                    const __m256i q_i16x16 = _mm256_load_si256(reinterpret_cast<const __m256i*>(queries[i] + at));
                    for (size_t t = 0; t < kTokensAtOnce; ++t) {
                        sums_i32x8[i][t] = _mm256_add_epi32(sums_i32x8[i][t], _mm256_madd_epi16(k_i16x16[t], q_i16x16));
                    }
                }
            }
            for (int i = 0; i < kQueries; ++i) {
                const __m256i sums_01 = _mm256_hadd_epi32(sums_i32x8[i][0], sums_i32x8[i][1]);
                const __m256i sums_23 = _mm256_hadd_epi32(sums_i32x8[i][2], sums_i32x8[i][3]);
                const __m256i halves = _mm256_hadd_epi32(sums_01, sums_23);
                _mm_store_si128(reinterpret_cast<__m128i*>(scores[i] + first),
                                _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
            }
        }
    }

    template <int kQueries>
    void mix_chunk(const Shares* shares, size_t n_tokens, size_t at, int32_t (*sums)[kMaxHeadDim]) {
        __m256i low_i32x8[kQueries], high_i32x8[kQueries];  // numbers 0..3 and 8..11, 4..7 and 12..15 of the chunk
        for (int i = 0; i < kQueries; ++i) low_i32x8[i] = high_i32x8[i] = _mm256_setzero_si256();
        for (size_t t = 0; t < n_tokens; t += 2) {
            const __m256i even_i16x16 = row_chunk(a_.values, t, a_.n_tokens, a_.d, at);
            const __m256i odd_i16x16 = row_chunk(a_.values, t + 1, a_.n_tokens, a_.d, at);
            const __m256i low_i16x16 = _mm256_unpacklo_epi16(even_i16x16, odd_i16x16);
            const __m256i high_i16x16 = _mm256_unpackhi_epi16(even_i16x16, odd_i16x16);
            for (int i = 0; i < kQueries; ++i) {
                int32_t pair;
                memcpy(&pair, shares[i].at + t, sizeof pair);
                const __m256i share_i16x16 = _mm256_set1_epi32(pair);
                low_i32x8[i] = _mm256_add_epi32(low_i32x8[i], _mm256_madd_epi16(low_i16x16, share_i16x16));
                high_i32x8[i] = _mm256_add_epi32(high_i32x8[i], _mm256_madd_epi16(high_i16x16, share_i16x16));
            }
        }
        for (int i = 0; i < kQueries; ++i) {
            __m256i* out = reinterpret_cast<__m256i*>(sums[i] + at);
            _mm256_store_si256(out, _mm256_permute2x128_si256(low_i32x8[i], high_i32x8[i], 0x20));
            _mm256_store_si256(out + 1, _mm256_permute2x128_si256(low_i32x8[i], high_i32x8[i], 0x31));
        }
    }

    const AttendArgs& a_;
};

}  // namespace

const AttentionKernels kAttentionAvx2 = attention_kernels<SumsAvx2>();

}  // namespace fbiedge
