// MatMulNBits with AVX-512 (F, BW, DQ, VL) and VNNI. A plane of 64 bytes is 16 rows x 4 codes, so one vpdpbusd
// multiplies it with 4 activations broadcast to all rows; codes are unsigned, activations signed, and a block's sum
// starts at its correction (matmul_nbits_kernels.h), which turns codes into weights.
//
// Up to 4 tokens: one tile after the other, so that memory is read as one stream from front to back.
// More tokens: a group's planes are laid out as bytes once (8 KB for two tiles, stays in L1) and reused by blocks of 4
// tokens. Per plane, 8 multiply-adds share two loads and four broadcasts.
//
// fp32: a code is put into the low byte of the float 2^23, which less 2^23 + z is the weight, exactly.

#include <immintrin.h>

#include "../matmul_nbits_kernels.h"

namespace fbiedge {
namespace {

// Asks for all of a group before its first byte is used: more cache lines on their way than the out-of-order window and
// the hardware prefetcher, which stops at every page, would have. Decode from memory on one Zen 4 core: no prefetch 18
// to 22 GB/s, 0.25 to 8 KB ahead 15 to 24, this 21 to 26 beside 24 to 26 of a plain loop that reads. Non-temporal,
// because a head is read once a token and as large as the last-level cache: it should not displace the layers (130M,
// one thread, twice each: int8 head 266 and 285 -> 312 and 282 tok/s, 4 bits 289 and 347 -> 389 and 453).
void prefetch_group(const uint8_t* group, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(group + at), _MM_HINT_NTA);
    }
}

__m512 block_scales(const uint8_t* group, size_t block) {
    const void* halves = group + block * kTileRows * sizeof(uint16_t);
    return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(halves)));
}

// The two planes of a line of 4-bit codes; of 8-bit codes, a line is a plane.
__m512i low_codes(__m512i line_u8x64) { return _mm512_and_si512(line_u8x64, _mm512_set1_epi8(15)); }
__m512i high_codes(__m512i line_u8x64) { return low_codes(_mm512_srli_epi16(line_u8x64, 4)); }

// --- int8 level
// -------------------------------------------------------------------------------------------------------

