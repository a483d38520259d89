// MatMulNBits with AVX2 and F16C. A plane is two 256-bit halves of 8 rows x 4 codes.
//
// vpmaddubsw multiplies unsigned with signed bytes and adds pairs into 16 bits, where it saturates, so the sizes
// matter.
//   8 bits: as |w| * (q with the sign of w), w = code - 128. A pair is at most 2 * 128 * 127 = 32512 < 32768, exact,
//   and
//           is widened to 32 bits at once.
//   4 bits: as code * q. A pair is at most 2 * 15 * 127 = 3810, and a block adds 8 of them: 30480 < 32768. Only then
//   are
//           they widened, and the block's correction added.
//
// fp32: a code is put into the low byte of the float 2^23, which less 2^23 + z is the weight, exactly.

#include <immintrin.h>

#include "../matmul_nbits_kernels.h"

namespace fbiedge {
namespace {

constexpr size_t kHalfRows = 8;
constexpr size_t kHalfBytes = 32;  // of a plane

// Asks for all of a group before its first byte is used; see matmul_nbits_avx512vnni.cc.
void prefetch_group(const uint8_t* group, size_t bytes) {
    for (size_t at = 0; at < bytes; at += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(group + at), _MM_HINT_T0);
    }
}

__m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }

__m256 block_scales(const uint8_t* group, size_t block, size_t half) {
    const void* halves = group + (block * kTileRows + half * kHalfRows) * sizeof(uint16_t);
    return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(halves)));
}

// The two planes of a line of 4-bit codes; of 8-bit codes, a line is a plane.
__m256i low_codes(__m256i line_u8x32) { return _mm256_and_si256(line_u8x32, _mm256_set1_epi8(15)); }
__m256i high_codes(__m256i line_u8x32) { return low_codes(_mm256_srli_epi16(line_u8x32, 4)); }

// --- int8 level
// -------------------------------------------------------------------------------------------------------

