// Layers of several matrices: a fused norm against the formula in double precision, and everything else bit for bit
// against matrices computed one by one. Buffers have their exact size, for the address sanitizer.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "activation_kernels.h"
#include "binary_matmul.h"
#include "check.h"
#include "dispatch.h"
#include "fbiedge_ops.h"

using namespace fbiedge;

namespace {

std::mt19937 generator(20261122);
std::vector<float> random_floats(size_t count, float low, float high) {
    std::vector<float> values(count);
    for (float& value : values) {
        value = low + (high - low) * static_cast<float>(generator() >> 8) / static_cast<float>(1 << 24);
    }
    return values;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// A matrix with random weights.
struct Matrix {
    std::vector<float> weight, alpha, beta;
    std::vector<uint8_t> tiles;
    BinaryMatrix binary = {};

    Matrix(size_t n, size_t k, ScaleForm form) : weight(random_floats(n * k, -1.0f, 1.0f)) {
        tiles.resize(fbiedge_packed_bytes(n, k));
        fbiedge_pack(weight.data(), n, k, tiles.data(), tiles.size());
        const size_t groups = ceil_div(k, kGroupInputs);
        const size_t scales = form == ScaleForm::kColumn   ? k
                              : form == ScaleForm::kRow    ? n
                              : form == ScaleForm::kSingle ? 1
                                                           : ceil_div(n, kTileRows) * groups * kTileRows;
        alpha = random_floats(scales, 0.5f, 1.0f);
        beta = random_floats(scales, -0.1f, 0.1f);
        binary.n = n;
        binary.k = k;
        binary.form = form;
        binary.tiles = tiles.data();
        if (form == ScaleForm::kBlock) {
            binary.block = alpha.data();
        } else {
            binary.alpha = alpha.data();
            binary.beta = beta.data();
        }
    }

    double effective(size_t row, size_t i) const {
        const size_t groups = ceil_div(binary.k, kGroupInputs);
        const size_t block = (row / kTileRows * groups + i / kGroupInputs) * kTileRows + row % kTileRows;
        const size_t index = binary.form == ScaleForm::kColumn   ? i
                             : binary.form == ScaleForm::kRow    ? row
                             : binary.form == ScaleForm::kSingle ? 0
                                                                 : block;
        const double sign = weight[row * binary.k + i] >= 0.0f ? 1.0 : -1.0;
        return sign * alpha[index] + (binary.beta ? beta[index] : 0.0f);
    }
};

std::vector<float> run(const KernelTable& table, AccuracyLevel level, const BinaryLayer& layer,
                       const std::vector<float>& x, const float* residual = nullptr,
                       const ParallelFor& parallel = serial()) {
    const size_t m = x.size() / layer.k();
    std::vector<float> y(m * layer.outputs());
    expect(layer.run(table, level, x.data(), m, residual, y.data(), parallel), "runs", table.isa);
    return y;
}

constexpr float kEpsilon = 1e-5f;

// One matrix behind a norm against the formula: y = (x r gamma) W^T, r = 1 / sqrt(mean(x^2) + epsilon).
void check_norm(const KernelTable& table, AccuracyLevel level, const Matrix& matrix, const std::vector<float>& x,
                const std::vector<float>& gamma, const std::string& where) {
    const BinaryLayer layer(&matrix.binary, 1, Join::kConcat, {gamma.data(), kEpsilon});
    const std::vector<float> y = run(table, level, layer, x);
    const size_t k = layer.k(), n = layer.outputs();
    const double bound = level == AccuracyLevel::kFp32 ? 3e-6 : 0.012;
    bool good = true;
    for (size_t token = 0; token < x.size() / k; ++token) {
        double squares = 0.0;
        for (size_t i = 0; i < k; ++i) squares += static_cast<double>(x[token * k + i]) * x[token * k + i];
        const double r = 1.0 / std::sqrt(squares / static_cast<double>(k) + kEpsilon);
        for (size_t row = 0; row < n; ++row) {
            double expected = 0.0, magnitude = 0.0;
            for (size_t i = 0; i < k; ++i) {
                const double input = r * gamma[i] * x[token * k + i];
                expected += matrix.effective(row, i) * input;
                magnitude += 1.1 * std::fabs(input);
            }
            good = good && std::fabs(y[token * n + row] - expected) <= bound * magnitude;
        }
    }
    expect(good, "far from the formula", where);
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

std::vector<float> first_tokens(const std::vector<float>& values, size_t width, size_t m) {
    return {values.begin(), values.begin() + static_cast<std::ptrdiff_t>(width * m)};
}

struct Sizes {
    size_t m, k, n[3];
};

void check_layers(const Sizes& sizes, ScaleForm form) {
    const auto [m, k, n] = sizes;
    const Matrix parts[] = {{n[0], k, form}, {n[1], k, form}, {n[2], k, form}}, up(n[0], k, form);
    const BinaryMatrix qkv[] = {parts[0].binary, parts[1].binary, parts[2].binary};
    const BinaryMatrix gate_up[] = {parts[0].binary, up.binary};
    const std::vector<float> x = random_floats(m * k, -2.0f, 2.0f), gamma = random_floats(k, 0.5f, 1.5f);
    const std::vector<float> residual = random_floats(m * n[0], -2.0f, 2.0f);
    const RmsNorm norm = {gamma.data(), kEpsilon};
    const ParallelFor backwards = {run_backwards_on_threads, nullptr};
    std::vector<float> scalar_qkv, scalar_swiglu;
    for (size_t i = available_kernels().count; i-- > 0;) {  // scalar first
        const KernelTable& table = *available_kernels().tables[i];
        for (const AccuracyLevel level : {AccuracyLevel::kFp32, AccuracyLevel::kInt8}) {
            const std::string where = std::string(table.isa) + (level == AccuracyLevel::kInt8 ? " int8" : " fp32") +
                                      " form " + std::to_string(static_cast<int>(form)) + " M " + std::to_string(m) +
                                      " K " + std::to_string(k) + " N " + std::to_string(n[0]);
            check_norm(table, level, parts[0], x, gamma, where);

            // Concatenated: each part's columns are those of the part alone.
            const BinaryLayer layer(qkv, 3, Join::kConcat, norm);
            const std::vector<float> y = run(table, level, layer, x);
            std::vector<float> joined(y.size());
            size_t column = 0;
            for (const BinaryMatrix& part : qkv) {
                const std::vector<float> alone = run(table, level, BinaryLayer(&part, 1, Join::kConcat, norm), x);
                for (size_t token = 0; token < m; ++token) {
                    std::memcpy(&joined[token * layer.outputs() + column], &alone[token * part.n],
                                part.n * sizeof(float));
                }
                column += part.n;
            }
            expect(same_bits(y, joined), "parts together differ from the parts alone", where);
            expect(same_bits(run(table, level, layer, x, nullptr, backwards), y), "threads change the result", where);
            expect(same_bits(run(table, level, layer, first_tokens(x, k, 1)), first_tokens(y, layer.outputs(), 1)),
                   "one token differs from the same token among many", where);

            // SwiGLU: silu(gate) * up of what the matrices give alone.
            const BinaryLayer swiglu(gate_up, 2, Join::kSwiglu, norm);
            const std::vector<float> h = run(table, level, swiglu, x);
            const std::vector<float> gate = run(table, level, BinaryLayer(&gate_up[0], 1, Join::kConcat, norm), x);
            std::vector<float> product = run(table, level, BinaryLayer(&gate_up[1], 1, Join::kConcat, norm), x);
            table.activations->silu_multiply(gate.data(), product.data(), product.data(), product.size());
            expect(same_bits(h, product), "SwiGLU differs from its steps", where);
            expect(same_bits(run(table, level, swiglu, x, nullptr, backwards), h), "threads change SwiGLU", where);
            expect(same_bits(run(table, level, swiglu, first_tokens(x, k, 1)), first_tokens(h, n[0], 1)),
                   "SwiGLU of one token", where);

            // A residual is added last.
            const BinaryLayer single(&qkv[0], 1);
            std::vector<float> sum = run(table, level, single, x);
            for (size_t j = 0; j < sum.size(); ++j) sum[j] = sum[j] + residual[j];
            expect(same_bits(run(table, level, single, x, residual.data()), sum), "residual", where);
            expect(same_bits(run(table, level, single, x, residual.data(), backwards), sum), "residual threads", where);

            if (level == AccuracyLevel::kFp32) continue;
            if (scalar_qkv.empty()) {
                scalar_qkv = y;
                scalar_swiglu = h;
            }
            expect(same_bits(y, scalar_qkv), "int8 differs from scalar", where);
            expect(same_bits(h, scalar_swiglu), "int8 SwiGLU differs from scalar", where);
        }
    }
}

void test_layers() {
    const Sizes sizes[] = {{1, 1, {1, 1, 1}},      {3, 33, {17, 1, 16}},     {9, 128, {16, 48, 15}},
                           {2, 129, {33, 80, 5}},  {130, 36, {65, 17, 150}}, {1, 768, {345, 64, 64}},
                           {17, 300, {96, 32, 32}}};
    for (const Sizes& size : sizes) {
        for (const ScaleForm form : {ScaleForm::kColumn, ScaleForm::kRow, ScaleForm::kSingle, ScaleForm::kBlock}) {
            check_layers(size, form);
        }
    }
}

// A bad token is NaN (an infinite one too: no norm makes it finite), its neighbours are not; zeros give zeros.
void test_tokens_that_no_norm_can_save() {
    const size_t k = 200, n = 20;
    for (const ScaleForm form : {ScaleForm::kColumn, ScaleForm::kBlock}) {
        const Matrix gate(n, k, form), up(n, k, form);
        const BinaryMatrix parts[] = {gate.binary, up.binary};
        const std::vector<float> gamma = random_floats(k, 0.5f, 1.5f);
        std::vector<float> x = random_floats(4 * k, -2.0f, 2.0f);
        x[k + 150] = std::numeric_limits<float>::quiet_NaN();
        x[2 * k + 3] = std::numeric_limits<float>::infinity();
        for (size_t i = 0; i < k; ++i) x[3 * k + i] = 0.0f;
        for (size_t i = 0; i < available_kernels().count; ++i) {
            const KernelTable& table = *available_kernels().tables[i];
            for (const AccuracyLevel level : {AccuracyLevel::kFp32, AccuracyLevel::kInt8}) {
                for (const Join join : {Join::kConcat, Join::kSwiglu}) {
                    const BinaryLayer layer(parts, 2, join, {gamma.data(), kEpsilon});
                    const std::vector<float> y = run(table, level, layer, x);
                    for (size_t j = 0; j < y.size(); ++j) {
                        const size_t token = j / layer.outputs();
                        expect(std::isnan(y[j]) == (token == 1 || token == 2), "NaN where expected", table.isa);
                        expect(token != 3 || y[j] == 0.0f, "zero stays zero", table.isa);
                    }
                }
            }
        }
    }
}

}  // namespace

int main() {
    test_layers();
    test_tokens_that_no_norm_can_save();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