// 16 int8 in natural order, of every 8 the even ones before the odd ones: planes of 4-bit codes.
__m128i nibble_order(__m128i q_i8x16) {
    return _mm_shuffle_epi8(q_i8x16, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

void prepare_int8_avx512vnni(const float* x, size_t k, unsigned bits, uint8_t* token) {
    const NBitsInt8Layout layout = nbits_int8_layout(ceil_div(k, kGroupInputs));
    float* scales = reinterpret_cast<float*>(token);
    int32_t* corrections = reinterpret_cast<int32_t*>(token + layout.corrections_at);
    __m128i* q = reinterpret_cast<__m128i*>(token + layout.q_at);
    for (size_t group = 0; group < layout.groups; ++group) {
        float padding[kGroupInputs];
        const float* in = nbits_group_input(x, k, group * kGroupInputs, padding);
        __m512 x_f32x16[8];
        __m512i peak_u32x16 = _mm512_setzero_si512();
        for (size_t i = 0; i < 8; ++i) {
            x_f32x16[i] = _mm512_loadu_ps(in + 16 * i);
            const __m512i magnitude_u32x16 =
                _mm512_and_si512(_mm512_castps_si512(x_f32x16[i]), _mm512_set1_epi32(0x7fffffff));
            peak_u32x16 = _mm512_max_epu32(peak_u32x16, magnitude_u32x16);
        }
        const float scale = group_scale(_mm512_reduce_max_epu32(peak_u32x16));
        const __mmask16 usable = scale_is_usable(scale) ? 0xffff : 0;
        const __m512 scale_f32x16 = _mm512_set1_ps(scale);
        scales[group] = scale;
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            __m512i sum_i32x16 = _mm512_setzero_si512();
            for (size_t i = 2 * block; i < 2 * block + 2; ++i) {
                const __m512i q_i32x16 = _mm512_maskz_cvt_roundps_epi32(
                    usable, _mm512_div_ps(x_f32x16[i], scale_f32x16), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                const __m128i q_i8x16 = _mm512_cvtepi32_epi8(q_i32x16);
                sum_i32x16 = _mm512_add_epi32(sum_i32x16, q_i32x16);
                _mm_storeu_si128(q++, bits == 8 ? q_i8x16 : nibble_order(q_i8x16));
            }
            *corrections++ = -(1 << (bits - 1)) * _mm512_reduce_add_epi32(sum_i32x16);
        }
    }
}

__m512i broadcast_quad(const int8_t* q, size_t plane) {
    int32_t quad;
    memcpy(&quad, q + 4 * plane, sizeof quad);
    return _mm512_set1_epi32(quad);
}

template <unsigned kBits, int kTokens>
void stream_int8(const NBitsMultiplyArgs& a, const NBitsInt8Layout& layout, size_t tile, size_t first_token) {
    constexpr size_t kGroupBytes = kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * kBits;
    constexpr size_t kBlockLines = kNBitsBlockPlanes * kBits / 8;
    const uint8_t* group = a.tiles + tile * a.groups * kGroupBytes;
    NBitsInt8Token token[kTokens];
    __m512 total_f32x16[kTokens];
    for (int t = 0; t < kTokens; ++t) {
        token[t] = nbits_int8_token(a, layout, first_token + t);
        total_f32x16[t] = _mm512_setzero_ps();
    }
    for (size_t g = 0; g < a.groups; ++g, group += kGroupBytes) {
        prefetch_group(group, kGroupBytes);
        __m512 v_f32x16[kTokens];
        for (int t = 0; t < kTokens; ++t) v_f32x16[t] = _mm512_setzero_ps();
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            const size_t at = g * kNBitsGroupBlocks + block;
            const uint8_t* lines = group + kNBitsScaleBytes + block * kBlockLines * kNBitsPlaneBytes;
            __m512i sum_i32x16[kTokens];
            for (int t = 0; t < kTokens; ++t) sum_i32x16[t] = _mm512_set1_epi32(token[t].corrections[at]);
            for (size_t line = 0; line < kBlockLines; ++line) {
                const __m512i line_u8x64 = _mm512_loadu_si512(lines + line * kNBitsPlaneBytes);
                for (int t = 0; t < kTokens; ++t) {
                    const int8_t* q = token[t].q + at * kNBitsBlockInputs;
                    if (kBits == 8) {
                        sum_i32x16[t] = _mm512_dpbusd_epi32(sum_i32x16[t], line_u8x64, broadcast_quad(q, line));
                    } else {
                        sum_i32x16[t] =
                            _mm512_dpbusd_epi32(sum_i32x16[t], low_codes(line_u8x64), broadcast_quad(q, 2 * line));
                        sum_i32x16[t] =
                            _mm512_dpbusd_epi32(sum_i32x16[t], high_codes(line_u8x64), broadcast_quad(q, 2 * line + 1));
                    }
                }
            }
            const __m512 d_f32x16 = block_scales(group, block);
            for (int t = 0; t < kTokens; ++t) {
                const __m512 value_f32x16 = _mm512_mul_ps(d_f32x16, _mm512_cvtepi32_ps(sum_i32x16[t]));
                v_f32x16[t] = _mm512_add_ps(v_f32x16[t], value_f32x16);
            }
        }
        for (int t = 0; t < kTokens; ++t) {
            const __m512 scaled_f32x16 = _mm512_mul_ps(_mm512_set1_ps(token[t].scales[g]), v_f32x16[t]);
            total_f32x16[t] = _mm512_add_ps(total_f32x16[t], scaled_f32x16);
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        _mm512_storeu_ps(a.y + (first_token + t) * a.y_stride + tile * kTileRows, total_f32x16[t]);
    }
}

constexpr size_t kGemmTokens = 4;

// Two tiles' state over all tokens, for one group after the other.
struct GemmState {
    alignas(64) uint8_t planes[2][kNBitsGroupPlanes][kNBitsPlaneBytes];
    alignas(64) float scales[2][kNBitsGroupBlocks][kTileRows];
    alignas(64) float totals[kMaxTokens][2][kTileRows];
};

template <unsigned kBits, int kTiles>
void expand_group(const NBitsMultiplyArgs& a, size_t tile, size_t g, GemmState& state) {
    constexpr size_t kGroupBytes = kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * kBits;
    for (int n = 0; n < kTiles; ++n) {
        const uint8_t* group = a.tiles + ((tile + n) * a.groups + g) * kGroupBytes;
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            _mm512_store_ps(state.scales[n][block], block_scales(group, block));
        }
        for (size_t line = 0; line < kNBitsGroupPlanes * kBits / 8; ++line) {
            const __m512i line_u8x64 = _mm512_loadu_si512(group + kNBitsScaleBytes + line * kNBitsPlaneBytes);
            if (kBits == 8) {
                _mm512_store_si512(state.planes[n][line], line_u8x64);
            } else {
                _mm512_store_si512(state.planes[n][2 * line], low_codes(line_u8x64));
                _mm512_store_si512(state.planes[n][2 * line + 1], high_codes(line_u8x64));
            }
        }
    }
}

template <int kTiles>
void gemm_block_int8(const NBitsMultiplyArgs& a, const NBitsInt8Layout& layout, size_t g, size_t first_token,
                     GemmState& state) {
    NBitsInt8Token token[kGemmTokens];
    __m512 v_f32x16[kTiles][kGemmTokens];
    for (size_t t = 0; t < kGemmTokens; ++t) {
        token[t] = nbits_int8_token(a, layout, first_token + t);
        for (int n = 0; n < kTiles; ++n) v_f32x16[n][t] = _mm512_setzero_ps();
    }
    for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
        const size_t at = g * kNBitsGroupBlocks + block;
        __m512i sum_i32x16[kTiles][kGemmTokens];
        for (size_t t = 0; t < kGemmTokens; ++t) {
            for (int n = 0; n < kTiles; ++n) sum_i32x16[n][t] = _mm512_set1_epi32(token[t].corrections[at]);
        }
        for (size_t plane = 0; plane < kNBitsBlockPlanes; ++plane) {
            __m512i codes_u8x64[kTiles];
            for (int n = 0; n < kTiles; ++n) {
                codes_u8x64[n] = _mm512_load_si512(state.planes[n][block * kNBitsBlockPlanes + plane]);
            }
            for (size_t t = 0; t < kGemmTokens; ++t) {
                const __m512i q_i8x64 = broadcast_quad(token[t].q + at * kNBitsBlockInputs, plane);
                for (int n = 0; n < kTiles; ++n) {
                    sum_i32x16[n][t] = _mm512_dpbusd_epi32(sum_i32x16[n][t], codes_u8x64[n], q_i8x64);
                }
            }
        }
        for (int n = 0; n < kTiles; ++n) {
            const __m512 d_f32x16 = _mm512_load_ps(state.scales[n][block]);
            for (size_t t = 0; t < kGemmTokens; ++t) {
                const __m512 value_f32x16 = _mm512_mul_ps(d_f32x16, _mm512_cvtepi32_ps(sum_i32x16[n][t]));
                v_f32x16[n][t] = _mm512_add_ps(v_f32x16[n][t], value_f32x16);
            }
        }
    }
    for (size_t t = 0; t < kGemmTokens; ++t) {
        const __m512 scale_f32x16 = _mm512_set1_ps(token[t].scales[g]);
        for (int n = 0; n < kTiles; ++n) {
            float* total = state.totals[first_token + t][n];
            const __m512 total_f32x16 = g == 0 ? _mm512_setzero_ps() : _mm512_load_ps(total);
            _mm512_store_ps(total, _mm512_add_ps(total_f32x16, _mm512_mul_ps(scale_f32x16, v_f32x16[n][t])));
        }
    }
}

