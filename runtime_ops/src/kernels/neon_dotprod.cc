// BinaryMatMul for AArch64 with the dot product extension (Armv8.2 FEAT_DotProd; in all cores from Armv8.4 on).

#include "neon_sdot.h"

namespace fbiedge {
namespace {

void binary_matmul_int8_neon_dotprod(const MultiplyArgs& a) {
    const Int8Layout layout = int8_layout(a.k);
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        size_t token = 0;
        for (; token + 4 <= a.m; token += 4) tokens_sdot<4>(a, layout, tile, token);
        for (; token + 2 <= a.m; token += 2) tokens_sdot<2>(a, layout, tile, token);
        for (; token < a.m; ++token) tokens_sdot<1>(a, layout, tile, token);
    }
}

}  // namespace

const BinaryKernels kBinaryNeonDotprod = {
    {token_bytes_fp32_neon, prepare_fp32_neon, binary_matmul_fp32_neon},
    {int8_token_bytes, prepare_int8_planes, binary_matmul_int8_neon_dotprod},
};

}  // namespace fbiedge
