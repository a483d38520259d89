// Attention over an int8 cache, written once: everything but the integer sums, which each kernel file brings in a
// struct `Sums` (see attention_scalar.cc for what it must have). Compiled in each kernel file for its own instructions;
// loops over 16 lanes become vector code, and as every operation is rounded on its own, all of them give the same bits.
//
// For one query and one block of the cache, with c = query scale (the attribute `scale` and log2 e are in it):
//   I[t] = sum over d of q[d] * k[t,d]                       exact
//   s[t] = (float(I[t]) * key_scale[t]) * c                  in bits: softmax by powers of 2
//   m = max s;  p[t] = 2^(s[t] - m);  w[t] = p[t] * value_scale[t]
//   u[t] = w[t] in steps of max w / 32512, an integer; lane t % 16 takes what rounding left over to its next token, so
//          that a long tail of small shares isn't rounded away
//   O[d] = sum over t of u[t] * v[t,d]                       exact
#pragma once

#include "../attention_kernels.h"

extern "C" float sqrtf(float);  // <math.h> may define inline functions with external linkage

namespace fbiedge {
namespace {

constexpr size_t kLanes = 16;
constexpr float kRoundingMagic = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds half to even
constexpr uint32_t kMagicBits = 0x4b400000u;
constexpr size_t kQueriesAtOnce = 4;

struct Lanes {
    alignas(kAlignment) float at[kLanes];
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline float minus_infinity() { return float_of(0xff800000u); }
inline int32_t rounded(float value) { return static_cast<int32_t>(bits_of(value + kRoundingMagic) - kMagicBits); }
inline float greater(float a, float b) { return a > b ? a : b; }  // b where a is NaN

// 2^x for x <= 0, within 2e-7; 0 below the normal floats. NaN stays NaN.
inline float power_of_2(float x) {
    const float shifted = x + kRoundingMagic;
    const float f = x - (shifted - kRoundingMagic);  // -0.5 .. 0.5
    float value = 0.00132647273f * f + 0.00967151299f;
    value = value * f + 0.0555073358f;
    value = value * f + 0.240222424f;
    value = value * f + 0.693147004f;
    value = value * f + 1.0f;
    const float power = float_of((bits_of(shifted) << 23) + 0x3f800000u);
    value = value * power;
    return x < -126.0f ? 0.0f : value;
}

// Lanes 8, 4, 2, 1 apart.
template <class Combine>
inline float reduce(Lanes& lanes, Combine combine) {
    for (size_t step = kLanes / 2; step > 0; step /= 2) {
        for (size_t l = 0; l < step; ++l) lanes.at[l] = combine(lanes.at[l], lanes.at[l + step]);
    }
    return lanes.at[0];
}
inline float add(float a, float b) { return a + b; }

// As group_scale(), for other numbers of steps.
inline float scale_in_steps(uint32_t peak_bits, float steps) {
    const float peak = peak_bits >= 0x7f800000u ? float_of(0x7fc00000u) : float_of(peak_bits);
    const float scale = peak / steps;
    return scale < 1.17549435e-38f ? 0.0f : scale;
}

// --- new rows

// x -> out, normed and rotated; returns the largest bits of |out|.
inline uint32_t transform(const HeadInput& in, float* out) {
    const float* x = in.x;
    float normed[kMaxHeadDim];
    if (in.norm) {
        Lanes sums = {};
        size_t i = 0;
        for (; i + kLanes <= in.d; i += kLanes) {
            for (size_t l = 0; l < kLanes; ++l) sums.at[l] += x[i + l] * x[i + l];
        }
        for (size_t l = 0; i + l < in.d; ++l) sums.at[l] += x[i + l] * x[i + l];
        const float mean = reduce(sums, add) / static_cast<float>(in.d);
        const float factor = 1.0f / sqrtf(mean + in.epsilon);
        for (i = 0; i < in.d; ++i) normed[i] = x[i] * factor * in.norm[i];
        x = normed;
    }
    if (in.cos) {
        const size_t half = in.d / 2;
        for (size_t i = 0; i < half; ++i) {
            out[i] = x[i] * in.cos[i] - x[half + i] * in.sin[i];
            out[half + i] = x[half + i] * in.cos[i] + x[i] * in.sin[i];
        }
    } else {
        memcpy(out, x, in.d * sizeof(float));
    }
    uint32_t peak = 0;
    for (size_t i = 0; i < in.d; ++i) {
        const uint32_t magnitude = bits_of(out[i]) & 0x7fffffffu;
        peak = magnitude > peak ? magnitude : peak;
    }
    return peak;
}

template <class Integer>
inline void quantize(const float* x, size_t d, float scale, Integer* row) {
    if (!scale_is_usable(scale)) {
        memset(row, 0, d * sizeof(Integer));
        return;
    }
    for (size_t i = 0; i < d; ++i) row[i] = static_cast<Integer>(rounded(x[i] / scale));
}

float quantize_key_or_value(const HeadInput& in, int8_t* row) {
    float x[kMaxHeadDim];
    const float scale = group_scale(transform(in, x));
    quantize(x, in.d, scale, row);
    return scale;
}

float quantize_query(const HeadInput& in, int16_t* row) {
    float x[kMaxHeadDim];
    const float scale = scale_in_steps(transform(in, x), kQuerySteps);
    quantize(x, in.d, scale, row);
    return scale;
}

// --- attention

struct BlockScales {
    alignas(kAlignment) float keys[kBlockTokens];
    alignas(kAlignment) float values[kBlockTokens];
};

struct Softmax {
    float peak;  // of the scores
    float sum;   // of the shares
    float step;  // of the integer shares
};

// Scores I of the first `visible` tokens -> integer shares of as many 16s as hold them.
template <class Sums>
inline Softmax softmax(const int32_t* scores, const BlockScales& scales, float query_scale, size_t visible,
                       typename Sums::Shares& shares) {
    alignas(kAlignment) float x[kBlockTokens];
    const size_t count = ceil_div(visible, kLanes) * kLanes;
    Lanes lanes;
    for (size_t l = 0; l < kLanes; ++l) lanes.at[l] = minus_infinity();
    for (size_t t = 0; t < count; t += kLanes) {
        for (size_t l = 0; l < kLanes; ++l) {
            x[t + l] = static_cast<float>(scores[t + l]) * scales.keys[t + l] * query_scale;
        }
        if (t + kLanes > visible) {
            for (size_t l = visible - t; l < kLanes; ++l) x[t + l] = minus_infinity();
        }
        for (size_t l = 0; l < kLanes; ++l) lanes.at[l] = greater(x[t + l], lanes.at[l]);
    }
    Softmax result;
    result.peak = reduce(lanes, greater);
    uint32_t peaks[kLanes] = {};
    lanes = Lanes{};
    for (size_t t = 0; t < count; t += kLanes) {
        for (size_t l = 0; l < kLanes; ++l) {
            const float share = power_of_2(x[t + l] - result.peak);
            lanes.at[l] += share;
            x[t + l] = share * scales.values[t + l];
        }
        if (t + kLanes > visible) {  // also where the cache holds a NaN
            for (size_t l = visible - t; l < kLanes; ++l) x[t + l] = 0.0f;
        }
        for (size_t l = 0; l < kLanes; ++l) peaks[l] = bits_of(x[t + l]) > peaks[l] ? bits_of(x[t + l]) : peaks[l];
    }
    result.sum = reduce(lanes, add);
    uint32_t peak = 0;
    for (size_t l = 0; l < kLanes; ++l) peak = peaks[l] > peak ? peaks[l] : peak;
    result.step = scale_in_steps(peak, kQuerySteps);
    const float per_step = scale_is_usable(result.step) ? 1.0f / result.step : 0.0f;
    lanes = Lanes{};
    for (size_t t = 0; t < count; t += kLanes) {
        int32_t units[kLanes];
        for (size_t l = 0; l < kLanes; ++l) {
            const float wanted = x[t + l] * per_step + lanes.at[l];
            const float shifted = wanted + kRoundingMagic;
            lanes.at[l] = wanted - (shifted - kRoundingMagic);
            units[l] = static_cast<int32_t>(bits_of(shifted) - kMagicBits);
        }
        Sums::store_shares(units, t, shares);
    }
    return result;
}

inline void merge(size_t d, float peak, float sum, const float* mixed, AttentionState& into) {
    if (sum == 0.0f) return;  // saw nothing
    const float new_peak = greater(peak, into.peak);
    const float keep = power_of_2(into.peak - new_peak), take = power_of_2(peak - new_peak);
    for (size_t i = 0; i < d; ++i) into.mixed[i] = into.mixed[i] * keep + mixed[i] * take;
    into.sum = into.sum * keep + sum * take;
    into.peak = new_peak;
}

void merge_states(size_t d, const AttentionState& from, AttentionState& into) {
    merge(d, from.peak, from.sum, from.mixed, into);
}

void finish(size_t d, const AttentionState& state, float* out) {
    for (size_t i = 0; i < d; ++i) out[i] = state.mixed[i] / state.sum;
}

template <class Sums>
void attend(const AttendArgs& a) {
    alignas(kAlignment) uint8_t keys[Sums::kKeyBytes];
    alignas(kAlignment) uint8_t values[Sums::kValueBytes];
    Sums::pack_keys(a.keys, a.n_tokens, a.d, keys);
    Sums::pack_values(a.values, a.n_tokens, a.d, values);
    BlockScales scales = {};
    memcpy(scales.keys, a.key_scales, a.n_tokens * sizeof(float));
    memcpy(scales.values, a.value_scales, a.n_tokens * sizeof(float));
    for (size_t first = 0; first < a.n_queries; first += kQueriesAtOnce) {
        const size_t n = min_size(a.n_queries - first, kQueriesAtOnce);
        size_t most = 0;
        for (size_t i = 0; i < n; ++i) most = a.visible[first + i] > most ? a.visible[first + i] : most;
        if (most == 0) continue;
        const size_t count = ceil_div(most, kLanes) * kLanes;
        alignas(kAlignment) int32_t scores[kQueriesAtOnce][kBlockTokens];
        Sums::scores(a.queries + first * a.d, n, a.d, keys, count, scores);
        typename Sums::Shares shares[kQueriesAtOnce];
        Softmax softmaxes[kQueriesAtOnce];
        for (size_t i = 0; i < n; ++i) {
            const size_t visible = a.visible[first + i];
            const size_t held = ceil_div(visible, kLanes) * kLanes;
            softmaxes[i].sum = 0.0f;
            if (visible > 0) {
                softmaxes[i] = softmax<Sums>(scores[i], scales, a.query_scales[first + i], visible, shares[i]);
            }
            const int32_t none[kLanes] = {};
            for (size_t t = held; t < count; t += kLanes) Sums::store_shares(none, t, shares[i]);
        }
        alignas(kAlignment) int32_t sums[kQueriesAtOnce][kMaxHeadDim];
        Sums::mix(shares, n, a.d, values, count, sums);
        for (size_t i = 0; i < n; ++i) {
            alignas(kAlignment) float mixed[kMaxHeadDim];
            for (size_t j = 0; j < a.d; ++j) mixed[j] = static_cast<float>(sums[i][j]) * softmaxes[i].step;
            merge(a.d, softmaxes[i].peak, softmaxes[i].sum, mixed, a.states[first + i]);
        }
    }
}

template <class Sums>
constexpr AttentionKernels attention_kernels() {
    return {quantize_key_or_value, quantize_query, attend<Sums>, merge_states, finish};
}

}  // namespace
}  // namespace fbiedge
