// What the AVX2 kernels of BinaryMatMul share, inline in an unnamed namespace: their files are compiled for AVX2.
#pragma once

#include <immintrin.h>

#include "../kernel_table.h"

namespace fbiedge {
namespace {

constexpr size_t kHalfRows = 8;

// Lanes 8, 4, 2, 1 apart: the order of the scalar kernel.
inline float sum_lanes(__m256 low_f32x8, __m256 high_f32x8) {
    const __m256 sum_f32x8 = _mm256_add_ps(low_f32x8, high_f32x8);
    __m128 sum_f32x4 = _mm_add_ps(_mm256_castps256_ps128(sum_f32x8), _mm256_extractf128_ps(sum_f32x8, 1));
    sum_f32x4 = _mm_add_ps(sum_f32x4, _mm_movehl_ps(sum_f32x4, sum_f32x4));
    return _mm_cvtss_f32(_mm_add_ss(sum_f32x4, _mm_shuffle_ps(sum_f32x4, sum_f32x4, 1)));
}

inline __m256 add_offsets(__m256 sum_f32x8, const GroupInput& in, size_t at) {
    const __m256 x_f32x8 = _mm256_loadu_ps(in.x + at);
    if (!in.beta) return _mm256_add_ps(sum_f32x8, x_f32x8);
    return _mm256_add_ps(sum_f32x8, _mm256_mul_ps(_mm256_loadu_ps(in.beta + at), x_f32x8));
}

inline __m256 scaled_inputs(const GroupInput& in, size_t at) {
    const __m256 x_f32x8 = _mm256_loadu_ps(in.x + at);
    return in.alpha ? _mm256_mul_ps(_mm256_loadu_ps(in.alpha + at), x_f32x8) : x_f32x8;
}

inline __m256 block_scales(const MultiplyArgs& a, size_t tile, size_t half, size_t group) {
    const size_t index = (tile * ceil_div(a.k, kGroupInputs) + group) * kTileRows + half * kHalfRows;
    if (!a.block_scales_fp16) return _mm256_loadu_ps(static_cast<const float*>(a.block_scales) + index);
    const uint16_t* halves = static_cast<const uint16_t*>(a.block_scales) + index;
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
}

inline void finish(const MultiplyArgs& a, size_t token, size_t tile, size_t half, __m256 total_f32x8) {
    const __m256 sum_f32x8 = _mm256_set1_ps(*offset_sum(a.tokens + token * a.token_stride_in_bytes));
    const size_t row = tile * a.row_step + half * kHalfRows;
    const size_t out = tile * kTileRows + half * kHalfRows;
    if (a.row_alpha) total_f32x8 = _mm256_mul_ps(_mm256_loadu_ps(a.row_alpha + row), total_f32x8);
    if (a.row_beta) {
        const __m256 offset_f32x8 = _mm256_mul_ps(_mm256_loadu_ps(a.row_beta + row), sum_f32x8);
        total_f32x8 = _mm256_add_ps(total_f32x8, offset_f32x8);
    }
    if (a.add_offset_sum) total_f32x8 = _mm256_add_ps(total_f32x8, sum_f32x8);
    if (a.bias) total_f32x8 = _mm256_add_ps(total_f32x8, _mm256_loadu_ps(a.bias + token * a.bias_stride + out));
    _mm256_storeu_ps(a.y + token * a.y_stride + out, total_f32x8);
}

// Brings in what is needed two tiles on: the hardware prefetcher restarts with every tile. A prefetch past the end does
// nothing.
inline void prefetch(const uint8_t* bits) { _mm_prefetch(reinterpret_cast<const char*>(bits), _MM_HINT_T1); }

inline __m256i load_half(const uint8_t* tile, size_t half) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + half * 32));
}

}  // namespace
}  // namespace fbiedge
