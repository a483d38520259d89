// What each instruction set offers, in one place; dispatch.cc chooses among them.

#include "tables.h"

#include "../activation_kernels.h"
#include "../attention_kernels.h"
#include "../matmul_nbits_kernels.h"

namespace fbiedge {

const KernelTable kKernelsScalar = {"scalar", &kBinaryScalar, &kActivationsScalar, &kAttentionScalar, &kNBitsScalar};
#if defined(FBIEDGE_X86)
const KernelTable kKernelsAvx2 = {"avx2", &kBinaryAvx2, &kActivationsAvx2, &kAttentionAvx2, &kNBitsAvx2};
const KernelTable kKernelsAvx512Vnni = {"avx512vnni", &kBinaryAvx512Vnni, &kActivationsAvx512, &kAttentionAvx512Vnni,
                                        &kNBitsAvx512Vnni};
const KernelTable kKernelsAvx512Vbmi = {"avx512vbmi", &kBinaryAvx512Vbmi, &kActivationsAvx512, &kAttentionAvx512Vnni,
                                        &kNBitsAvx512Vnni};
#elif defined(FBIEDGE_ARM64)
const KernelTable kKernelsNeon = {"neon", &kBinaryNeon, &kActivationsNeon, &kAttentionNeon, &kNBitsNeon};
const KernelTable kKernelsNeonDotprod = {"neon_dotprod", &kBinaryNeonDotprod, &kActivationsNeon, &kAttentionNeon,
                                         &kNBitsNeonDotprod};
const KernelTable kKernelsNeonI8mm = {"neon_i8mm", &kBinaryNeonI8mm, &kActivationsNeon, &kAttentionNeon,
                                      &kNBitsNeonDotprod};
#endif

}  // namespace fbiedge
