// Unit tests of attention without ONNX Runtime. The scalar kernel is compared with the formula in double precision over
// the cache that it wrote, every other kernel with the scalar one, bit for bit: also where the tokens come in other
// pieces or the work runs on threads. Buffers have their exact size, so that the address sanitizer sees what is read
// or written beyond them.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention.h"
#include "check.h"
#include "dispatch.h"

using namespace fbiedge;

namespace {

std::mt19937 generator(20240707);
std::vector<float> random_floats(size_t count, float size) {
    std::normal_distribution<float> normal(0.0f, size);
    std::vector<float> values(count);
    for (float& value : values) value = normal(generator);
    return values;
}

bool run_backwards_on_threads(void*, size_t count, void (*fn)(void*, size_t), void* data) {
    std::vector<std::thread> threads;
    for (size_t i = count; i-- > 0;) threads.emplace_back(fn, data, i);
    for (std::thread& thread : threads) thread.join();
    return true;
}
bool refuse(void*, size_t, void (*)(void*, size_t), void*) { return false; }

// A text of `tokens` in each row of the batch, its projections, and what attention made of them.
struct Problem {
    size_t batch, tokens, heads, kv_heads, d;
    bool norms;
    std::vector<float> qkv, q_norm, k_norm, cos, sin;

    Problem(size_t batch_in, size_t tokens_in, size_t heads_in, size_t kv_heads_in, size_t d_in, bool norms_in = false)
        : batch(batch_in), tokens(tokens_in), heads(heads_in), kv_heads(kv_heads_in), d(d_in), norms(norms_in) {
        qkv = random_floats(batch * tokens * width(), 2.0f);
        q_norm = random_floats(d, 1.0f);
        k_norm = random_floats(d, 1.0f);
        for (size_t position = 0; position < tokens; ++position) {
            for (size_t i = 0; i < d / 2; ++i) {
                const double angle = position * std::pow(10000.0, -2.0 * i / d);
                cos.push_back(static_cast<float>(std::cos(angle)));
                sin.push_back(static_cast<float>(std::sin(angle)));
            }
        }
    }

