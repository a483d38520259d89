// NEON, any 64-bit Arm: keys and values are widened to 16 bits as they are read, and smlal multiplies them by a query's
// or a share's 16 bits into 32-bit lanes.

#include "lanes_neon.h"
#include "shared_attention.h"

namespace fbiedge {
namespace {

constexpr size_t kChunk = 8;  // numbers of a head that one register of 16-bit numbers holds

class SumsNeon {
  public:
    explicit SumsNeon(const AttendArgs& args) : a_(args) {}

    struct Shares {
        int16_t at[kBlockTokens];
        void store(F32x16 shifted, size_t first) { shifted.store_low_halves(at + first); }
    };

    void scores(size_t first, size_t n, size_t n_tokens, int32_t (*scores)[kBlockTokens]) {
        for (size_t t = 0; t < min_size(n_tokens, a_.n_tokens); ++t) {
            int32x4_t low_i32x4[kQueriesAtOnce], high_i32x4[kQueriesAtOnce];
            for (size_t i = 0; i < kQueriesAtOnce; ++i) low_i32x4[i] = high_i32x4[i] = vdupq_n_s32(0);
            for (size_t at = 0; at < a_.d; at += kChunk) {
                const int16x8_t k_i16x8 = vmovl_s8(vld1_s8(a_.keys + t * a_.d + at));
                for (size_t i = 0; i < n; ++i) {
                    const int16x8_t q_i16x8 = vld1q_s16(a_.queries + (first + i) * a_.d + at);
                    low_i32x4[i] = vmlal_s16(low_i32x4[i], vget_low_s16(k_i16x8), vget_low_s16(q_i16x8));
                    high_i32x4[i] = vmlal_high_s16(high_i32x4[i], k_i16x8, q_i16x8);
                }
            }
            for (size_t i = 0; i < n; ++i) scores[i][t] = vaddvq_s32(vaddq_s32(low_i32x4[i], high_i32x4[i]));
        }
        for (size_t i = 0; i < n; ++i) {
            for (size_t t = a_.n_tokens; t < n_tokens; ++t) scores[i][t] = 0;
        }
    }

    void mix(const Shares* shares, size_t n, size_t n_tokens, int32_t (*sums)[kMaxHeadDim]) {
        for (size_t i = 0; i < n; ++i) {
            vst1q_s32(sums[i] + whole_lanes(a_.d) - 8, vdupq_n_s32(0));
            vst1q_s32(sums[i] + whole_lanes(a_.d) - 4, vdupq_n_s32(0));
        }
        for (size_t at = 0; at < a_.d; at += kChunk) {
            int32x4_t low_i32x4[kQueriesAtOnce], high_i32x4[kQueriesAtOnce];
            for (size_t i = 0; i < kQueriesAtOnce; ++i) low_i32x4[i] = high_i32x4[i] = vdupq_n_s32(0);
            for (size_t t = 0; t < min_size(n_tokens, a_.n_tokens); ++t) {
                const int16x8_t v_i16x8 = vmovl_s8(vld1_s8(a_.values + t * a_.d + at));
                for (size_t i = 0; i < n; ++i) {
                    low_i32x4[i] = vmlal_n_s16(low_i32x4[i], vget_low_s16(v_i16x8), shares[i].at[t]);
                    high_i32x4[i] = vmlal_high_n_s16(high_i32x4[i], v_i16x8, shares[i].at[t]);
                }
            }
            for (size_t i = 0; i < n; ++i) {
                vst1q_s32(sums[i] + at, low_i32x4[i]);
                vst1q_s32(sums[i] + at + 4, high_i32x4[i]);
            }
        }
    }

  private:
    const AttendArgs& a_;
};

}  // namespace

const AttentionKernels kAttentionNeon = attention_kernels<SumsNeon>();

}  // namespace fbiedge
