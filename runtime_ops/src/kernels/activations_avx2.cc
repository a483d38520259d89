#include <immintrin.h>

#include "activations.h"

namespace fbiedge {
namespace {

struct F32x8 {
    static constexpr size_t kLanes = 8;
    __m256 v;
    static F32x8 load(const float* from) { return {_mm256_loadu_ps(from)}; }
    static F32x8 broadcast(float value) { return {_mm256_set1_ps(value)}; }
    void store(float* to) const { _mm256_storeu_ps(to, v); }
};
F32x8 operator+(F32x8 a, F32x8 b) { return {_mm256_add_ps(a.v, b.v)}; }
F32x8 operator-(F32x8 a, F32x8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
F32x8 operator*(F32x8 a, F32x8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
F32x8 operator/(F32x8 a, F32x8 b) { return {_mm256_div_ps(a.v, b.v)}; }
// These give their second operand when one is NaN.
F32x8 at_most(F32x8 limit, F32x8 x) { return {_mm256_min_ps(limit.v, x.v)}; }
F32x8 at_least(F32x8 limit, F32x8 x) { return {_mm256_max_ps(limit.v, x.v)}; }
F32x8 exponent_from_low_bits(F32x8 x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))}; }

}  // namespace

const ActivationKernels kActivationsAvx2 = {sum_of_squares<F32x8>, silu_multiply<F32x8>};

}  // namespace fbiedge
