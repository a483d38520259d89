// The activation kernels: as exact as they claim to be, and the same bits on every instruction set.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "activation_kernels.h"
#include "check.h"
#include "dispatch.h"

using namespace fbiedge;

namespace {

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

std::vector<float> silu_multiply(const KernelTable& table, const std::vector<float>& gate,
                                 const std::vector<float>& up) {
    std::vector<float> y(gate.size());
    table.activations->silu_multiply(gate.data(), up.data(), y.data(), y.size());
    return y;
}

// Every 1999th float between -100 and 100.
std::vector<float> many_floats() {
    std::vector<float> values;
    for (uint32_t bits = 0; bits <= 0x42c80000u; bits += 1999) {
        float value;
        std::memcpy(&value, &bits, sizeof value);
        values.push_back(value);
        values.push_back(-value);
    }
    return values;
}

void test_silu_is_exact_to_a_few_roundings() {
    const std::vector<float> gate = many_floats(), up(gate.size(), 1.0f);
    const std::vector<float> y = silu_multiply(*find_kernels("scalar"), gate, up);
    double worst = 0.0;
    bool small = true;
    for (size_t i = 0; i < gate.size(); ++i) {
        const double g = gate[i], expected = g / (1.0 + std::exp(-g));
        if (g < -88.0 || std::fabs(expected) < 1e-37) {
            small = small && std::fabs(y[i] - expected) < 4e-37;
        } else {
            worst = std::fmax(worst, std::fabs(y[i] - expected) / std::fabs(expected));
        }
    }
    std::printf("silu: relative error %.3g\n", worst);
    expect(worst < 2.5e-7, "silu is off", std::to_string(worst));
    expect(small, "silu does not vanish", "far below 0");
    for (size_t i = 0; i < available_kernels().count; ++i) {
        const KernelTable& table = *available_kernels().tables[i];
        expect(same_bits(silu_multiply(table, gate, up), y), "silu differs from scalar", table.isa);
    }
}

void test_silu_of_special_values() {
    const float infinity = std::numeric_limits<float>::infinity(), largest = std::numeric_limits<float>::max();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> gate = {0.0f, infinity, largest, 1e30f, -1e30f, -largest, -88.5f, -infinity, nan, 1.0f};
    const std::vector<float> up = {3.0f, 2.0f, 1.0f, 2.0f, 2.0f, 2.0f, 1.0f, 1.0f, 1.0f, nan};
    const float expected[] = {0.0f, infinity, largest, 2e30f, 0.0f, 0.0f, 0.0f, nan, nan, nan};
    for (size_t i = 0; i < available_kernels().count; ++i) {
        const KernelTable& table = *available_kernels().tables[i];
        const std::vector<float> y = silu_multiply(table, gate, up);
        for (size_t j = 0; j < y.size(); ++j) {
            expect(y[j] == expected[j] || (std::isnan(y[j]) && std::isnan(expected[j])), "special value",
                   std::string(table.isa) + " " + std::to_string(j));
        }
    }
}

void test_sizes_around_the_vector() {
    std::mt19937 generator(7);
    std::normal_distribution<float> normal;
    const KernelTable& scalar = *find_kernels("scalar");
    for (const size_t n : {0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 172, 768}) {
        std::vector<float> x(n), up(n);
        for (float& value : x) value = normal(generator);
        for (float& value : up) value = normal(generator);
        const float sum = scalar.activations->sum_of_squares(x.data(), n);
        double expected = 0.0;
        for (const float value : x) expected += static_cast<double>(value) * value;
        expect(std::fabs(sum - expected) <= 1e-6 * expected, "sum of squares is off", std::to_string(n));
        const std::vector<float> product = silu_multiply(scalar, x, up);
        for (size_t i = 0; i < available_kernels().count; ++i) {
            const KernelTable& table = *available_kernels().tables[i];
            const std::string where = std::string(table.isa) + " " + std::to_string(n);
            const float other = table.activations->sum_of_squares(x.data(), n);
            expect(std::memcmp(&other, &sum, sizeof sum) == 0, "sum of squares differs from scalar", where);
            expect(same_bits(silu_multiply(table, x, up), product), "silu differs from scalar", where);
            std::vector<float> in_place = x;
            table.activations->silu_multiply(in_place.data(), up.data(), in_place.data(), n);
            expect(same_bits(in_place, product), "silu in place", where);
        }
    }
}

}  // namespace

int main() {
    test_silu_is_exact_to_a_few_roundings();
    test_silu_of_special_values();
    test_sizes_around_the_vector();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
