#include <immintrin.h>

#include "activations.h"

namespace fbiedge {
namespace {

struct F32x16 {
    static constexpr size_t kLanes = 16;
    __m512 v;
    static F32x16 load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static F32x16 broadcast(float value) { return {_mm512_set1_ps(value)}; }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
};
F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
// These give their second operand when one is NaN.
F32x16 at_most(F32x16 limit, F32x16 x) { return {_mm512_min_ps(limit.v, x.v)}; }
F32x16 at_least(F32x16 limit, F32x16 x) { return {_mm512_max_ps(limit.v, x.v)}; }
F32x16 exponent_from_low_bits(F32x16 x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
}

}  // namespace

const ActivationKernels kActivationsAvx512 = {sum_of_squares<F32x16>, silu_multiply<F32x16>};

}  // namespace fbiedge
