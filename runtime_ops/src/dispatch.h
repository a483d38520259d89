// Chooses a kernel for this machine: the only file that knows which kernels exist.
#pragma once

#include <cstddef>

#include "kernel_table.h"

namespace fbiedge {

constexpr size_t kMaxKernels = 4;

// Kernels that this machine can run, best first; the last one is always `scalar`. Thread-safe.
struct AvailableKernels {
    const KernelTable* tables[kMaxKernels];
    size_t count;
};
const AvailableKernels& available_kernels();

// Whether this library knows the name at all, on whatever machine.
bool is_known_isa(const char* isa);

// The named kernel, or null when this machine can't run it. A null or empty name: the best one.
const KernelTable* find_kernels(const char* isa);

// Value of FBIEDGE_ISA, or null when unset or empty.
const char* forced_isa();

}  // namespace fbiedge
