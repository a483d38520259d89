// What each instruction set offers, in one place; dispatch.cc chooses among them.

#include "tables.h"

namespace fbiedge {

const KernelTable kKernelsScalar = {"scalar", &kBinaryScalar};
#if defined(FBIEDGE_X86)
const KernelTable kKernelsAvx2 = {"avx2", &kBinaryAvx2};
const KernelTable kKernelsAvx512Vnni = {"avx512vnni", &kBinaryAvx512Vnni};
#elif defined(FBIEDGE_ARM64)
const KernelTable kKernelsNeon = {"neon", &kBinaryNeon};
#endif

}  // namespace fbiedge
