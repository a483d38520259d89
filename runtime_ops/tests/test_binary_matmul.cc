// Unit tests of the op library without ONNX Runtime. Every kernel that this machine can run is compared with the
// formula in double precision, and bit for bit with the scalar kernel at the int8 level. Buffers have their exact size,
// so that the address sanitizer sees a kernel that reads or writes beyond its inputs.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "binary_matmul.h"
#include "check.h"
#include "dispatch.h"
#include "fbiedge_ops.h"

using namespace fbiedge;

namespace {

std::mt19937 generator(20240707);
float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(generator() >> 8) / static_cast<float>(1 << 24);
}
std::vector<float> random_floats(size_t count, float low, float high) {
    std::vector<float> values(count);
    for (float& value : values) value = uniform(low, high);
    return values;
}

uint16_t to_half(float value) {  // exact for the multiples of 1/1024 in [0.5, 1) that the tests use
    return static_cast<uint16_t>(0x3800 | static_cast<uint16_t>(std::lround((value - 0.5f) * 2048.0f)));
}

// One operator with random weights and the data of all scale forms.
struct Problem {
    size_t m, n, k;
    fbiedge_scale_form form;
    bool fp16, has_offsets, has_bias;
    std::vector<float> x, weight, scales, offsets, bias;
    std::vector<uint16_t> half_scales;
    std::vector<uint8_t> tiles;

    Problem(size_t m_in, size_t n_in, size_t k_in, fbiedge_scale_form form_in, bool fp16_in, bool offsets_in,
            bool bias_in)
        : m(m_in), n(n_in), k(k_in), form(form_in), fp16(fp16_in), has_offsets(offsets_in), has_bias(bias_in) {
        x = random_floats(m * k, -2.0f, 2.0f);
        weight = random_floats(n * k, -1.0f, 1.0f);
        bias = random_floats(n, -1.0f, 1.0f);
        const size_t count = form == FBIEDGE_COLUMN ? k : form == FBIEDGE_ROW ? n : form == FBIEDGE_SINGLE ? 1 : 0;
        scales = random_floats(count, 0.5f, 1.0f);
        offsets = random_floats(count, -0.1f, 0.1f);
        if (form == FBIEDGE_BLOCK) {
            const size_t groups = ceil_div(k, kGroupInputs);
            scales.assign(ceil_div(n, kTileRows) * groups * kTileRows, 0.0f);
            for (size_t row = 0; row < n; ++row) {
                for (size_t g = 0; g < groups; ++g) {
                    scales[block_index(row, g)] = 0.5f + static_cast<float>(generator() % 512) / 1024.0f;
                }
            }
            if (fp16) {
                for (const float scale : scales) half_scales.push_back(scale == 0.0f ? 0 : to_half(scale));
            }
        }
        tiles.resize(fbiedge_packed_bytes(n, k));
        fbiedge_pack(weight.data(), n, k, tiles.data(), tiles.size());
    }

    size_t block_index(size_t row, size_t g) const {
        return (row / kTileRows * ceil_div(k, kGroupInputs) + g) * kTileRows + row % kTileRows;
    }

    fbiedge_matmul_args args(const char* isa, int level, float* y) const {
        fbiedge_matmul_args a = {};
        a.struct_bytes = sizeof a;
        a.isa = isa;
        a.accuracy_level = level;
        a.scale_form = form;
        a.scales_are_fp16 = fp16;
        a.m = m;
        a.n = n;
        a.k = k;
        a.a = x.data();
        a.b = tiles.data();
        a.scales = fp16 ? static_cast<const void*>(half_scales.data()) : scales.data();
        a.offsets = has_offsets ? offsets.data() : nullptr;
        a.bias = has_bias ? bias.data() : nullptr;
        a.y = y;
        return a;
    }

    std::vector<float> run(const char* isa, int level) const {
        std::vector<float> y(m * n);
        const fbiedge_matmul_args a = args(isa, level, y.data());
        const int status = fbiedge_matmul(&a);
        expect(status == FBIEDGE_OK, fbiedge_status_message(status), text(isa));
        return y;
    }

