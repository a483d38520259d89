#include <arm_neon.h>

#include "activations.h"

namespace fbiedge {
namespace {

struct F32x4 {
    static constexpr size_t kLanes = 4;
    float32x4_t v;
    static F32x4 load(const float* from) { return {vld1q_f32(from)}; }
    static F32x4 broadcast(float value) { return {vdupq_n_f32(value)}; }
    void store(float* to) const { vst1q_f32(to, v); }
};
F32x4 operator+(F32x4 a, F32x4 b) { return {vaddq_f32(a.v, b.v)}; }
F32x4 operator-(F32x4 a, F32x4 b) { return {vsubq_f32(a.v, b.v)}; }
F32x4 operator*(F32x4 a, F32x4 b) { return {vmulq_f32(a.v, b.v)}; }
F32x4 operator/(F32x4 a, F32x4 b) { return {vdivq_f32(a.v, b.v)}; }
// These give NaN when one operand is.
F32x4 at_most(F32x4 limit, F32x4 x) { return {vminq_f32(limit.v, x.v)}; }
F32x4 at_least(F32x4 limit, F32x4 x) { return {vmaxq_f32(limit.v, x.v)}; }
F32x4 exponent_from_low_bits(F32x4 x) { return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x.v), 23))}; }

}  // namespace

const ActivationKernels kActivationsNeon = {sum_of_squares<F32x4>, silu_multiply<F32x4>};

}  // namespace fbiedge
