// The activation kernels, written once over a type Vector of each instruction set's file: kLanes floats (a divisor of
// 16) with + - * /, load, store, broadcast and
//   at_most(limit, x), at_least(limit, x)   the smaller, the larger of both; a NaN in x stays
//   exponent_from_low_bits(x)               the float whose bits are those of x shifted left by 23
// Every operation is rounded on its own and none is fused, so all instruction sets give the same bits.
//
//   silu(g) * u = (g / (1 + exp(-g))) * u
//   exp(x) = 2^n * exp(r),  n = round(x / ln 2),  r = x - n * ln 2, |r| <= 0.3466
//
// Adding 1.5 * 2^23 + 127 rounds x / ln 2 and leaves n + 127, the exponent of 2^n, in the low bits. ln 2 is split in a
// part of 9 bits, whose product with n is exact, and a rest. exp(r) is its Taylor series up to r^7 / 5040, which leaves
// out less than 6e-9 of it. x is limited to -87, below which exp(x) vanishes beside 1, and to 89; n = 128, from x =
// 88.38 on, has the exponent of infinity, which makes silu(-x) 0 where it is above -4e-37. silu(-infinity) is NaN, as
// it is in every framework.
#pragma once

#include "../activation_kernels.h"

namespace fbiedge {
namespace {

template <typename Vector>
Vector exponential(Vector x) {
    const Vector magic = Vector::broadcast(12583039.0f);
    x = at_least(Vector::broadcast(-87.0f), at_most(Vector::broadcast(89.0f), x));
    const Vector shifted = x * Vector::broadcast(1.44269504f) + magic;
    const Vector n = shifted - magic;
    const Vector r = x - n * Vector::broadcast(0.693359375f) + n * Vector::broadcast(2.12194440e-4f);
    const float coefficients[] = {1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 1.0f / 2.0f, 1.0f, 1.0f};
    Vector series = Vector::broadcast(1.0f / 5040.0f);
    for (const float coefficient : coefficients) series = series * r + Vector::broadcast(coefficient);
    return series * exponent_from_low_bits(shifted);
}

template <typename Vector>
Vector silu_times(Vector gate, Vector up) {
    const Vector one = Vector::broadcast(1.0f), zero = Vector::broadcast(0.0f);
    return gate / (one + exponential(zero - gate)) * up;
}

template <typename Vector>
void silu_multiply(const float* gate, const float* up, float* y, size_t n) {
    size_t i = 0;
    for (; i + Vector::kLanes <= n; i += Vector::kLanes) {
        silu_times(Vector::load(gate + i), Vector::load(up + i)).store(y + i);
    }
    if (i == n) return;
    float last_gate[Vector::kLanes] = {}, last_up[Vector::kLanes] = {};
    memcpy(last_gate, gate + i, (n - i) * sizeof(float));
    memcpy(last_up, up + i, (n - i) * sizeof(float));
    silu_times(Vector::load(last_gate), Vector::load(last_up)).store(last_gate);
    memcpy(y + i, last_gate, (n - i) * sizeof(float));
}

template <typename Vector>
float sum_of_squares(const float* x, size_t n) {
    constexpr size_t kSums = 16, kVectors = kSums / Vector::kLanes;
    Vector sums[kVectors];
    for (size_t v = 0; v < kVectors; ++v) sums[v] = Vector::broadcast(0.0f);
    float last[kSums] = {};
    for (size_t i = 0; i < n; i += kSums) {
        const float* values = x + i;
        if (n - i < kSums) {
            memcpy(last, values, (n - i) * sizeof(float));
            values = last;
        }
        for (size_t v = 0; v < kVectors; ++v) {
            const Vector value = Vector::load(values + v * Vector::kLanes);
            sums[v] = sums[v] + value * value;
        }
    }
    float lanes[kSums];
    for (size_t v = 0; v < kVectors; ++v) sums[v].store(lanes + v * Vector::kLanes);
    for (size_t step = kSums / 2; step > 0; step /= 2) {
        for (size_t lane = 0; lane < step; ++lane) lanes[lane] = lanes[lane] + lanes[lane + step];
    }
    return lanes[0];
}

}  // namespace
}  // namespace fbiedge