    // Output (token, row) of the formula, and the sum of the magnitudes that it adds up.
    void reference(size_t token, size_t row, double& y, double& magnitude) const {
        y = has_bias ? bias[row] : 0.0;
        magnitude = std::fabs(y);
        for (size_t i = 0; i < k; ++i) {
            const size_t index = form == FBIEDGE_COLUMN   ? i
                                 : form == FBIEDGE_ROW    ? row
                                 : form == FBIEDGE_SINGLE ? 0
                                                          : block_index(row, i / kGroupInputs);
            const double input = x[token * k + i], alpha = scales[index];
            const double beta = has_offsets ? offsets[index] : 0.0;
            y += ((weight[row * k + i] >= 0.0f ? alpha : -alpha) + beta) * input;
            magnitude += (std::fabs(alpha) + std::fabs(beta)) * std::fabs(input);
        }
    }

    std::string text(const char* isa) const {
        return std::string(isa) + " form " + std::to_string(form) + " M " + std::to_string(m) + " N " +
               std::to_string(n) + " K " + std::to_string(k);
    }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// fp32: K roundings of 2^-24 of the magnitude at most, in truth far fewer. int8: an input is off by at most half a
// step, max/254, which against uniform inputs (mean of |x| = max/2) is 1/127 of the magnitude.
void check_against_formula(const Problem& problem, const std::vector<float>& y, double bound,
                           const std::string& where) {
    bool good = true;
    for (size_t token = 0; token < problem.m; ++token) {
        for (size_t row = 0; row < problem.n; ++row) {
            double expected, magnitude;
            problem.reference(token, row, expected, magnitude);
            good = good && std::fabs(y[token * problem.n + row] - expected) <= bound * magnitude;
        }
    }
    expect(good, "far from the formula", where);
}

void check_problem(const Problem& problem) {
    const std::vector<float> scalar_int8 = problem.run("scalar", FBIEDGE_INT8);
    check_against_formula(problem, scalar_int8, 0.012, problem.text("scalar int8"));
    for (int i = 0; i < fbiedge_isa_count(); ++i) {
        const char* isa = fbiedge_isa_name(i);
        check_against_formula(problem, problem.run(isa, FBIEDGE_FP32), 2e-6, problem.text(isa) + " fp32");
        expect(same_bits(problem.run(isa, FBIEDGE_INT8), scalar_int8), "int8 differs from scalar", problem.text(isa));
    }
}

void test_sizes_around_the_tile() {
    const size_t inputs[] = {1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 172, 257};
    const size_t outputs[] = {1, 15, 16, 17, 31, 32, 33, 48, 65, 80};
    const size_t tokens[] = {1, 2, 3, 7, 8, 9, 65};
    size_t turn = 0;  // every K with every N; forms and M take turns
    for (const size_t k : inputs) {
        for (const size_t n : outputs) {
            for (int form = 0; form < 4; ++form, ++turn) {
                const bool block = form == FBIEDGE_BLOCK;
                const size_t m = tokens[turn % 7];
                check_problem({m, n, k, static_cast<fbiedge_scale_form>(form), block && turn % 8 < 4,
                               !block && turn % 3 != 0, turn % 2 == 0});
            }
        }
    }
}

// Activations that a bad kernel gets wrong: all zero, one huge among small, exact halves between two steps, tiny.
void test_extreme_activations() {
    Problem problem(5, 33, 300, FBIEDGE_COLUMN, false, true, true);
    problem.scales.assign(problem.k, 1.0f);
    for (size_t i = 0; i < problem.k; ++i) {
        problem.x[i] = 0.0f;
        problem.x[problem.k + i] = i == 140 ? 3e37f : 1e-3f;
        problem.x[2 * problem.k + i] = i % 128 == 0 ? 127.0f : static_cast<float>(i % 17) - 8.5f;
        problem.x[3 * problem.k + i] = i % 2 ? 1e-40f : -3e-39f;
        problem.x[4 * problem.k + i] = i % 2 ? 127.0f : -127.0f;
    }
    const std::vector<float> scalar = problem.run("scalar", FBIEDGE_INT8);
    for (int i = 0; i < fbiedge_isa_count(); ++i) {
        const char* isa = fbiedge_isa_name(i);
        expect(same_bits(problem.run(isa, FBIEDGE_INT8), scalar), "extreme activations", isa);
    }
}

void test_not_a_number_reaches_every_output() {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        Problem problem(3, 20, 200, FBIEDGE_ROW, false, false, false);
        problem.x[problem.k + 150] = bad;
        for (int i = 0; i < fbiedge_isa_count(); ++i) {
            const std::vector<float> y = problem.run(fbiedge_isa_name(i), FBIEDGE_INT8);
            for (size_t j = 0; j < y.size(); ++j) {
                const bool of_bad_token = j / problem.n == 1;
                expect(std::isnan(y[j]) == of_bad_token, "NaN where expected", fbiedge_isa_name(i));
            }
        }
    }
}

