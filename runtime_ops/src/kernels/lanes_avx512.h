// See lanes.h.
#pragma once

#include "lanes_avx2.h"

namespace fbiedge {
namespace {

struct F32x16 {
    static constexpr size_t kCount = 16;
    __m512 v;
    static F32x16 load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static F32x16 broadcast(float value) { return {_mm512_set1_ps(value)}; }
    static F32x16 from_integers(const int32_t* from) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))}; }
    __m512i bits() const { return _mm512_castps_si512(v); }
    F32x8 low() const { return {_mm512_castps512_ps256(v)}; }
    F32x8 high() const { return {_mm512_extractf32x8_ps(v, 1)}; }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
    void store_low_bytes(int8_t* to) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(bits()));
    }
    void store_low_halves(int16_t* to) const {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits()));
    }
};
inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 greater(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 greater_bits(F32x16 a, F32x16 b) { return {_mm512_castsi512_ps(_mm512_max_epu32(a.bits(), b.bits()))}; }
inline F32x16 magnitude(F32x16 a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(a.bits(), _mm512_set1_epi32(0x7fffffff)))};
}
inline F32x16 zero_below(F32x16 limit, F32x16 x, F32x16 value) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, limit.v, _CMP_NLT_UQ), value.v)};
}
inline F32x16 exponent_from_low_bits(F32x16 x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x.bits(), 23))}; }
inline float sum_lanes(F32x16 x) { return sum_lanes(x.low() + x.high()); }
inline float greatest_lane(F32x16 x) { return greatest_lane(greater(x.low(), x.high())); }
inline uint32_t greatest_bits(F32x16 x) { return greatest_bits(greater_bits(x.low(), x.high())); }

}  // namespace
}  // namespace fbiedge
