// Unit tests of MatMulNBits without ONNX Runtime: every kernel that this machine can run is compared with the formula
// in double precision, and bit for bit with the scalar kernel at the int8 level. Buffers have their exact size, so that
// the address sanitizer sees a kernel that reads or writes beyond its inputs.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "matmul_nbits.h"

using namespace fbiedge;

namespace {

std::mt19937 generator(20240707);
float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(generator() >> 8) / static_cast<float>(1 << 24);
}

uint16_t to_half(float value) {  // exact for the multiples of 1/1024 in [0.5, 1) that the tests use
    return static_cast<uint16_t>(0x3800 | static_cast<uint16_t>(std::lround((value - 0.5f) * 2048.0f)));
}

struct Problem {
    size_t m, n, k;
    unsigned bits;
    std::vector<float> x, scales;  // [m, k], [n, ceil(k/32)]
    std::vector<int> weight;       // [n, k], code - zero point
    std::vector<uint8_t> tiles;

    Problem(size_t m_in, size_t n_in, size_t k_in, unsigned bits_in) : m(m_in), n(n_in), k(k_in), bits(bits_in) {
        x.resize(m * k);
        for (float& value : x) value = uniform(-2.0f, 2.0f);
        const size_t groups = ceil_div(k, kGroupInputs), blocks = ceil_div(k, kNBitsBlockInputs);
        const int zero = 1 << (bits - 1);
        tiles.resize(ceil_div(n, kTileRows) * groups * nbits_group_bytes(bits));
        for (size_t row = 0; row < n; ++row) {
            for (size_t block = 0; block < blocks; ++block) {
                scales.push_back(0.5f + static_cast<float>(generator() % 512) / 1024.0f);
                const uint16_t half = to_half(scales.back());
                uint8_t* at = group(row, block / kNBitsGroupBlocks);
                std::memcpy(at + (block % kNBitsGroupBlocks * kTileRows + row % kTileRows) * 2, &half, sizeof half);
            }
            for (size_t i = 0; i < k; ++i) {
                // Extremes are as common as all others together.
                const unsigned code =
                    generator() % 2 ? generator() % (1u << bits) : generator() % 2 * ((1u << bits) - 1);
                weight.push_back(static_cast<int>(code) - zero);
                const size_t byte = i % kGroupInputs * bits / 8;
                uint8_t* at = group(row, i / kGroupInputs) + kNBitsScaleBytes;
                at[byte / 4 * kNBitsPlaneBytes + 4 * (row % kTileRows) + byte % 4] |=
                    static_cast<uint8_t>(code << (bits == 4 ? i % 2 * 4 : 0));
            }
        }
    }

    uint8_t* group(size_t row, size_t g) {
        return tiles.data() + (row / kTileRows * ceil_div(k, kGroupInputs) + g) * nbits_group_bytes(bits);
    }

    std::vector<float> run(const KernelTable& table, AccuracyLevel level,
                           const ParallelFor& parallel = serial()) const {
        std::vector<float> y(m * n);
        const NBitsMatrix matrix = {n, k, bits, tiles.data()};
        const bool done = matmul_nbits(matrix, nbits_level_kernels(table, level), x.data(), m, y.data(), parallel);
        expect(done, "runs", text(table));
        return y;
    }

    std::string text(const KernelTable& table) const {
        return std::string(table.isa) + " bits " + std::to_string(bits) + " M " + std::to_string(m) + " N " +
               std::to_string(n) + " K " + std::to_string(k);
    }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The bounds are those of test_binary_matmul.cc.
void check_against_formula(const Problem& p, const std::vector<float>& y, double bound, const std::string& where) {
    bool good = true;
    const size_t blocks = ceil_div(p.k, kNBitsBlockInputs);
    for (size_t token = 0; token < p.m; ++token) {
        for (size_t row = 0; row < p.n; ++row) {
            double expected = 0.0, magnitude = 0.0;
            for (size_t i = 0; i < p.k; ++i) {
                const double scale = p.scales[row * blocks + i / kNBitsBlockInputs];
                const double product = scale * p.weight[row * p.k + i] * p.x[token * p.k + i];
                expected += product;
                magnitude += std::fabs(product);
            }
            good = good && std::fabs(y[token * p.n + row] - expected) <= bound * magnitude + 1e-30;
        }
    }
    expect(good, "far from the formula", where);
}

void check_problem(const Problem& problem) {
    const std::vector<float> scalar_int8 = problem.run(*find_kernels("scalar"), AccuracyLevel::kInt8);
    // An input is off by half a step, max / 254; few products make the largest weight meet the largest error.
    check_against_formula(problem, scalar_int8, problem.k < 8 ? 0.2 : 0.05, problem.text(*find_kernels("scalar")));
    const AvailableKernels& kernels = available_kernels();
    for (size_t i = 0; i < kernels.count; ++i) {
        const KernelTable& table = *kernels.tables[i];
        const std::string where = problem.text(table);
        check_against_formula(problem, problem.run(table, AccuracyLevel::kFp32), 2e-6, where + " fp32");
        expect(same_bits(problem.run(table, AccuracyLevel::kInt8), scalar_int8), "int8 differs from scalar", where);
    }
}

void test_sizes_around_the_tile() {
    const size_t inputs[] = {1, 7, 31, 32, 33, 64, 65, 127, 128, 129, 172, 257};
    const size_t outputs[] = {1, 15, 16, 17, 31, 32, 33, 48, 65};
    const size_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 130};
    size_t turn = 0;  // every K with every N and bits; M takes turns
    for (const size_t k : inputs) {
        for (const size_t n : outputs) {
            for (const unsigned bits : {4u, 8u}) check_problem({tokens[turn++ % 10], n, k, bits});
        }
    }
}