template <unsigned kBits, int kTiles>
void gemm_int8(const NBitsMultiplyArgs& a, const NBitsInt8Layout& layout, size_t tile, size_t n_tokens,
               GemmState& state) {
    for (size_t g = 0; g < a.groups; ++g) {
        expand_group<kBits, kTiles>(a, tile, g, state);
        for (size_t token = 0; token < n_tokens; token += kGemmTokens) {
            gemm_block_int8<kTiles>(a, layout, g, token, state);
        }
    }
    for (size_t token = 0; token < n_tokens; ++token) {
        for (int n = 0; n < kTiles; ++n) {
            _mm512_storeu_ps(a.y + token * a.y_stride + (tile + n) * kTileRows, _mm512_load_ps(state.totals[token][n]));
        }
    }
}

template <unsigned kBits>
void stream_tokens_int8(const NBitsMultiplyArgs& a, const NBitsInt8Layout& layout, size_t tile, size_t first_token) {
    switch (a.m - first_token) {
        case 1:
            return stream_int8<kBits, 1>(a, layout, tile, first_token);
        case 2:
            return stream_int8<kBits, 2>(a, layout, tile, first_token);
        case 3:
            return stream_int8<kBits, 3>(a, layout, tile, first_token);
        case 4:
            return stream_int8<kBits, 4>(a, layout, tile, first_token);
        default:
            return;
    }
}

