// MatMulNBits: the slow, obvious reference. Every other kernel is compared with it: bit for bit at the int8 level.
//
// It fixes the order of all float operations of the int8 level, one output at a time:
//   total = 0;  for each group g:  v = 0;  for each of its blocks b:  v = v + d[n,b] * float(I[n,b])
//                                  total = total + scale[g] * v
// each operation rounded on its own: never fused.

#include "../matmul_nbits_kernels.h"

namespace fbiedge {
namespace {

uint32_t magnitude_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffffu;
}

// Round half to even, without <cmath>: see scalar.cc.
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

// Where input `i` of a group lies in a prepared token.
size_t plane_index(size_t i, unsigned bits) { return bits == 8 ? i : i / 8 * 8 + i % 2 * 4 + i % 8 / 2; }

int32_t code(const uint8_t* group, size_t row, size_t i, unsigned bits) {
    const size_t byte = i * bits / 8;  // of the row
    const uint8_t value = group[kNBitsScaleBytes + byte / 4 * kNBitsPlaneBytes + 4 * row + byte % 4];
    return bits == 8 ? value : (value >> (i % 2 * 4)) & 15;
}

float scale(const uint8_t* group, size_t row, size_t block) {
    uint16_t half;
    memcpy(&half, group + (block * kTileRows + row) * sizeof half, sizeof half);
    return half_to_float(half);
}

void prepare_int8_scalar(const float* x, size_t k, unsigned bits, uint8_t* token) {
    const NBitsInt8Layout layout = nbits_int8_layout(ceil_div(k, kGroupInputs));
    float* scales = reinterpret_cast<float*>(token);
    int32_t* corrections = reinterpret_cast<int32_t*>(token + layout.corrections_at);
    int8_t* q = reinterpret_cast<int8_t*>(token + layout.q_at);
    for (size_t group = 0; group < layout.groups; ++group, q += kGroupInputs) {
        float padding[kGroupInputs];
        const float* in = nbits_group_input(x, k, group * kGroupInputs, padding);
        uint32_t peak_bits = 0;
        for (size_t i = 0; i < kGroupInputs; ++i) {
            if (magnitude_bits(in[i]) > peak_bits) peak_bits = magnitude_bits(in[i]);
        }
        const float scale = group_scale(peak_bits);
        int32_t sums[kNBitsGroupBlocks] = {};
        for (size_t i = 0; i < kGroupInputs; ++i) {
            const int32_t value = scale_is_usable(scale) ? round_half_even(in[i] / scale) : 0;
            q[plane_index(i, bits)] = static_cast<int8_t>(value);
            sums[i / kNBitsBlockInputs] += value;
        }
        scales[group] = scale;
        for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
            corrections[group * kNBitsGroupBlocks + block] = -(1 << (bits - 1)) * sums[block];
        }
    }
}

void matmul_nbits_int8_scalar(const NBitsMultiplyArgs& a) {
    const NBitsInt8Layout layout = nbits_int8_layout(a.groups);
    for (size_t token_index = 0; token_index < a.m; ++token_index) {
        const NBitsInt8Token token = nbits_int8_token(a, layout, token_index);
        for (size_t row = 0; row < a.n_tiles * kTileRows; ++row) {
            const uint8_t* group = a.tiles + row / kTileRows * a.groups * nbits_group_bytes(a.bits);
            float total = 0.0f;
            for (size_t g = 0; g < a.groups; ++g, group += nbits_group_bytes(a.bits)) {
                const int8_t* q = token.q + g * kGroupInputs;
                float v = 0.0f;
                for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
                    int32_t sum = token.corrections[g * kNBitsGroupBlocks + block];
                    for (size_t i = block * kNBitsBlockInputs; i < (block + 1) * kNBitsBlockInputs; ++i) {
                        sum += code(group, row % kTileRows, i, a.bits) * q[plane_index(i, a.bits)];
                    }
                    const float value = scale(group, row % kTileRows, block) * static_cast<float>(sum);
                    v = v + value;
                }
                const float scaled = token.scales[g] * v;
                total = total + scaled;
            }
            a.y[token_index * a.y_stride + row] = total;
        }
    }
}

void matmul_nbits_fp32_scalar(const NBitsMultiplyArgs& a) {
    const int32_t zero = 1 << (a.bits - 1);
    for (size_t token = 0; token < a.m; ++token) {
        const float* x = reinterpret_cast<const float*>(a.tokens + token * a.token_stride_in_bytes);
        for (size_t row = 0; row < a.n_tiles * kTileRows; ++row) {
            const uint8_t* group = a.tiles + row / kTileRows * a.groups * nbits_group_bytes(a.bits);
            float total = 0.0f;
            for (size_t g = 0; g < a.groups; ++g, group += nbits_group_bytes(a.bits)) {
                for (size_t block = 0; block < kNBitsGroupBlocks; ++block) {
                    float sum = 0.0f;
                    for (size_t i = block * kNBitsBlockInputs; i < (block + 1) * kNBitsBlockInputs; ++i) {
                        const int32_t weight = code(group, row % kTileRows, i, a.bits) - zero;
                        sum += static_cast<float>(weight) * x[g * kGroupInputs + plane_index(i, a.bits)];
                    }
                    total += scale(group, row % kTileRows, block) * sum;
                }
            }
            a.y[token * a.y_stride + row] = total;
        }
    }
}

}  // namespace

const NBitsKernels kNBitsScalar = {
    {nbits_fp32_token_bytes, nbits_prepare_fp32, matmul_nbits_fp32_scalar},
    {nbits_int8_token_bytes, prepare_int8_scalar, matmul_nbits_int8_scalar},
};

}  // namespace fbiedge
