// Sixteen floats as an instruction set offers them. A kernel file that includes lanes_<isa>.h has a type F32x16, and
// what is written with it computes the same bits everywhere: each operation is IEEE's, rounded on its own.
//
// What such a type must have stands here, for two halves of a narrower one.
#pragma once

#include "../kernel_table.h"

namespace fbiedge {
namespace {

template <class Half>
struct Twice {
    static constexpr size_t kHalf = Half::kCount;
    static constexpr size_t kCount = 2 * kHalf;
    Half low, high;

    static Twice load(const float* from) { return {Half::load(from), Half::load(from + kHalf)}; }
    static Twice broadcast(float value) { return {Half::broadcast(value), Half::broadcast(value)}; }
    static Twice from_integers(const int32_t* from) {
        return {Half::from_integers(from), Half::from_integers(from + kHalf)};
    }
    void store(float* to) const {
        low.store(to);
        high.store(to + kHalf);
    }
    // The lowest bits of each float's pattern: see kRoundingMagic.
    void store_low_bytes(int8_t* to) const {
        low.store_low_bytes(to);
        high.store_low_bytes(to + kHalf);
    }
    void store_low_halves(int16_t* to) const {
        low.store_low_halves(to);
        high.store_low_halves(to + kHalf);
    }
};

template <class H>
inline Twice<H> operator+(Twice<H> a, Twice<H> b) {
    return {a.low + b.low, a.high + b.high};
}
template <class H>
inline Twice<H> operator-(Twice<H> a, Twice<H> b) {
    return {a.low - b.low, a.high - b.high};
}
template <class H>
inline Twice<H> operator*(Twice<H> a, Twice<H> b) {
    return {a.low * b.low, a.high * b.high};
}
template <class H>
inline Twice<H> operator/(Twice<H> a, Twice<H> b) {
    return {a.low / b.low, a.high / b.high};
}
// a > b ? a : b, which is b where one is NaN.
template <class H>
inline Twice<H> greater(Twice<H> a, Twice<H> b) {
    return {greater(a.low, b.low), greater(a.high, b.high)};
}
// The same of the patterns as unsigned integers.
template <class H>
inline Twice<H> greater_bits(Twice<H> a, Twice<H> b) {
    return {greater_bits(a.low, b.low), greater_bits(a.high, b.high)};
}
template <class H>
inline Twice<H> magnitude(Twice<H> a) {
    return {magnitude(a.low), magnitude(a.high)};
}
// x < limit ? 0 : value
template <class H>
inline Twice<H> zero_below(Twice<H> limit, Twice<H> x, Twice<H> value) {
    return {zero_below(limit.low, x.low, value.low), zero_below(limit.high, x.high, value.high)};
}
// The lowest 8 bits of the pattern as the exponent.
template <class H>
inline Twice<H> exponent_from_low_bits(Twice<H> x) {
    return {exponent_from_low_bits(x.low), exponent_from_low_bits(x.high)};
}
// Over the lanes, those 8, 4, 2 and 1 apart.
template <class H>
inline float sum_lanes(Twice<H> x) {
    return sum_lanes(x.low + x.high);
}
template <class H>
inline float greatest_lane(Twice<H> x) {
    return greatest_lane(greater(x.low, x.high));
}
template <class H>
inline uint32_t greatest_bits(Twice<H> x) {
    return greatest_bits(greater_bits(x.low, x.high));
}

}  // namespace
}  // namespace fbiedge