template <unsigned kBits>
void matmul_nbits_int8(const NBitsMultiplyArgs& a) {
    const NBitsInt8Layout layout = nbits_int8_layout(a.groups);
    const size_t in_blocks = a.m <= kGemmTokens ? 0 : a.m / kGemmTokens * kGemmTokens;
    if (in_blocks > 0) {
        GemmState state;
        size_t tile = 0;
        for (; tile + 2 <= a.n_tiles; tile += 2) gemm_int8<kBits, 2>(a, layout, tile, in_blocks, state);
        for (; tile < a.n_tiles; ++tile) gemm_int8<kBits, 1>(a, layout, tile, in_blocks, state);
    }
    for (size_t tile = 0; tile < a.n_tiles; ++tile) stream_tokens_int8<kBits>(a, layout, tile, in_blocks);
}

void matmul_nbits_int8_avx512vnni(const NBitsMultiplyArgs& a) {
    a.bits == 8 ? matmul_nbits_int8<8>(a) : matmul_nbits_int8<4>(a);
}

// --- fp32 level
// -------------------------------------------------------------------------------------------------------

// sum[j] += weight * x of inputs j of 4, for the codes of a plane.
template <unsigned kBits, int kTokens>
void add_plane_fp32(__m512i codes_u8x64, const float* const x[kTokens], size_t at, __m512 sum_f32x16[kTokens][4]) {
    const __m512i two_23_u32x16 = _mm512_set1_epi32(0x4b000000);
    const __m512 zero_f32x16 = _mm512_set1_ps(8388608.0f + (1 << (kBits - 1)));
    for (int j = 0; j < 4; ++j) {
        const __m512i byte_u32x16 = j == 0 ? codes_u8x64 : _mm512_srli_epi32(codes_u8x64, 8 * j);
        // (byte & 255) | 2^23
        const __m512i code_u32x16 = _mm512_ternarylogic_epi32(byte_u32x16, _mm512_set1_epi32(255), two_23_u32x16, 0xea);
        const __m512 weight_f32x16 = _mm512_sub_ps(_mm512_castsi512_ps(code_u32x16), zero_f32x16);
        for (int t = 0; t < kTokens; ++t) {
            sum_f32x16[t][j] = _mm512_fmadd_ps(weight_f32x16, _mm512_set1_ps(x[t][at + j]), sum_f32x16[t][j]);
        }
    }
}