    size_t width() const { return (heads + 2 * kv_heads) * d; }
    std::string text() const {
        return "B " + std::to_string(batch) + " S " + std::to_string(tokens) + " H " + std::to_string(heads) + " G " +
               std::to_string(kv_heads) + " D " + std::to_string(d);
    }
};

struct Result {
    size_t capacity;
    std::vector<int8_t> keys, values;
    std::vector<float> key_scales, value_scales, out;
};

// The text in steps of `chunk` tokens.
Result run(const Problem& p, const AttentionKernels& kernels, size_t chunk, const ParallelFor& parallel = serial()) {
    Result r;
    r.capacity = p.tokens;
    const size_t rows = p.batch * p.kv_heads * r.capacity;
    r.keys.resize(rows * p.d);
    r.values.resize(rows * p.d);
    r.key_scales.resize(rows);
    r.value_scales.resize(rows);
    r.out.resize(p.batch * p.tokens * p.heads * p.d);
    for (size_t begin = 0; begin < p.tokens; begin += chunk) {
        const size_t count = std::min(chunk, p.tokens - begin), out_width = p.heads * p.d;
        std::vector<float> qkv(p.batch * count * p.width()), out(p.batch * count * out_width);
        for (size_t b = 0; b < p.batch; ++b) {
            std::memcpy(&qkv[b * count * p.width()], &p.qkv[(b * p.tokens + begin) * p.width()],
                        count * p.width() * sizeof(float));
        }
        const std::vector<size_t> first(p.batch, begin);
        Attention a = {};
        a.batch = p.batch;
        a.tokens = count;
        a.heads = p.heads;
        a.kv_heads = p.kv_heads;
        a.d = p.d;
        a.capacity = r.capacity;
        a.scale = 1.0f / std::sqrt(static_cast<float>(p.d));
        a.epsilon = 1e-6f;
        a.q_norm = p.norms ? p.q_norm.data() : nullptr;
        a.k_norm = p.norms ? p.k_norm.data() : nullptr;
        a.cos = p.cos.data();
        a.sin = p.sin.data();
        a.qkv = qkv.data();
        a.first = first.data();
        a.keys = r.keys.data();
        a.values = r.values.data();
        a.key_scales = r.key_scales.data();
        a.value_scales = r.value_scales.data();
        a.out = out.data();
        expect(attention(a, kernels, parallel), "runs", p.text());
        for (size_t b = 0; b < p.batch; ++b) {
            std::memcpy(&r.out[(b * p.tokens + begin) * out_width], &out[b * count * out_width],
                        count * out_width * sizeof(float));
        }
    }
    return r;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
bool same(const Result& a, const Result& b) {
    return same_bits(a.keys, b.keys) && same_bits(a.values, b.values) && same_bits(a.key_scales, b.key_scales) &&
           same_bits(a.value_scales, b.value_scales) && same_bits(a.out, b.out);
}

// Normed and rotated, in double precision.
std::vector<double> transformed(const Problem& p, const float* x, const std::vector<float>& norm, size_t position) {
    std::vector<double> y(x, x + p.d), out(p.d);
    if (p.norms) {
        double sum = 0;
        for (const double value : y) sum += value * value;
        for (size_t i = 0; i < p.d; ++i) y[i] *= norm[i] / std::sqrt(sum / p.d + 1e-6);
    }
    for (size_t i = 0; i < p.d / 2; ++i) {
        const double c = p.cos[position * (p.d / 2) + i], s = p.sin[position * (p.d / 2) + i];
        out[i] = y[i] * c - y[p.d / 2 + i] * s;
        out[p.d / 2 + i] = y[p.d / 2 + i] * c + y[i] * s;
    }
    return out;
}

void check_against_formula(const Problem& p, const Result& r) {
    const size_t group = p.heads / p.kv_heads;
    bool good_keys = true;
    double error = 0, size = 0;
    for (size_t b = 0; b < p.batch; ++b) {
        for (size_t token = 0; token < p.tokens; ++token) {
            const float* x = &p.qkv[(b * p.tokens + token) * p.width()];
            for (size_t head = 0; head < p.heads; ++head) {
                const size_t row0 = (b * p.kv_heads + head / group) * r.capacity;
                const std::vector<double> key = transformed(p, x + (p.heads + head / group) * p.d, p.k_norm, token);
                const double step = r.key_scales[row0 + token];
                for (size_t i = 0; i < p.d; ++i) {
                    const double held = r.keys[(row0 + token) * p.d + i] * step;
                    good_keys = good_keys && std::fabs(held - key[i]) <= 0.5001 * step;
                }
                const std::vector<double> query = transformed(p, x + head * p.d, p.q_norm, token);
                std::vector<double> scores(token + 1), mixed(p.d, 0.0);
                double peak = -1e300, sum = 0;
                for (size_t t = 0; t <= token; ++t) {
                    double dot = 0;
                    for (size_t i = 0; i < p.d; ++i) dot += query[i] * r.keys[(row0 + t) * p.d + i];
                    scores[t] = dot * r.key_scales[row0 + t] / std::sqrt(static_cast<double>(p.d));
                    peak = std::fmax(peak, scores[t]);
                }
                for (size_t t = 0; t <= token; ++t) {
                    const double share = std::exp(scores[t] - peak);
                    sum += share;
                    for (size_t i = 0; i < p.d; ++i) {
                        mixed[i] += share * r.values[(row0 + t) * p.d + i] * r.value_scales[row0 + t];
                    }
                }
                const float* out = &r.out[((b * p.tokens + token) * p.heads + head) * p.d];
                for (size_t i = 0; i < p.d; ++i) {
                    error += std::pow(out[i] - mixed[i] / sum, 2);
                    size += std::pow(mixed[i] / sum, 2);
                }
            }
        }
    }
    expect(good_keys, "keys are off by more than half a step", p.text());
    expect(std::sqrt(error / size) <= 1e-4, "far from the formula",
           p.text() + " " + std::to_string(std::sqrt(error / size)));
}

void check_problem(const Problem& p, size_t chunk) {
    const Result expected = run(p, kAttentionScalar, p.tokens);
    check_against_formula(p, expected);
    const AvailableKernels& kernels = available_kernels();
    for (size_t i = 0; i < kernels.count; ++i) {
        const std::string where = p.text() + " " + kernels.tables[i]->isa;
        const AttentionKernels& table = *kernels.tables[i]->attention;
        expect(same(run(p, table, p.tokens), expected), "differs from scalar", where);
        expect(same(run(p, table, chunk), expected), "pieces of the text change the result", where);
    }
}

void test_sizes() {
    for (const size_t d : {8, 32, 40, 48, 64, 72, 80, 96, 128, 200, 256}) {
        check_problem({1, 19, 2, 1, d}, 1);
        check_problem({2, 35, 3, 3, d, true}, 17);
        check_problem({1, 150, 8, 2, d}, 7);
    }
    check_problem({1, 9, 40, 1, 64}, 2);  // more query heads than are attended to at once
}

// One token at a time, past the length at which the cache is cut into pieces.
void test_a_long_text() {
    for (const size_t d : {64, 128}) {
        const Problem p(1, 1100, 2, 1, d);
        const Result expected = run(p, kAttentionScalar, p.tokens);
        const AvailableKernels& kernels = available_kernels();
        for (size_t i = 0; i < kernels.count; ++i) {
            const AttentionKernels& table = *kernels.tables[i]->attention;
            expect(same(run(p, table, i + 1 == kernels.count ? 50 : 1), expected), "a long text", p.text());
        }
    }
}

void test_threads_do_not_change_the_result(const Problem& p) {
    const AvailableKernels& kernels = available_kernels();
    const Result expected = run(p, *kernels.tables[0]->attention, p.tokens);
    for (const size_t chunk : {p.tokens, p.tokens / 4, p.tokens - 1}) {  // the last: then one token
        const Result r = run(p, *kernels.tables[0]->attention, chunk, {run_backwards_on_threads, nullptr});
        expect(same(r, expected), "threads change the result", std::to_string(chunk));
    }
}

// A long tail of small shares beside a large one: without carrying, each would round to nothing.
void test_small_shares_count() {
    Problem p(1, 128, 1, 1, 64);
    for (size_t t = 0; t < p.tokens; ++t) {
        for (size_t i = 0; i < p.d; ++i) {
            p.qkv[t * p.width() + i] = i == 31 ? 8.0f : 0.0f;  // the slowest to rotate
            p.qkv[t * p.width() + p.d + i] = i == 31 ? (t == 0 ? 11.0f : 0.0f) : 0.0f;
            p.qkv[t * p.width() + 2 * p.d + i] = t == 0 ? (i % 2 ? 0.01f : -0.01f) : 10.0f;
        }
    }
    for (float& c : p.cos) c = 1.0f;
    for (float& s : p.sin) s = 0.0f;
    check_problem(p, 128);
}

void test_not_a_number_reaches_only_what_sees_it() {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (size_t part = 0; part < 3; ++part) {  // in a query, a key, a value of token 20, KV head 1
            Problem p(1, 150, 4, 2, 64);
            p.qkv[20 * p.width() + (part == 0 ? 2 : part == 1 ? 5 : 7) * p.d + 3] = bad;
            const AvailableKernels& kernels = available_kernels();
            for (size_t i = 0; i < kernels.count; ++i) {
                const Result r = run(p, *kernels.tables[i]->attention, 150);
                bool right = true;
                for (size_t j = 0; j < r.out.size(); ++j) {
                    const size_t token = j / (p.heads * p.d), head = j / p.d % p.heads;
                    const bool sees = part == 0 ? token == 20 && head == 2 : token >= 20 && head >= 2;
                    right = right && std::isnan(r.out[j]) == sees;
                }
                expect(right, "NaN where expected", std::string(kernels.tables[i]->isa) + std::to_string(part));
            }
        }
    }
}

void test_a_failing_parallel_for_is_reported() {
    const Problem p(1, 100, 2, 2, 64);
    std::vector<int8_t> rows(p.tokens * 2 * p.d);
    std::vector<float> scales(p.tokens * 2), out(p.tokens * 2 * p.d);
    const size_t first = 0;
    Attention a = {1,
                   100,
                   2,
                   2,
                   64,
                   100,
                   0.125f,
                   0,
                   nullptr,
                   nullptr,
                   p.cos.data(),
                   p.sin.data(),
                   p.qkv.data(),
                   &first,
                   rows.data(),
                   rows.data(),
                   scales.data(),
                   scales.data(),
                   out.data()};
    expect(!attention(a, kAttentionScalar, {refuse, nullptr}), "a failing parallel-for is reported", "");
    a.tokens = 0;
    expect(attention(a, kAttentionScalar, {refuse, nullptr}), "no tokens is fine", "");
}

}  // namespace

int main() {
    test_sizes();
    test_a_long_text();
    test_threads_do_not_change_the_result(Problem(2, 400, 4, 2, 64));
    test_threads_do_not_change_the_result(Problem(1, 9, 40, 1, 64));  // a token in several pieces of one head
    test_small_shares_count();
    test_not_a_number_reaches_only_what_sees_it();
    test_a_failing_parallel_for_is_reported();
    std::printf("kernels:");
    for (size_t i = 0; i < available_kernels().count; ++i) std::printf(" %s", available_kernels().tables[i]->isa);
    std::printf("\n%d checks, %d failed\n", checks, failures);
    return failures ? 1 : 0;
}
