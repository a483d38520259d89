// See lanes.h. One float, doubled four times.
#pragma once

#include "lanes.h"

namespace fbiedge {
namespace {

struct F32x1 {
    static constexpr size_t kCount = 1;
    float v;
    static F32x1 load(const float* from) { return {*from}; }
    static F32x1 broadcast(float value) { return {value}; }
    static F32x1 from_integers(const int32_t* from) { return {static_cast<float>(*from)}; }
    static F32x1 from_bits(uint32_t bits) {
        F32x1 value;
        memcpy(&value.v, &bits, sizeof bits);
        return value;
    }
    uint32_t bits() const {
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        return bits;
    }
    void store(float* to) const { *to = v; }
    void store_low_bytes(int8_t* to) const { *to = static_cast<int8_t>(bits() & 0xff); }
    void store_low_halves(int16_t* to) const { *to = static_cast<int16_t>(bits() & 0xffff); }
};
inline F32x1 operator+(F32x1 a, F32x1 b) { return {a.v + b.v}; }
inline F32x1 operator-(F32x1 a, F32x1 b) { return {a.v - b.v}; }
inline F32x1 operator*(F32x1 a, F32x1 b) { return {a.v * b.v}; }
inline F32x1 operator/(F32x1 a, F32x1 b) { return {a.v / b.v}; }
inline F32x1 greater(F32x1 a, F32x1 b) { return a.v > b.v ? a : b; }
inline F32x1 greater_bits(F32x1 a, F32x1 b) { return a.bits() > b.bits() ? a : b; }
inline F32x1 magnitude(F32x1 a) { return F32x1::from_bits(a.bits() & 0x7fffffffu); }
inline F32x1 zero_below(F32x1 limit, F32x1 x, F32x1 value) { return x.v < limit.v ? F32x1{0.0f} : value; }
inline F32x1 exponent_from_low_bits(F32x1 x) { return F32x1::from_bits(x.bits() << 23); }
inline float sum_lanes(F32x1 x) { return x.v; }
inline float greatest_lane(F32x1 x) { return x.v; }
inline uint32_t greatest_bits(F32x1 x) { return x.bits(); }

using F32x16 = Twice<Twice<Twice<Twice<F32x1>>>>;

}  // namespace
}  // namespace fbiedge
