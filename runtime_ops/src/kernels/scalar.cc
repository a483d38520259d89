// The slow, obvious reference kernel. Every other kernel is compared with it: bit for bit at the int8 level.
//
// It fixes the order of all float operations of the int8 level, one output at a time:
//   total = 0;  for each group g:  total += d[n,g] * (scale[g] * float(2 * sum of q where the bit is 1 - sum of q))
//   y = row_alpha[n] * total;  y += row_beta[n] * offset_sum;  y += bias[n]
// (steps that a form lacks are left out), each operation rounded on its own: never fused.

#include "../kernel_table.h"

namespace fbiedge {
namespace {

// Adds in the order that a 16-lane vector unit would: lane l sums inputs l, 16 + l, ...; then lanes 8, 4, 2, 1 apart.
class LaneSum {
  public:
    void add(size_t index, float value) { lanes_[index % 16] += value; }
    float reduce() {
        for (size_t step = 8; step > 0; step /= 2) {
            for (size_t lane = 0; lane < step; ++lane) lanes_[lane] += lanes_[lane + step];
        }
        return lanes_[0];
    }

  private:
    float lanes_[16] = {};
};

uint32_t magnitude_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffffu;
}

// Round half to even, without <cmath>: adding and taking away 1.5 * 2^23 leaves no bits below 1 (|value| <= 127.5).
// volatile, because an optimiser that may reassociate (-ffast-math) would drop both operations.
int32_t round_half_even(float value) {
    const float magic = 12582912.0f;
    volatile float shifted = value + magic;
    return static_cast<int32_t>(shifted - magic);
}

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 31u, fraction = half & 0x3ffu;
    float value;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float
        value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | ((exponent == 31 ? 255u : exponent + 112u) << 23) | (fraction << 13);
    memcpy(&value, &bits, sizeof value);
    return value;
}

float block_scale(const MultiplyArgs& a, size_t tile, size_t group, size_t row) {
    const size_t index = (tile * ceil_div(a.k, kGroupInputs) + group) * kTileRows + row;
    if (!a.block_scales_fp16) {
        float value;
        memcpy(&value, static_cast<const uint8_t*>(a.block_scales) + index * sizeof value, sizeof value);
        return value;
    }
    uint16_t half;
    memcpy(&half, static_cast<const uint8_t*>(a.block_scales) + index * sizeof half, sizeof half);
    return half_to_float(half);
}

bool sign_bit(const MultiplyArgs& a, size_t tile, size_t row, size_t input) {
    const uint8_t* bytes = a.tiles + (tile * a.k_tiles + input / kTileInputs) * kTileBytes;
    return (bytes[4 * row + input % kTileInputs / 8] >> (input % 8)) & 1;
}

void finish(const MultiplyArgs& a, size_t token, size_t tile, size_t row, float total) {
    const float sum = *offset_sum(a.tokens + token * a.token_stride_in_bytes);
    if (a.row_alpha) total = a.row_alpha[tile * a.row_step + row] * total;
    if (a.row_beta) total = total + a.row_beta[tile * a.row_step + row] * sum;
    if (a.add_offset_sum) total = total + sum;
    if (a.bias) total = total + a.bias[token * a.bias_stride + tile * kTileRows + row];
    a.y[token * a.y_stride + tile * kTileRows + row] = total;
}

float scaled_input(const TokenInput& in, size_t k, LaneSum& offsets) {
    offsets.add(k, in.beta ? in.beta[k] * in.x[k] : in.x[k]);
    return in.alpha ? in.alpha[k] * in.x[k] : in.x[k];
}

// --- int8 level: q in natural order
// -----------------------------------------------------------------------------------