// Sums as large as they can be: every code at an end, every activation at its largest, signs alike and opposed.
void test_extremes() {
    for (const unsigned bits : {4u, 8u}) {
        Problem problem(6, 33, 300, bits);
        for (size_t row = 0; row < problem.n; ++row) {
            for (size_t g = 0; g < 3; ++g) {
                const int fill = row % 3 == 0 ? 0x00 : 0xff;
                for (size_t at = 4 * (row % kTileRows); at < nbits_group_bytes(bits) - kNBitsScaleBytes;
                     at += kNBitsPlaneBytes) {
                    std::memset(problem.group(row, g) + kNBitsScaleBytes + at, fill, 4);
                }
            }
        }
        for (size_t i = 0; i < problem.k; ++i) {
            problem.x[i] = 1.0f;
            problem.x[problem.k + i] = -1.0f;
            problem.x[2 * problem.k + i] = i % 2 ? 127.0f : -127.0f;
            problem.x[3 * problem.k + i] = i == 140 ? 3e37f : 1e-3f;
            problem.x[4 * problem.k + i] = i % 128 == 0 ? 127.0f : static_cast<float>(i % 17) - 8.5f;
            problem.x[5 * problem.k + i] = i % 2 ? 1e-40f : 0.0f;
        }
        const std::vector<float> scalar = problem.run(*find_kernels("scalar"), AccuracyLevel::kInt8);
        const AvailableKernels& kernels = available_kernels();
        for (size_t i = 0; i < kernels.count; ++i) {
            const std::vector<float> y = problem.run(*kernels.tables[i], AccuracyLevel::kInt8);
            expect(same_bits(y, scalar), "extremes", problem.text(*kernels.tables[i]));
        }
    }
}

void test_not_a_number_reaches_every_output_of_its_token() {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        Problem problem(3, 20, 200, 8);
        problem.x[problem.k + 150] = bad;
        const AvailableKernels& kernels = available_kernels();
        for (size_t i = 0; i < kernels.count; ++i) {
            const std::vector<float> y = problem.run(*kernels.tables[i], AccuracyLevel::kInt8);
            bool good = true;
            for (size_t at = 0; at < y.size(); ++at) good = good && std::isnan(y[at]) == (at / problem.n == 1);
            expect(good, "NaN stays in its token", kernels.tables[i]->isa);
        }
    }
}

bool run_backwards_on_threads(void*, size_t count, void (*fn)(void*, size_t), void* data) {
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 3; ++t) {
        threads.emplace_back([=] {
            for (size_t i = count; i-- > 0;) {
                if (i % 3 == t) fn(data, i);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    return true;
}

bool refuse(void*, size_t, void (*)(void*, size_t), void*) { return false; }

void test_neither_threads_nor_m_change_the_result() {
    const AvailableKernels& kernels = available_kernels();
    for (const unsigned bits : {4u, 8u}) {
        Problem problem(11, 1100, 300, bits);
        for (size_t i = 0; i < kernels.count; ++i) {
            for (const AccuracyLevel level : {AccuracyLevel::kFp32, AccuracyLevel::kInt8}) {
                const KernelTable& table = *kernels.tables[i];
                problem.m = 11;
                const std::vector<float> all = problem.run(table, level);
                expect(same_bits(problem.run(table, level, {run_backwards_on_threads, nullptr}), all),
                       "threads change the result", problem.text(table));
                for (problem.m = 1; problem.m <= 5; ++problem.m) {
                    const std::vector<float> few = problem.run(table, level);
                    expect(std::memcmp(few.data(), all.data(), few.size() * sizeof(float)) == 0,
                           "few tokens differ from the same among many", problem.text(table));
                }
            }
        }
        const NBitsMatrix matrix = {problem.n, problem.k, bits, problem.tiles.data()};
        std::vector<float> y(11 * problem.n);
        const NBitsLevelKernels& level = nbits_level_kernels(*kernels.tables[0], AccuracyLevel::kInt8);
        expect(!matmul_nbits(matrix, level, problem.x.data(), 11, y.data(), {refuse, nullptr}),
               "a failing parallel-for is reported", "refuse");
    }
}

}  // namespace

int main() {
    test_extremes();
    test_not_a_number_reaches_every_output_of_its_token();
    test_neither_threads_nor_m_change_the_result();
    test_sizes_around_the_tile();
    std::printf("kernels:");
    const AvailableKernels& kernels = available_kernels();
    for (size_t i = 0; i < kernels.count; ++i) std::printf(" %s", kernels.tables[i]->isa);
    std::printf("\n%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
