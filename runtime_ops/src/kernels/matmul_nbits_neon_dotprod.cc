// MatMulNBits for AArch64 with the dot product extension (Armv8.2 FEAT_DotProd).

#include <arm_neon.h>

namespace fbiedge {
namespace {

int32x4_t dot_quads(int32x4_t sum_i32x4, int8x16_t a_i8x16, int8x16_t b_i8x16) {
    return vdotq_s32(sum_i32x4, a_i8x16, b_i8x16);
}

}  // namespace
}  // namespace fbiedge

#include "shared_matmul_nbits_neon.h"

namespace fbiedge {

const NBitsKernels kNBitsNeonDotprod = {
    {nbits_fp32_token_bytes, nbits_prepare_fp32, matmul_nbits_fp32_neon},
    {nbits_int8_token_bytes, prepare_int8_neon, matmul_nbits_int8_neon},
};

}  // namespace fbiedge
