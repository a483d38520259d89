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
#include "lanes.h"

extern "C" float sqrtf(float);  // <math.h> may define inline functions with external linkage

namespace fbiedge {
namespace {

constexpr size_t kLanes = 16;
constexpr size_t kQueriesAtOnce = 4;
// 1.5 * 2^23: x + this - this is x rounded to an integer, half to even, and the integer itself is what lies in the
// lowest bits of x + this.
constexpr float kRoundingMagic = 12582912.0f;

inline size_t whole_lanes(size_t count) { return ceil_div(count, kLanes) * kLanes; }

inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline float minus_infinity() { return float_of(0xff800000u); }

// 2^x for x <= 0, within 2e-7; 0 below the normal floats. NaN stays NaN.
inline F32x16 power_of_2(F32x16 x) {
    const F32x16 magic = F32x16::broadcast(kRoundingMagic + 127.0f);  // the lowest bits are an exponent then
    const F32x16 shifted = x + magic;
    const F32x16 f = x - (shifted - magic);  // -0.5 .. 0.5
    F32x16 value = F32x16::broadcast(0.00132647273f) * f + F32x16::broadcast(0.00967151299f);
    value = value * f + F32x16::broadcast(0.0555073358f);
    value = value * f + F32x16::broadcast(0.240222424f);
    value = value * f + F32x16::broadcast(0.693147004f);
    value = value * f + F32x16::broadcast(1.0f);
    return zero_below(F32x16::broadcast(-126.0f), x, value * exponent_from_low_bits(shifted));
}

// As group_scale(), for other numbers of steps.
inline float scale_in_steps(uint32_t peak_bits, float steps) {
    const float peak = peak_bits >= 0x7f800000u ? float_of(0x7fc00000u) : float_of(peak_bits);
    const float scale = peak / steps;
    return scale < 1.17549435e-38f ? 0.0f : scale;
}

// --- new rows. They lie in buffers of whole lanes, zeros at the end.

using Row = float[kMaxHeadDim];

inline void norm(const HeadInput& in, Row& x) {
    F32x16 sums = F32x16::broadcast(0.0f);
    for (size_t i = 0; i < in.d; i += kLanes) sums = sums + F32x16::load(x + i) * F32x16::load(x + i);
    const float mean = sum_lanes(sums) / static_cast<float>(in.d);
    const float factor = 1.0f / sqrtf(mean + in.epsilon);
    for (size_t i = 0; i < in.d; ++i) x[i] = x[i] * factor * in.norm[i];
}

inline void rotate(const HeadInput& in, Row& x) {
    const size_t half = in.d / 2;
    size_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const F32x16 a = F32x16::load(x + i), b = F32x16::load(x + half + i);
        const F32x16 cos = F32x16::load(in.cos + i), sin = F32x16::load(in.sin + i);
        (a * cos - b * sin).store(x + i);
        (b * cos + a * sin).store(x + half + i);
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * in.cos[i] - b * in.sin[i];
        x[half + i] = b * in.cos[i] + a * in.sin[i];
    }
}

// in.x, normed and rotated, -> x; returns the largest pattern of |x|.
inline uint32_t transform(const HeadInput& in, Row& x) {
    F32x16::broadcast(0.0f).store(x + whole_lanes(in.d) - kLanes);
    size_t i = 0;
    for (; i + kLanes <= in.d; i += kLanes) F32x16::load(in.x + i).store(x + i);
    for (; i < in.d; ++i) x[i] = in.x[i];
    if (in.norm) norm(in, x);
    if (in.cos) rotate(in, x);
    F32x16 peak = F32x16::broadcast(0.0f);
    for (i = 0; i < in.d; i += kLanes) peak = greater_bits(magnitude(F32x16::load(x + i)), peak);
    return greatest_bits(peak);
}

inline void store_integers(F32x16 shifted, int8_t* to) { shifted.store_low_bytes(to); }
inline void store_integers(F32x16 shifted, int16_t* to) { shifted.store_low_halves(to); }

template <class Integer>
inline void quantize(const Row& x, size_t d, float scale, Integer* row) {
    if (!scale_is_usable(scale)) {
        memset(row, 0, d * sizeof(Integer));
        return;
    }
    const F32x16 step = F32x16::broadcast(scale), magic = F32x16::broadcast(kRoundingMagic);
    size_t i = 0;
    for (; i + kLanes <= d; i += kLanes) store_integers(F32x16::load(x + i) / step + magic, row + i);
    if (i < d) {
        Integer rest[kLanes];
        store_integers(F32x16::load(x + i) / step + magic, rest);
        memcpy(row + i, rest, (d - i) * sizeof(Integer));
    }
}

float quantize_key_or_value(const HeadInput& in, int8_t* row) {
    Row x;
    const float scale = group_scale(transform(in, x));
    quantize(x, in.d, scale, row);
    return scale;
}

float quantize_query(const HeadInput& in, int16_t* row) {
    Row x;
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

// What a query doesn't see of whole lanes.
inline void fill_end(float* x, size_t visible, size_t most, float value) {
    for (size_t t = visible; t < whole_lanes(most); ++t) x[t] = value;
}

// Scores I of the first visible[i] tokens -> integer shares of as many 16s as hold them. All queries take each step
// together: one alone would wait for its own sums most of the time.
template <class Sums, size_t kQueries>
inline void softmax(const int32_t (*scores)[kBlockTokens], const BlockScales& scales, const float* query_scales,
                    const uint32_t* visible, size_t most, Softmax* results, typename Sums::Shares* shares) {
    alignas(kAlignment) float x[kQueries][kBlockTokens];
    F32x16 across[kQueries];
    for (size_t i = 0; i < kQueries; ++i) across[i] = F32x16::broadcast(query_scales[i]);
    for (size_t t = 0; t < most; t += kLanes) {
        const F32x16 key_scales = F32x16::load(scales.keys + t);
        for (size_t i = 0; i < kQueries; ++i) {
            (F32x16::from_integers(scores[i] + t) * key_scales * across[i]).store(x[i] + t);
        }
    }
    for (size_t i = 0; i < kQueries; ++i) {
        fill_end(x[i], visible[i], most, minus_infinity());
        across[i] = F32x16::broadcast(minus_infinity());
    }
    for (size_t t = 0; t < most; t += kLanes) {
        for (size_t i = 0; i < kQueries; ++i) across[i] = greater(F32x16::load(x[i] + t), across[i]);
    }
    F32x16 peaks[kQueries];
    for (size_t i = 0; i < kQueries; ++i) {
        results[i].peak = greatest_lane(across[i]);
        peaks[i] = F32x16::broadcast(results[i].peak);
        across[i] = F32x16::broadcast(0.0f);
    }
    for (size_t t = 0; t < most; t += kLanes) {
        const F32x16 value_scales = F32x16::load(scales.values + t);
        for (size_t i = 0; i < kQueries; ++i) {
            const F32x16 share = power_of_2(F32x16::load(x[i] + t) - peaks[i]);
            across[i] = across[i] + share;
            (share * value_scales).store(x[i] + t);
        }
    }
    for (size_t i = 0; i < kQueries; ++i) {
        results[i].sum = sum_lanes(across[i]);
        fill_end(x[i], visible[i], most, 0.0f);  // which 0 * scale isn't where the scale is NaN
        across[i] = F32x16::broadcast(0.0f);
    }
    for (size_t t = 0; t < most; t += kLanes) {
        for (size_t i = 0; i < kQueries; ++i) across[i] = greater_bits(F32x16::load(x[i] + t), across[i]);
    }
    F32x16 per_step[kQueries];
    for (size_t i = 0; i < kQueries; ++i) {
        results[i].step = scale_in_steps(greatest_bits(across[i]), kQuerySteps);
        per_step[i] = F32x16::broadcast(scale_is_usable(results[i].step) ? 1.0f / results[i].step : 0.0f);
        across[i] = F32x16::broadcast(0.0f);
    }
    const F32x16 magic = F32x16::broadcast(kRoundingMagic);
    for (size_t t = 0; t < most; t += kLanes) {
        for (size_t i = 0; i < kQueries; ++i) {
            const F32x16 wanted = F32x16::load(x[i] + t) * per_step[i] + across[i];
            const F32x16 shifted = wanted + magic;
            across[i] = wanted - (shifted - magic);
            shares[i].store(shifted, t);
        }
    }
}

inline void merge(size_t d, float peak, float sum, const float* mixed, AttentionState& into) {
    if (sum == 0.0f) return;  // saw nothing
    const float new_peak = peak > into.peak ? peak : into.peak;
    const F32x16 keep = power_of_2(F32x16::broadcast(into.peak - new_peak));
    const F32x16 take = power_of_2(F32x16::broadcast(peak - new_peak));
    for (size_t i = 0; i < d; i += kLanes) {
        (F32x16::load(into.mixed + i) * keep + F32x16::load(mixed + i) * take).store(into.mixed + i);
    }
    float new_sum[kLanes];
    (F32x16::broadcast(into.sum) * keep + F32x16::broadcast(sum) * take).store(new_sum);
    into.sum = new_sum[0];
    into.peak = new_peak;
}

void merge_states(size_t d, const AttentionState& from, AttentionState& into) {
    merge(d, from.peak, from.sum, from.mixed, into);
}

void finish(size_t d, const AttentionState& state, float* out) {
    const F32x16 sum = F32x16::broadcast(state.sum);
    size_t i = 0;
    for (; i + kLanes <= d; i += kLanes) (F32x16::load(state.mixed + i) / sum).store(out + i);
    for (; i < d; ++i) out[i] = state.mixed[i] / state.sum;
}

template <class Sums>
void attend(const AttendArgs& a) {
    Sums block(a);
    BlockScales scales;
    memset(scales.keys + whole_lanes(a.n_tokens) - kLanes, 0, kLanes * sizeof(float));
    memset(scales.values + whole_lanes(a.n_tokens) - kLanes, 0, kLanes * sizeof(float));
    memcpy(scales.keys, a.key_scales, a.n_tokens * sizeof(float));
    memcpy(scales.values, a.value_scales, a.n_tokens * sizeof(float));
    for (size_t first = 0; first < a.n_queries; first += kQueriesAtOnce) {
        const size_t n = min_size(a.n_queries - first, kQueriesAtOnce);
        const uint32_t* visible = a.visible + first;
        size_t most = 0;
        for (size_t i = 0; i < n; ++i) most = visible[i] > most ? visible[i] : most;
        if (most == 0) continue;
        const size_t count = whole_lanes(most);
        alignas(kAlignment) int32_t scores[kQueriesAtOnce][kBlockTokens];
        block.scores(first, n, count, scores);
        typename Sums::Shares shares[kQueriesAtOnce];
        Softmax softmaxes[kQueriesAtOnce];
        const float* scale = a.query_scales + first;
        if (n == kQueriesAtOnce) {
            softmax<Sums, kQueriesAtOnce>(scores, scales, scale, visible, most, softmaxes, shares);
        } else {
            for (size_t i = 0; i < n; ++i) {
                softmax<Sums, 1>(scores + i, scales, scale + i, visible + i, most, softmaxes + i, shares + i);
            }
        }
        alignas(kAlignment) int32_t sums[kQueriesAtOnce][kMaxHeadDim];
        block.mix(shares, n, count, sums);
        for (size_t i = 0; i < n; ++i) {
            alignas(kAlignment) Row mixed;
            if (visible[i] == 0) continue;
            const F32x16 step = F32x16::broadcast(softmaxes[i].step);
            for (size_t j = 0; j < a.d; j += kLanes) (F32x16::from_integers(sums[i] + j) * step).store(mixed + j);
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
