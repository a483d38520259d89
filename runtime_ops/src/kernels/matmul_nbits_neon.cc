// MatMulNBits for every AArch64 processor (Armv8.0, e.g. Raspberry Pi 3 and 4).

#include <arm_neon.h>

namespace fbiedge {
namespace {

// Two products fit in 16 bits, 2 * 128 * 127 = 32512, so they are added there, and the sums of two in 32.
int32x4_t dot_quads(int32x4_t sum_i32x4, int8x16_t a_i8x16, int8x16_t b_i8x16) {
    const int16x8_t low_i16x8 = vmull_s8(vget_low_s8(a_i8x16), vget_low_s8(b_i8x16));
    const int16x8_t high_i16x8 = vmull_high_s8(a_i8x16, b_i8x16);
    return vpadalq_s16(sum_i32x4, vpaddq_s16(low_i16x8, high_i16x8));
}

}  // namespace
}  // namespace fbiedge

#include "shared_matmul_nbits_neon.h"

namespace fbiedge {

const NBitsKernels kNBitsNeon = {
    {nbits_fp32_token_bytes, nbits_prepare_fp32, matmul_nbits_fp32_neon},
    {nbits_int8_token_bytes, prepare_int8_neon, matmul_nbits_int8_neon},
};

}  // namespace fbiedge