// The order of additions of one output does not depend on kTokens.
template <unsigned kBits, int kTokens>
void tokens_fp32(const NBitsMultiplyArgs& a, size_t tile, size_t first_token) {
    constexpr size_t kGroupBytes = kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * kBits;
    constexpr size_t kBlockLines = kNBitsBlockPlanes * kBits / 8;
    const uint8_t* group = a.tiles + tile * a.groups * kGroupBytes;
    const float* x[kTokens];
    __m512 total_f32x16[kTokens];
    for (int t = 0; t < kTokens; ++t) {
        x[t] = reinterpret_cast<const float*>(a.tokens + (first_token + t) * a.token_stride_in_bytes);
        total_f32x16[t] = _mm512_setzero_ps();
    }
    for (size_t g = 0; g < a.groups; ++g, group += kGroupBytes) {
        if (a.m <= kGemmTokens) prefetch_group(group, kGroupBytes);  // more tokens read the tile again
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            const uint8_t* lines = group + kNBitsScaleBytes + block * kBlockLines * kNBitsPlaneBytes;
            size_t at = (g * kNBitsGroupBlocks + block) * kNBitsBlockInputs;
            __m512 sum_f32x16[kTokens][4];
            for (int t = 0; t < kTokens; ++t) {
                for (int j = 0; j < 4; ++j) sum_f32x16[t][j] = _mm512_setzero_ps();
            }
            for (size_t line = 0; line < kBlockLines; ++line) {
                const __m512i line_u8x64 = _mm512_loadu_si512(lines + line * kNBitsPlaneBytes);
                if (kBits == 8) {
                    add_plane_fp32<kBits, kTokens>(line_u8x64, x, at, sum_f32x16);
                    at += 4;
                } else {
                    add_plane_fp32<kBits, kTokens>(low_codes(line_u8x64), x, at, sum_f32x16);
                    add_plane_fp32<kBits, kTokens>(high_codes(line_u8x64), x, at + 4, sum_f32x16);
                    at += 8;
                }
            }
            const __m512 d_f32x16 = block_scales(group, block);
            for (int t = 0; t < kTokens; ++t) {
                const __m512 low_f32x16 = _mm512_add_ps(sum_f32x16[t][0], sum_f32x16[t][1]);
                const __m512 high_f32x16 = _mm512_add_ps(sum_f32x16[t][2], sum_f32x16[t][3]);
                total_f32x16[t] = _mm512_fmadd_ps(d_f32x16, _mm512_add_ps(low_f32x16, high_f32x16), total_f32x16[t]);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        _mm512_storeu_ps(a.y + (first_token + t) * a.y_stride + tile * kTileRows, total_f32x16[t]);
    }
}

template <unsigned kBits>
void matmul_nbits_fp32(const NBitsMultiplyArgs& a) {
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        size_t token = 0;
        for (; token + 4 <= a.m; token += 4) tokens_fp32<kBits, 4>(a, tile, token);
        for (; token < a.m; ++token) tokens_fp32<kBits, 1>(a, tile, token);
    }
}

void matmul_nbits_fp32_avx512vnni(const NBitsMultiplyArgs& a) {
    a.bits == 8 ? matmul_nbits_fp32<8>(a) : matmul_nbits_fp32<4>(a);
}

}  // namespace

const NBitsKernels kNBitsAvx512Vnni = {
    {nbits_fp32_token_bytes, nbits_prepare_fp32, matmul_nbits_fp32_avx512vnni},
    {nbits_int8_token_bytes, prepare_int8_avx512vnni, matmul_nbits_int8_avx512vnni},
};

}  // namespace fbiedge
