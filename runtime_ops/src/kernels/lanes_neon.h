// See lanes.h. Four floats, doubled twice.
#pragma once

#include <arm_neon.h>

#include "lanes.h"

namespace fbiedge {
namespace {

struct F32x4 {
    static constexpr size_t kCount = 4;
    float32x4_t v;
    static F32x4 load(const float* from) { return {vld1q_f32(from)}; }
    static F32x4 broadcast(float value) { return {vdupq_n_f32(value)}; }
    static F32x4 from_integers(const int32_t* from) { return {vcvtq_f32_s32(vld1q_s32(from))}; }
    uint32x4_t bits() const { return vreinterpretq_u32_f32(v); }
    void store(float* to) const { vst1q_f32(to, v); }
    void store_low_bytes(int8_t* to) const {
        const uint16x4_t halves = vmovn_u32(bits());
        const uint8x8_t bytes = vmovn_u16(vcombine_u16(halves, halves));
        vst1_lane_u32(reinterpret_cast<uint32_t*>(to), vreinterpret_u32_u8(bytes), 0);
    }
    void store_low_halves(int16_t* to) const { vst1_s16(to, vreinterpret_s16_u16(vmovn_u32(bits()))); }
};
inline F32x4 operator+(F32x4 a, F32x4 b) { return {vaddq_f32(a.v, b.v)}; }
inline F32x4 operator-(F32x4 a, F32x4 b) { return {vsubq_f32(a.v, b.v)}; }
inline F32x4 operator*(F32x4 a, F32x4 b) { return {vmulq_f32(a.v, b.v)}; }
inline F32x4 operator/(F32x4 a, F32x4 b) { return {vdivq_f32(a.v, b.v)}; }
inline F32x4 greater(F32x4 a, F32x4 b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline F32x4 greater_bits(F32x4 a, F32x4 b) { return {vreinterpretq_f32_u32(vmaxq_u32(a.bits(), b.bits()))}; }
inline F32x4 magnitude(F32x4 a) { return {vabsq_f32(a.v)}; }
inline F32x4 zero_below(F32x4 limit, F32x4 x, F32x4 value) {
    return {vreinterpretq_f32_u32(vbicq_u32(value.bits(), vcltq_f32(x.v, limit.v)))};
}
inline F32x4 exponent_from_low_bits(F32x4 x) { return {vreinterpretq_f32_u32(vshlq_n_u32(x.bits(), 23))}; }
inline float sum_lanes(F32x4 x) {
    const float32x2_t pair = vadd_f32(vget_low_f32(x.v), vget_high_f32(x.v));
    return vget_lane_f32(pair, 0) + vget_lane_f32(pair, 1);
}
inline float greatest_lane(F32x4 x) {
    const F32x4 pairs = greater(x, {vextq_f32(x.v, x.v, 2)});
    const float a = vgetq_lane_f32(pairs.v, 0), b = vgetq_lane_f32(pairs.v, 1);
    return a > b ? a : b;
}
inline uint32_t greatest_bits(F32x4 x) { return vmaxvq_u32(x.bits()); }

using F32x16 = Twice<Twice<F32x4>>;

}  // namespace
}  // namespace fbiedge
