// The slow, obvious integer sums of attention. Every other kernel is compared with it, bit for bit.

#include "attention_body.h"

namespace fbiedge {
namespace {

struct SumsScalar {
    static constexpr size_t kKeyBytes = kBlockTokens * kMaxHeadDim;
    static constexpr size_t kValueBytes = kBlockTokens * kMaxHeadDim;

    // Integer shares of a block's tokens, as this kernel likes them.
    struct Shares {
        int32_t at[kBlockTokens];
    };
    static void store_shares(const int32_t* units, size_t first, Shares& shares) {
        memcpy(shares.at + first, units, kLanes * sizeof(int32_t));
    }

    // The block's rows, as this kernel likes them: [n_tokens, d], no more may be read.
    static void pack_keys(const int8_t* keys, size_t n_tokens, size_t d, uint8_t* packed) {
        memset(packed, 0, kKeyBytes);
        memcpy(packed, keys, n_tokens * d);
    }
    static void pack_values(const int8_t* values, size_t n_tokens, size_t d, uint8_t* packed) {
        pack_keys(values, n_tokens, d, packed);
    }

    // scores[i][t] = queries[i] . keys[t] for the first n_tokens, a multiple of 16; those past the block's are any.
    static void scores(const int16_t* queries, size_t n, size_t d, const uint8_t* packed, size_t n_tokens,
                       int32_t (*scores)[kBlockTokens]) {
        const int8_t* keys = reinterpret_cast<const int8_t*>(packed);
        for (size_t i = 0; i < n; ++i) {
            for (size_t t = 0; t < n_tokens; ++t) {
                int32_t sum = 0;
                for (size_t j = 0; j < d; ++j) sum += queries[i * d + j] * keys[t * d + j];
                scores[i][t] = sum;
            }
        }
    }

    // sums[i][j] = shares[i] . values[:, j] over the first n_tokens, a multiple of 16; shares past the block's are 0.
    static void mix(const Shares* shares, size_t n, size_t d, const uint8_t* packed, size_t n_tokens,
                    int32_t (*sums)[kMaxHeadDim]) {
        const int8_t* values = reinterpret_cast<const int8_t*>(packed);
        for (size_t i = 0; i < n; ++i) {
            for (size_t j = 0; j < d; ++j) {
                int32_t sum = 0;
                for (size_t t = 0; t < n_tokens; ++t) sum += shares[i].at[t] * values[t * d + j];
                sums[i][j] = sum;
            }
        }
    }
};

}  // namespace

const AttentionKernels kAttentionScalar = attention_kernels<SumsScalar>();

}  // namespace fbiedge
