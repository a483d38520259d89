// See lanes.h. Eight floats, doubled.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace fbiedge {
namespace {

struct F32x8 {
    static constexpr size_t kCount = 8;
    __m256 v;
    static F32x8 load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static F32x8 broadcast(float value) { return {_mm256_set1_ps(value)}; }
    static F32x8 from_integers(const int32_t* from) {
        return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
    // Eight 16-bit numbers of the patterns' lower halves.
    __m128i low_halves() const {
        const __m256i halves = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0xffff));
        return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    }
    void store_low_bytes(int8_t* to) const {
        const __m128i bytes = _mm_and_si128(low_halves(), _mm_set1_epi16(0xff));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(bytes, bytes));
    }
    void store_low_halves(int16_t* to) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), low_halves()); }
};
inline F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32x8 operator-(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32x8 greater(F32x8 a, F32x8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32x8 greater_bits(F32x8 a, F32x8 b) {
    return {_mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
}
inline F32x8 magnitude(F32x8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32x8 zero_below(F32x8 limit, F32x8 x, F32x8 value) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.v, limit.v, _CMP_LT_OQ), value.v)};
}
inline F32x8 exponent_from_low_bits(F32x8 x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))};
}
inline float sum_lanes(F32x8 x) {
    __m128 v = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps(v, v, 1)));
}
inline float greatest_lane(F32x8 x) {
    __m128 v = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    return _mm_cvtss_f32(_mm_max_ss(v, _mm_shuffle_ps(v, v, 1)));
}
inline uint32_t greatest_bits(F32x8 x) {
    const __m256i bits = _mm256_castps_si256(x.v);
    __m128i v = _mm_max_epu32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    v = _mm_max_epu32(v, _mm_shuffle_epi32(v, 0x4e));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(v, _mm_shuffle_epi32(v, 0xb1))));
}

#if !defined(__AVX512F__)
using F32x16 = Twice<F32x8>;
#endif

}  // namespace
}  // namespace fbiedge
