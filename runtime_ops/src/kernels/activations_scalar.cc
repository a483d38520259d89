// One float at a time. Compilers may use vectors for it, which changes no bit.

#include "activations.h"

namespace fbiedge {
namespace {

struct F32 {
    static constexpr size_t kLanes = 1;
    float v;
    static F32 load(const float* from) { return {*from}; }
    static F32 broadcast(float value) { return {value}; }
    void store(float* to) const { *to = v; }
};
F32 operator+(F32 a, F32 b) { return {a.v + b.v}; }
F32 operator-(F32 a, F32 b) { return {a.v - b.v}; }
F32 operator*(F32 a, F32 b) { return {a.v * b.v}; }
F32 operator/(F32 a, F32 b) { return {a.v / b.v}; }
F32 at_most(F32 limit, F32 x) { return limit.v < x.v ? limit : x; }
F32 at_least(F32 limit, F32 x) { return limit.v > x.v ? limit : x; }
F32 exponent_from_low_bits(F32 x) {
    uint32_t bits;
    memcpy(&bits, &x.v, sizeof bits);
    bits <<= 23;
    memcpy(&x.v, &bits, sizeof bits);
    return x;
}

}  // namespace

const ActivationKernels kActivationsScalar = {sum_of_squares<F32>, silu_multiply<F32>};

}  // namespace fbiedge
