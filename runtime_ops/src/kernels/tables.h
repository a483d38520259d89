// The kernel tables by instruction set. Those of other processors than the one compiled for are only declared.
#pragma once

#include "../kernel_table.h"

namespace fbiedge {

extern const KernelTable kKernelsScalar;
extern const KernelTable kKernelsAvx2;
extern const KernelTable kKernelsAvx512Vnni;
extern const KernelTable kKernelsAvx512Vbmi;
extern const KernelTable kKernelsNeon;
extern const KernelTable kKernelsNeonDotprod;
extern const KernelTable kKernelsNeonI8mm;

}  // namespace fbiedge
