// What the AVX-512 kernels of BinaryMatMul share. Everything is inline in an unnamed namespace: each file that includes
// this is compiled for instructions of its own.
#pragma once

#include <immintrin.h>

#include "../kernel_table.h"

namespace fbiedge {
namespace {

// Lanes 8, 4, 2, 1 apart: the order of the scalar kernel.
inline float sum_lanes(__m512 sum_f32x16) {
    const __m256 high_f32x8 = _mm512_extractf32x8_ps(sum_f32x16, 1);
    const __m256 sum_f32x8 = _mm256_add_ps(_mm512_castps512_ps256(sum_f32x16), high_f32x8);
    __m128 sum_f32x4 = _mm_add_ps(_mm256_castps256_ps128(sum_f32x8), _mm256_extractf128_ps(sum_f32x8, 1));
    sum_f32x4 = _mm_add_ps(sum_f32x4, _mm_movehl_ps(sum_f32x4, sum_f32x4));
    return _mm_cvtss_f32(_mm_add_ss(sum_f32x4, _mm_shuffle_ps(sum_f32x4, sum_f32x4, 1)));
}

inline __m512 add_offsets(__m512 sum_f32x16, const GroupInput& in, size_t at) {
    const __m512 x_f32x16 = _mm512_loadu_ps(in.x + at);
    if (!in.beta) return _mm512_add_ps(sum_f32x16, x_f32x16);
    return _mm512_add_ps(sum_f32x16, _mm512_mul_ps(_mm512_loadu_ps(in.beta + at), x_f32x16));
}

inline __m512 scaled_inputs(const GroupInput& in, size_t at) {
    const __m512 x_f32x16 = _mm512_loadu_ps(in.x + at);
    return in.alpha ? _mm512_mul_ps(_mm512_loadu_ps(in.alpha + at), x_f32x16) : x_f32x16;
}

inline __m512 block_scales(const MultiplyArgs& a, size_t tile, size_t group) {
    const size_t index = (tile * ceil_div(a.k, kGroupInputs) + group) * kTileRows;
    if (!a.block_scales_fp16) return _mm512_loadu_ps(static_cast<const float*>(a.block_scales) + index);
    const uint16_t* halves = static_cast<const uint16_t*>(a.block_scales) + index;
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
}

// Brings in the same place of the tiles that come next. The hardware prefetcher restarts with every tile; with this,
// decode from memory went from 11 to 19 GB/s (one Zen 4 core, 4096 x 4096). A prefetch past the end does nothing.
inline void prefetch(const uint8_t* bits) { _mm_prefetch(reinterpret_cast<const char*>(bits), _MM_HINT_T1); }

inline void finish(const MultiplyArgs& a, size_t token, size_t tile, __m512 total_f32x16) {
    const __m512 sum_f32x16 = _mm512_set1_ps(*offset_sum(a.tokens + token * a.token_stride_in_bytes));
    const size_t row = tile * a.row_step;
    if (a.row_alpha) total_f32x16 = _mm512_mul_ps(_mm512_loadu_ps(a.row_alpha + row), total_f32x16);
    if (a.row_beta) {
        const __m512 offset_f32x16 = _mm512_mul_ps(_mm512_loadu_ps(a.row_beta + row), sum_f32x16);
        total_f32x16 = _mm512_add_ps(total_f32x16, offset_f32x16);
    }
    if (a.add_offset_sum) total_f32x16 = _mm512_add_ps(total_f32x16, sum_f32x16);
    if (a.bias) {
        const float* bias = a.bias + token * a.bias_stride + tile * kTileRows;
        total_f32x16 = _mm512_add_ps(total_f32x16, _mm512_loadu_ps(bias));
    }
    _mm512_storeu_ps(a.y + token * a.y_stride + tile * kTileRows, total_f32x16);
}

// One group of a token at the int8 level (SPECIFICATION.md, section 4).
struct QuantisedGroup {
    float scale;
    int32_t sum;         // of q
    __m128i q_i8x16[8];  // in the order of the inputs
};

// Column scales lie in memory that no cache holds from one token to the next. A page ahead is mostly the next array.
constexpr size_t kScalesAhead = 1024;
inline void prefetch_scales(const float* scales, size_t at) {
    if (scales) prefetch(reinterpret_cast<const uint8_t*>(scales + at + kScalesAhead));
}

inline QuantisedGroup quantise_group(const GroupInput& in, __m512& offsets_f32x16) {
    QuantisedGroup out;
    __m512 xs_f32x16[8];
    __m512i peak_u32x16 = _mm512_setzero_si512();
    for (size_t i = 0; i < 8; ++i) {
        prefetch_scales(in.alpha, 16 * i);
        prefetch_scales(in.beta, 16 * i);
        offsets_f32x16 = add_offsets(offsets_f32x16, in, 16 * i);
        xs_f32x16[i] = scaled_inputs(in, 16 * i);
        const __m512i magnitude_u32x16 =
            _mm512_and_si512(_mm512_castps_si512(xs_f32x16[i]), _mm512_set1_epi32(0x7fffffff));
        peak_u32x16 = _mm512_max_epu32(peak_u32x16, magnitude_u32x16);
    }
    out.scale = group_scale(_mm512_reduce_max_epu32(peak_u32x16));
    const __mmask16 usable = scale_is_usable(out.scale) ? 0xffff : 0;
    const __m512 scale_f32x16 = _mm512_set1_ps(out.scale);
    __m512i sum_i32x16 = _mm512_setzero_si512();
    for (size_t i = 0; i < 8; ++i) {
        const __m512i q_i32x16 = _mm512_maskz_cvt_roundps_epi32(usable, _mm512_div_ps(xs_f32x16[i], scale_f32x16),
                                                                _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        sum_i32x16 = _mm512_add_epi32(sum_i32x16, q_i32x16);
        out.q_i8x16[i] = _mm512_cvtepi32_epi8(q_i32x16);
    }
    out.sum = _mm512_reduce_add_epi32(sum_i32x16);
    return out;
}

}  // namespace
}  // namespace fbiedge
