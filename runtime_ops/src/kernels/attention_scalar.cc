// The slow, obvious integer sums of attention. Every other kernel is compared with it, bit for bit.

#include "lanes_scalar.h"
#include "shared_attention.h"

namespace fbiedge {
namespace {

// The integer sums over one block.
class SumsScalar {
  public:
    explicit SumsScalar(const AttendArgs& args) : a_(args) {}

    // Integer shares of a block's tokens, as this kernel likes them; they come as x + kRoundingMagic.
    struct Shares {
        int16_t at[kBlockTokens];
        void store(F32x16 shifted, size_t first) { shifted.store_low_halves(at + first); }
    };

    // scores[i][t] = queries[first + i] . keys[t] for n queries (1..kQueriesAtOnce) and the first n_tokens, a multiple
    // of 16; those past the block's are any.
    void scores(size_t first, size_t n, size_t n_tokens, int32_t (*scores)[kBlockTokens]) {
        for (size_t i = 0; i < n; ++i) {
            const int16_t* query = a_.queries + (first + i) * a_.d;
            for (size_t t = 0; t < n_tokens; ++t) {
                int32_t sum = 0;
                for (size_t j = 0; t < a_.n_tokens && j < a_.d; ++j) sum += query[j] * a_.keys[t * a_.d + j];
                scores[i][t] = sum;
            }
        }
    }

    // sums[i][j] = shares[i] . values[:, j] for n queries over the first n_tokens, a multiple of 16; shares past the
    // block's are 0. Columns up to whole lanes are written.
    void mix(const Shares* shares, size_t n, size_t n_tokens, int32_t (*sums)[kMaxHeadDim]) {
        for (size_t i = 0; i < n; ++i) {
            memset(sums[i], 0, whole_lanes(a_.d) * sizeof(int32_t));
            for (size_t t = 0; t < min_size(n_tokens, a_.n_tokens); ++t) {
                for (size_t j = 0; j < a_.d; ++j) sums[i][j] += shares[i].at[t] * a_.values[t * a_.d + j];
            }
        }
    }

  private:
    const AttendArgs& a_;
};

}  // namespace

const AttentionKernels kAttentionScalar = attention_kernels<SumsScalar>();

}  // namespace fbiedge