void prepare_int8_scalar(const TokenInput& in, uint8_t* token) {
    const Int8Layout layout = int8_layout(in.k);
    float* scales = reinterpret_cast<float*>(token + layout.scales_at);
    int32_t* sums = reinterpret_cast<int32_t*>(token + layout.sums_at);
    int8_t* q = reinterpret_cast<int8_t*>(token + layout.q_at);
    LaneSum offsets;
    for (size_t group = 0; group < layout.groups; ++group) {
        const size_t first = group * kGroupInputs, count = min_size(in.k - first, kGroupInputs);
        float xs[kGroupInputs] = {};
        uint32_t peak_bits = 0;
        for (size_t i = 0; i < count; ++i) {
            xs[i] = scaled_input(in, first + i, offsets);
            if (magnitude_bits(xs[i]) > peak_bits) peak_bits = magnitude_bits(xs[i]);
        }
        const float scale = group_scale(peak_bits);
        int32_t sum = 0;
        for (size_t i = 0; i < kGroupInputs; ++i) {
            const int32_t value = scale_is_usable(scale) ? round_half_even(xs[i] / scale) : 0;
            q[first + i] = static_cast<int8_t>(value);
            sum += value;
        }
        scales[group] = in.multiplier * scale;
        sums[group] = sum;
    }
    *offset_sum(token) = in.multiplier * offsets.reduce();
}

void binary_matmul_int8_scalar(const MultiplyArgs& a) {
    const Int8Layout layout = int8_layout(a.k);
    for (size_t token_index = 0; token_index < a.m; ++token_index) {
        const uint8_t* token = a.tokens + token_index * a.token_stride_in_bytes;
        const float* scales = reinterpret_cast<const float*>(token + layout.scales_at);
        const int32_t* sums = reinterpret_cast<const int32_t*>(token + layout.sums_at);
        const int8_t* q = reinterpret_cast<const int8_t*>(token + layout.q_at);
        for (size_t tile = 0; tile < a.n_tiles; ++tile) {
            for (size_t row = 0; row < kTileRows; ++row) {
                float total = 0.0f;
                for (size_t group = 0; group < layout.groups; ++group) {
                    const size_t first = group * kGroupInputs, last = min_size(first + kGroupInputs, a.k);
                    int32_t positive = 0;
                    for (size_t k = first; k < last; ++k) positive += sign_bit(a, tile, row, k) ? q[k] : 0;
                    float value = scales[group] * static_cast<float>(2 * positive - sums[group]);
                    if (a.block_scales) value = block_scale(a, tile, group, row) * value;
                    total = total + value;
                }
                finish(a, token_index, tile, row, total);
            }
        }
    }
}

// --- fp32 level: scaled inputs in natural order
// -----------------------------------------------------------------------

size_t token_bytes_fp32_scalar(size_t k) { return kTokenHeaderBytes + align_up(k * sizeof(float)); }

void prepare_fp32_scalar(const TokenInput& in, uint8_t* token) {
    float* xs = reinterpret_cast<float*>(token + kTokenHeaderBytes);
    LaneSum offsets;
    for (size_t k = 0; k < in.k; ++k) xs[k] = in.multiplier * scaled_input(in, k, offsets);
    *offset_sum(token) = in.multiplier * offsets.reduce();
}

void binary_matmul_fp32_scalar(const MultiplyArgs& a) {
    for (size_t token_index = 0; token_index < a.m; ++token_index) {
        const uint8_t* token = a.tokens + token_index * a.token_stride_in_bytes;
        const float* xs = reinterpret_cast<const float*>(token + kTokenHeaderBytes);
        for (size_t tile = 0; tile < a.n_tiles; ++tile) {
            for (size_t row = 0; row < kTileRows; ++row) {
                float total = 0.0f;
                for (size_t group = 0; group * kGroupInputs < a.k; ++group) {
                    const size_t first = group * kGroupInputs, last = min_size(first + kGroupInputs, a.k);
                    float value = 0.0f;
                    for (size_t k = first; k < last; ++k) value += sign_bit(a, tile, row, k) ? xs[k] : -xs[k];
                    if (a.block_scales) value = block_scale(a, tile, group, row) * value;
                    total = total + value;
                }
                finish(a, token_index, tile, row, total);
            }
        }
    }
}

}  // namespace

const BinaryKernels kBinaryScalar = {
    {token_bytes_fp32_scalar, prepare_fp32_scalar, binary_matmul_fp32_scalar},
    {int8_token_bytes, prepare_int8_scalar, binary_matmul_int8_scalar},
};

}  // namespace fbiedge
