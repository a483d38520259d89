// Kernels for what happens to activations between two matrices: the same bits on every instruction set.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace fbiedge {

struct ActivationKernels {
    // x[0]^2 + x[1]^2 + …: 16 running sums, lane l adding k = l, 16 + l, …; then lanes 8, 4, 2 and 1 apart.
    float (*sum_of_squares)(const float* x, size_t n);
    // y = silu(gate) * up, element by element; y may be gate or up.
    void (*silu_multiply)(const float* gate, const float* up, float* y, size_t n);
};

extern const ActivationKernels kActivationsScalar;
extern const ActivationKernels kActivationsAvx2;
extern const ActivationKernels kActivationsAvx512;
extern const ActivationKernels kActivationsNeon;

}  // namespace fbiedge