// Pieces on several threads, in reverse order. Four, because emulators create threads slowly.
bool run_backwards_on_threads(void*, size_t count, void (*fn)(void*, size_t), void* data) {
    constexpr size_t kThreads = 4;
    std::vector<std::thread> threads;
    for (size_t thread = 0; thread < kThreads; ++thread) {
        threads.emplace_back([=] {
            for (size_t i = count; i-- > 0;) {
                if (i % kThreads == thread) fn(data, i);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    return true;
}
bool refuse(void*, size_t, void (*)(void*, size_t), void*) { return false; }

void test_threads_do_not_change_the_result() {
    const Problem problem(70, 345, 300, FBIEDGE_ROW, false, true, true);
    BinaryMatrix matrix = {};
    matrix.n = problem.n;
    matrix.k = problem.k;
    matrix.form = ScaleForm::kRow;
    matrix.tiles = problem.tiles.data();
    matrix.alpha = problem.scales.data();
    matrix.beta = problem.offsets.data();
    matrix.bias = problem.bias.data();
    const BinaryLayer layer(&matrix, 1);
    const ParallelFor backwards = {run_backwards_on_threads, nullptr};
    for (size_t i = 0; i < available_kernels().count; ++i) {
        const KernelTable& table = *available_kernels().tables[i];
        for (const AccuracyLevel level : {AccuracyLevel::kFp32, AccuracyLevel::kInt8}) {
            const std::vector<float> alone =
                problem.run(table.isa, level == AccuracyLevel::kFp32 ? FBIEDGE_FP32 : FBIEDGE_INT8);
            std::vector<float> y(problem.m * problem.n), first(problem.n);
            layer.run(table, level, problem.x.data(), problem.m, nullptr, y.data(), backwards);
            expect(same_bits(y, alone), "threads change the result", table.isa);
            expect(!layer.run(table, level, problem.x.data(), problem.m, nullptr, y.data(), {refuse, nullptr}),
                   "a failing parallel-for is reported", table.isa);
            layer.run(table, level, problem.x.data(), 1, nullptr, first.data(), backwards);
            y.resize(problem.n);
            expect(same_bits(first, y), "one token differs from the same token among many", table.isa);
        }
    }
}

// First in main, so that the detection of the kernels runs on several threads at once.
void test_the_c_api_on_several_threads_at_once() {
    constexpr size_t kThreads = 4;
    Problem problem(3, 40, 200, FBIEDGE_COLUMN, false, true, false);
    std::vector<std::vector<float>> y(kThreads, std::vector<float>(problem.m * problem.n));
    std::vector<int> status(kThreads, -1);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kThreads; ++i) {
        threads.emplace_back([&, i] {
            const char* isa = fbiedge_isa_name(static_cast<int>(i) % fbiedge_isa_count());
            const fbiedge_matmul_args a = problem.args(isa, FBIEDGE_INT8, y[i].data());
            status[i] = fbiedge_matmul(&a);
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t i = 0; i < kThreads; ++i) {
        expect(status[i] == FBIEDGE_OK && same_bits(y[i], y[0]), "threads disturb each other", std::to_string(i));
    }
}

void test_pack() {
    const float weight[2 * 9] = {1, -1, 0, -0.0f, 2, -2, 3, -3, 1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    std::vector<uint8_t> tiles(fbiedge_packed_bytes(2, 9), 0xff);
    expect(tiles.size() == kTileBytes, "packed size", "pack");
    expect(fbiedge_pack(weight, 2, 9, tiles.data(), tiles.size()) == FBIEDGE_OK, "packs", "pack");
    std::vector<uint8_t> expected(kTileBytes, 0);
    expected[0] = 0x5d;  // bits 0, 2, 3, 4, 6: signs of 1, 0, -0, 2, 3
    expected[1] = 0x01;
    expect(tiles == expected, "bytes", "pack");
}

void test_errors() {
    const Problem problem(1, 16, 32, FBIEDGE_ROW, false, false, false);
    float y[16];
    const auto status = [&](auto change) {
        fbiedge_matmul_args a = problem.args("scalar", FBIEDGE_INT8, y);
        change(a);
        return fbiedge_matmul(&a);
    };
    using Args = fbiedge_matmul_args;
    expect(fbiedge_matmul(nullptr) == FBIEDGE_NULL_POINTER, "no args", "errors");
    expect(status([](Args& a) { a.b = nullptr; }) == FBIEDGE_NULL_POINTER, "no b", "errors");
    expect(status([](Args& a) { a.y = nullptr; }) == FBIEDGE_NULL_POINTER, "no y", "errors");
    expect(status([](Args& a) { a.struct_bytes -= 8; }) == FBIEDGE_BAD_SIZE, "older struct", "errors");
    expect(status([](Args& a) { a.k = 0; }) == FBIEDGE_BAD_SIZE, "K 0", "errors");
    expect(status([](Args& a) { a.n = SIZE_MAX; }) == FBIEDGE_BAD_SIZE, "N huge", "errors");
    expect(status([](Args& a) { a.scale_form = 4; }) == FBIEDGE_BAD_SCALES, "form 4", "errors");
    expect(status([](Args& a) { a.scales_are_fp16 = 1; }) == FBIEDGE_BAD_SCALES, "fp16 row scales", "errors");
    expect(status([](Args& a) { a.accuracy_level = 2; }) == FBIEDGE_BAD_ACCURACY, "accuracy 2", "errors");
    expect(status([](Args& a) { a.isa = "sse9"; }) == FBIEDGE_UNKNOWN_ISA, "unknown ISA", "errors");
    const char* elsewhere = find_kernels("neon") ? "avx2" : "neon";
    expect(status([&](Args& a) { a.isa = elsewhere; }) == FBIEDGE_UNAVAILABLE_ISA, "ISA of another machine", "errors");
    expect(status([](Args& a) { a.m = 0; }) == FBIEDGE_OK, "no tokens is fine", "errors");
    expect(fbiedge_pack(y, 1, 32, nullptr, 64) == FBIEDGE_NULL_POINTER, "pack to null", "errors");
    uint8_t tiles[63];
    expect(fbiedge_pack(y, 1, 16, tiles, sizeof tiles) == FBIEDGE_BAD_SIZE, "pack to a short buffer", "errors");
    expect(fbiedge_packed_bytes(0, 1) == 0 && fbiedge_packed_bytes(17, 33) == 256, "packed bytes", "errors");
    expect(fbiedge_isa_name(-1) == nullptr && fbiedge_isa_name(fbiedge_isa_count()) == nullptr, "ISA index", "errors");
    expect(std::strcmp(fbiedge_isa_name(fbiedge_isa_count() - 1), "scalar") == 0, "scalar is last", "errors");
}

}  // namespace

int main() {
    test_the_c_api_on_several_threads_at_once();
    test_pack();
    test_errors();
    test_extreme_activations();
    test_not_a_number_reaches_every_output();
    test_threads_do_not_change_the_result();
    test_sizes_around_the_tile();
    std::printf("kernels:");
    for (int i = 0; i < fbiedge_isa_count(); ++i) std::printf(" %s", fbiedge_isa_name(i));
    std::printf("\n%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