uint32_t max_lane(__m256i v_u32x8) {
    __m128i max_u32x4 = _mm_max_epu32(_mm256_castsi256_si128(v_u32x8), _mm256_extracti128_si256(v_u32x8, 1));
    max_u32x4 = _mm_max_epu32(max_u32x4, _mm_shuffle_epi32(max_u32x4, 0x4e));
    max_u32x4 = _mm_max_epu32(max_u32x4, _mm_shuffle_epi32(max_u32x4, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(max_u32x4));
}

int32_t add_lanes(__m256i v_i32x8) {
    __m128i sum_i32x4 = _mm_add_epi32(_mm256_castsi256_si128(v_i32x8), _mm256_extracti128_si256(v_i32x8, 1));
    sum_i32x4 = _mm_add_epi32(sum_i32x4, _mm_shuffle_epi32(sum_i32x4, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum_i32x4, _mm_shuffle_epi32(sum_i32x4, 0xb1)));
}

// 16 int32 -> 16 int8 in order. The values fit, so the saturating packs change nothing.
__m128i narrow(__m256i low_i32x8, __m256i high_i32x8) {
    const __m256i i16x16 = _mm256_permute4x64_epi64(_mm256_packs_epi32(low_i32x8, high_i32x8), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(i16x16), _mm256_extracti128_si256(i16x16, 1));
}

// 16 int8 in natural order, of every 8 the even ones before the odd ones: planes of 4-bit codes.
__m128i nibble_order(__m128i q_i8x16) {
    return _mm_shuffle_epi8(q_i8x16, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
}

void prepare_int8_avx2(const float* x, size_t k, unsigned bits, uint8_t* token) {
    const NBitsInt8Layout layout = nbits_int8_layout(ceil_div(k, kGroupInputs));
    float* scales = reinterpret_cast<float*>(token);
    int32_t* corrections = reinterpret_cast<int32_t*>(token + layout.corrections_at);
    __m128i* q = reinterpret_cast<__m128i*>(token + layout.q_at);
    for (size_t group = 0; group < layout.groups; ++group) {
        float padding[kGroupInputs];
        const float* in = nbits_group_input(x, k, group * kGroupInputs, padding);
        __m256i peak_u32x8 = _mm256_setzero_si256();
        for (size_t i = 0; i < kGroupInputs; i += 8) {
            const __m256i magnitude_u32x8 = _mm256_and_si256(load(in + i), _mm256_set1_epi32(0x7fffffff));
            peak_u32x8 = _mm256_max_epu32(peak_u32x8, magnitude_u32x8);
        }
        const float scale = group_scale(max_lane(peak_u32x8));
        const __m256 scale_f32x8 = _mm256_set1_ps(scale);
        const __m256i usable_i32x8 = _mm256_set1_epi32(scale_is_usable(scale) ? -1 : 0);
        scales[group] = scale;
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            __m256i sum_i32x8 = _mm256_setzero_si256();
            for (size_t half = 0; half < 2; ++half) {
                __m256i q_i32x8[2];
                for (size_t j = 0; j < 2; ++j) {
                    const __m256 x_f32x8 = _mm256_loadu_ps(in + block * kNBitsBlockInputs + 16 * half + 8 * j);
                    const __m256 rounded_f32x8 = _mm256_round_ps(_mm256_div_ps(x_f32x8, scale_f32x8),
                                                                 _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                    q_i32x8[j] = _mm256_and_si256(_mm256_cvtps_epi32(rounded_f32x8), usable_i32x8);
                    sum_i32x8 = _mm256_add_epi32(sum_i32x8, q_i32x8[j]);
                }
                const __m128i q_i8x16 = narrow(q_i32x8[0], q_i32x8[1]);
                _mm_storeu_si128(q++, bits == 8 ? q_i8x16 : nibble_order(q_i8x16));
            }
            *corrections++ = -(1 << (bits - 1)) * add_lanes(sum_i32x8);
        }
    }
}

__m256i broadcast_quad(const int8_t* q, size_t plane) {
    int32_t quad;
    memcpy(&quad, q + 4 * plane, sizeof quad);
    return _mm256_set1_epi32(quad);
}

// Sums of weight * q of one block, for 8 rows and each token.
template <unsigned kBits, int kTokens>
void block_sums(const uint8_t* lines, const int8_t* const q[kTokens], const int32_t corrections[kTokens],
                __m256i sum_i32x8[kTokens]) {
    const __m256i ones_i16x16 = _mm256_set1_epi16(1);
    if (kBits == 8) {
        for (int t = 0; t < kTokens; ++t) sum_i32x8[t] = _mm256_setzero_si256();
        for (size_t plane = 0; plane < kNBitsBlockPlanes; ++plane) {
            const __m256i w_i8x32 = _mm256_xor_si256(load(lines + plane * kNBitsPlaneBytes), _mm256_set1_epi8(-128));
            const __m256i magnitude_u8x32 = _mm256_abs_epi8(w_i8x32);
            for (int t = 0; t < kTokens; ++t) {
                const __m256i signed_q_i8x32 = _mm256_sign_epi8(broadcast_quad(q[t], plane), w_i8x32);
                const __m256i pairs_i16x16 = _mm256_maddubs_epi16(magnitude_u8x32, signed_q_i8x32);
                sum_i32x8[t] = _mm256_add_epi32(sum_i32x8[t], _mm256_madd_epi16(pairs_i16x16, ones_i16x16));
            }
        }
        return;
    }
    __m256i pairs_i16x16[kTokens];
    for (int t = 0; t < kTokens; ++t) pairs_i16x16[t] = _mm256_setzero_si256();
    for (size_t line = 0; line < kNBitsBlockPlanes / 2; ++line) {
        const __m256i line_u8x32 = load(lines + line * kNBitsPlaneBytes);
        const __m256i low_u8x32 = low_codes(line_u8x32), high_u8x32 = high_codes(line_u8x32);
        for (int t = 0; t < kTokens; ++t) {
            const __m256i low_i16x16 = _mm256_maddubs_epi16(low_u8x32, broadcast_quad(q[t], 2 * line));
            const __m256i high_i16x16 = _mm256_maddubs_epi16(high_u8x32, broadcast_quad(q[t], 2 * line + 1));
            pairs_i16x16[t] = _mm256_add_epi16(pairs_i16x16[t], _mm256_add_epi16(low_i16x16, high_i16x16));
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        sum_i32x8[t] =
            _mm256_add_epi32(_mm256_set1_epi32(corrections[t]), _mm256_madd_epi16(pairs_i16x16[t], ones_i16x16));
    }
}

template <unsigned kBits, int kTokens>
void tokens_int8(const NBitsMultiplyArgs& a, const NBitsInt8Layout& layout, size_t tile, size_t first_token) {
    constexpr size_t kGroupBytes = kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * kBits;
    constexpr size_t kBlockBytes = kNBitsBlockPlanes * kBits / 8 * kNBitsPlaneBytes;
    const uint8_t* group = a.tiles + tile * a.groups * kGroupBytes;
    NBitsInt8Token token[kTokens];
    __m256 total_f32x8[2][kTokens];
    for (int t = 0; t < kTokens; ++t) {
        token[t] = nbits_int8_token(a, layout, first_token + t);
        total_f32x8[0][t] = total_f32x8[1][t] = _mm256_setzero_ps();
    }
    for (size_t g = 0; g < a.groups; ++g, group += kGroupBytes) {
        prefetch_group(group, kGroupBytes);
        __m256 v_f32x8[2][kTokens];
        for (int t = 0; t < kTokens; ++t) v_f32x8[0][t] = v_f32x8[1][t] = _mm256_setzero_ps();
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            const size_t at = g * kNBitsGroupBlocks + block;
            const int8_t* q[kTokens];
            int32_t corrections[kTokens];
            for (int t = 0; t < kTokens; ++t) {
                q[t] = token[t].q + at * kNBitsBlockInputs;
                corrections[t] = token[t].corrections[at];
            }
            for (size_t half = 0; half < 2; ++half) {
                const uint8_t* lines = group + kNBitsScaleBytes + block * kBlockBytes + half * kHalfBytes;
                __m256i sum_i32x8[kTokens];
                block_sums<kBits, kTokens>(lines, q, corrections, sum_i32x8);
                const __m256 d_f32x8 = block_scales(group, block, half);
                for (int t = 0; t < kTokens; ++t) {
                    const __m256 value_f32x8 = _mm256_mul_ps(d_f32x8, _mm256_cvtepi32_ps(sum_i32x8[t]));
                    v_f32x8[half][t] = _mm256_add_ps(v_f32x8[half][t], value_f32x8);
                }
            }
        }
        for (int t = 0; t < kTokens; ++t) {
            const __m256 scale_f32x8 = _mm256_set1_ps(token[t].scales[g]);
            for (size_t half = 0; half < 2; ++half) {
                const __m256 scaled_f32x8 = _mm256_mul_ps(scale_f32x8, v_f32x8[half][t]);
                total_f32x8[half][t] = _mm256_add_ps(total_f32x8[half][t], scaled_f32x8);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        float* y = a.y + (first_token + t) * a.y_stride + tile * kTileRows;
        for (size_t half = 0; half < 2; ++half) _mm256_storeu_ps(y + half * kHalfRows, total_f32x8[half][t]);
    }
}

template <unsigned kBits>
void matmul_nbits_int8(const NBitsMultiplyArgs& a) {
    const NBitsInt8Layout layout = nbits_int8_layout(a.groups);
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        size_t token = 0;
        for (; token + 4 <= a.m; token += 4) tokens_int8<kBits, 4>(a, layout, tile, token);
        for (; token + 2 <= a.m; token += 2) tokens_int8<kBits, 2>(a, layout, tile, token);
        for (; token < a.m; ++token) tokens_int8<kBits, 1>(a, layout, tile, token);
    }
}

void matmul_nbits_int8_avx2(const NBitsMultiplyArgs& a) {
    a.bits == 8 ? matmul_nbits_int8<8>(a) : matmul_nbits_int8<4>(a);
}

// --- fp32 level
// -------------------------------------------------------------------------------------------------------

// sum[j] += weight * x of inputs j of 4, for the codes of half a plane.
template <unsigned kBits, int kTokens>
void add_plane_fp32(__m256i codes_u8x32, const float* const x[kTokens], size_t at, __m256 sum_f32x8[kTokens][4]) {
    const __m256i two_23_u32x8 = _mm256_set1_epi32(0x4b000000);
    const __m256 zero_f32x8 = _mm256_set1_ps(8388608.0f + (1 << (kBits - 1)));
    for (int j = 0; j < 4; ++j) {
        const __m256i byte_u32x8 = _mm256_and_si256(_mm256_srli_epi32(codes_u8x32, 8 * j), _mm256_set1_epi32(255));
        const __m256 code_f32x8 = _mm256_castsi256_ps(_mm256_or_si256(byte_u32x8, two_23_u32x8));
        const __m256 weight_f32x8 = _mm256_sub_ps(code_f32x8, zero_f32x8);
        for (int t = 0; t < kTokens; ++t) {
            const __m256 product_f32x8 = _mm256_mul_ps(weight_f32x8, _mm256_broadcast_ss(x[t] + at + j));
            sum_f32x8[t][j] = _mm256_add_ps(sum_f32x8[t][j], product_f32x8);
        }
    }
}

// The order of additions of one output does not depend on kTokens.
template <unsigned kBits, int kTokens>
void tokens_fp32(const NBitsMultiplyArgs& a, size_t tile, size_t half, size_t first_token) {
    constexpr size_t kGroupBytes = kNBitsScaleBytes + kTileRows * kGroupInputs / 8 * kBits;
    constexpr size_t kBlockLines = kNBitsBlockPlanes * kBits / 8;
    const uint8_t* group = a.tiles + tile * a.groups * kGroupBytes;
    const float* x[kTokens];
    __m256 total_f32x8[kTokens];
    for (int t = 0; t < kTokens; ++t) {
        x[t] = reinterpret_cast<const float*>(a.tokens + (first_token + t) * a.token_stride_in_bytes);
        total_f32x8[t] = _mm256_setzero_ps();
    }
    for (size_t g = 0; g < a.groups; ++g, group += kGroupBytes) {
        if (half == 0) prefetch_group(group, kGroupBytes);
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            const uint8_t* lines = group + kNBitsScaleBytes + block * kBlockLines * kNBitsPlaneBytes;
            size_t at = (g * kNBitsGroupBlocks + block) * kNBitsBlockInputs;
            __m256 sum_f32x8[kTokens][4];
            for (int t = 0; t < kTokens; ++t) {
                for (int j = 0; j < 4; ++j) sum_f32x8[t][j] = _mm256_setzero_ps();
            }
            for (size_t line = 0; line < kBlockLines; ++line) {
                const __m256i line_u8x32 = load(lines + line * kNBitsPlaneBytes + half * kHalfBytes);
                if (kBits == 8) {
                    add_plane_fp32<kBits, kTokens>(line_u8x32, x, at, sum_f32x8);
                    at += 4;
                } else {
                    add_plane_fp32<kBits, kTokens>(low_codes(line_u8x32), x, at, sum_f32x8);
                    add_plane_fp32<kBits, kTokens>(high_codes(line_u8x32), x, at + 4, sum_f32x8);
                    at += 8;
                }
            }
            const __m256 d_f32x8 = block_scales(group, block, half);
            for (int t = 0; t < kTokens; ++t) {
                const __m256 low_f32x8 = _mm256_add_ps(sum_f32x8[t][0], sum_f32x8[t][1]);
                const __m256 high_f32x8 = _mm256_add_ps(sum_f32x8[t][2], sum_f32x8[t][3]);
                const __m256 value_f32x8 = _mm256_mul_ps(d_f32x8, _mm256_add_ps(low_f32x8, high_f32x8));
                total_f32x8[t] = _mm256_add_ps(total_f32x8[t], value_f32x8);
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        float* y = a.y + (first_token + t) * a.y_stride + tile * kTileRows + half * kHalfRows;
        _mm256_storeu_ps(y, total_f32x8[t]);
    }
}

template <unsigned kBits>
void matmul_nbits_fp32(const NBitsMultiplyArgs& a) {
    for (size_t tile = 0; tile < a.n_tiles; ++tile) {
        size_t token = 0;
        for (; token + 2 <= a.m; token += 2) {
            for (size_t half = 0; half < 2; ++half) tokens_fp32<kBits, 2>(a, tile, half, token);
        }
        for (; token < a.m; ++token) {
            for (size_t half = 0; half < 2; ++half) tokens_fp32<kBits, 1>(a, tile, half, token);
        }
    }
}

void matmul_nbits_fp32_avx2(const NBitsMultiplyArgs& a) {
    a.bits == 8 ? matmul_nbits_fp32<8>(a) : matmul_nbits_fp32<4>(a);
}

}  // namespace

const NBitsKernels kNBitsAvx2 = {
    {nbits_fp32_token_bytes, nbits_prepare_fp32, matmul_nbits_fp32_avx2},
    {nbits_int8_token_bytes, prepare_int8_avx2, matmul_nbits_int8_avx2},
};

}  // namespace fbiedge
