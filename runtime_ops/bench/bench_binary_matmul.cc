// Microbenchmark of the kernels, without ONNX Runtime.
//
//   bench_binary_matmul                         shapes of FBI-LLM 130M, 1.3B and 7B
//   bench_binary_matmul 1x768x768 128x2048x5632 shapes M x N x K
//   bench_binary_matmul --file shapes.txt       one shape a line, # starts a comment
//   options: --isa NAME, --level fp32|int8, --form column|row|single|block, --seconds S a line (0.3), --threads T (1)
//
// GB/s counts packed weight bytes (N * K / 8), GMAC/s multiply-accumulates (M * N * K), both of the fastest of the
// runs: on a shared machine the slower ones measure the neighbours. Each run takes another copy of the weights, so that
// decode reads from memory as it does in a model: copies add up to --megabytes (128). The last line is JSON.
// The limit of decode (M = 1) is what a plain loop reads from those same copies, just before and after; the limit of
// more tokens at the int8 level is the throughput of the ISA's multiplying instruction (limits.h). fp32 has none here:
// its kernels look sums up instead of multiplying. With --threads, each thread prepares the tokens for itself and
// computes its part of the outputs, and reading is measured with as many.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "fbiedge_ops.h"
#include "limits.h"

namespace {

struct Shape {
    size_t m, n, k;
};

struct Options {
    std::vector<Shape> shapes;
    std::string isa, level;
    int form = FBIEDGE_COLUMN;
    double seconds = 0.3;
    double megabytes = 128;
    size_t threads = 1;
};

struct Result {
    std::string isa;
    int level;
    Shape shape;
    double seconds;
    double limit;  // GB/s for M = 1, else GMAC/s; 0: none known
    double share_of_limit() const {
        return limit > 0 ? (shape.m == 1 ? gigabytes_per_second() : gmacs_per_second()) / limit : 0;
    }
    double gigabytes_per_second() const { return double(shape.n) * double(shape.k) / 8e9 / seconds; }
    double gmacs_per_second() const { return double(shape.m) * double(shape.n) * double(shape.k) / 1e9 / seconds; }
};

const char* level_name(int level) { return level == FBIEDGE_FP32 ? "fp32" : "int8"; }

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "bench_binary_matmul: %s\n", message.c_str());
    std::exit(2);
}

Shape parse_shape(const std::string& text) {
    Shape shape;
    char rest;
    if (std::sscanf(text.c_str(), "%zux%zux%zu%c", &shape.m, &shape.n, &shape.k, &rest) != 3 || !shape.m || !shape.n ||
        !shape.k) {
        fail("'" + text + "' is not a shape, expected MxNxK such as 1x768x768");
    }
    return shape;
}

void read_shapes(const std::string& path, std::vector<Shape>& shapes) {
    std::ifstream file(path);
    if (!file) fail("can't read " + path);
    for (std::string line; std::getline(file, line);) {
        line = line.substr(0, line.find('#'));
        const size_t first = line.find_first_not_of(" \t\r");
        if (first == std::string::npos) continue;
        shapes.push_back(parse_shape(line.substr(first, line.find_last_not_of(" \t\r") - first + 1)));
    }
}

Options parse_options(int argc, char** argv) {
    Options options;
    const char* const forms[] = {"column", "row", "single", "block"};
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        if (name.rfind("--", 0) != 0) {
            options.shapes.push_back(parse_shape(name));
            continue;
        }
        if (i + 1 == argc) fail(name + " needs a value");
        const std::string value = argv[++i];
        if (name == "--file") {
            read_shapes(value, options.shapes);
        } else if (name == "--isa") {
            options.isa = value;
        } else if (name == "--level" && (value == "fp32" || value == "int8")) {
            options.level = value;
        } else if (name == "--seconds") {
            options.seconds = std::atof(value.c_str());
        } else if (name == "--megabytes") {
            options.megabytes = std::atof(value.c_str());
        } else if (name == "--threads") {
            options.threads = static_cast<size_t>(std::max(std::atoi(value.c_str()), 1));
        } else if (name == "--form") {
            options.form = -1;
            for (int form = 0; form < 4; ++form) options.form = value == forms[form] ? form : options.form;
            if (options.form < 0) fail("form '" + value + "', expected column, row, single or block");
        } else {
            fail("unknown option " + name + " " + value);
        }
    }
    if (options.shapes.empty()) {
        for (const size_t m : {size_t{1}, size_t{128}}) {
            for (const Shape& s :
                 {Shape{m, 768, 768}, Shape{m, 2048, 768}, Shape{m, 2048, 5632}, Shape{m, 4096, 4096}}) {
                options.shapes.push_back(s);
            }
        }
    }
    return options;
}

// A cache line, as tensors of a model file and of ONNX Runtime start on one.
struct alignas(64) Line {
    uint8_t bytes[64];
};

Result measure(const char* isa, int level, const Shape& shape, const Options& options, double peak, Team& team) {
    std::mt19937 generator(1);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    const size_t bytes = fbiedge_packed_bytes(shape.n, shape.k);
    if (!bytes) fail("shape out of range");
    const size_t copies = shape.m > 1 ? 1 : static_cast<size_t>(options.megabytes * 1e6 / double(bytes)) + 1;
    std::vector<Line> lines(bytes / sizeof(Line) * copies);  // a matrix is a multiple of 64 bytes
    uint8_t* const tiles = lines[0].bytes;
    for (size_t at = 0; at < bytes * copies; at += sizeof(uint32_t)) {
        const auto bits = static_cast<uint32_t>(generator());
        std::memcpy(tiles + at, &bits, sizeof bits);
    }
    std::vector<float> a(shape.m * shape.k), y(shape.m * shape.n);
    for (float& value : a) value = uniform(generator);
    // Enough for every form: block scales are [ceil(N/16), ceil(K/128), 16].
    const std::vector<float> scales((shape.n + 15) / 16 * 16 * ((shape.k + 127) / 128) + shape.n + shape.k, 0.5f);

    fbiedge_matmul_args args = {};
    args.struct_bytes = sizeof args;
    args.isa = isa;
    args.accuracy_level = level;
    args.scale_form = options.form;
    args.m = shape.m;
    args.n = shape.n;
    args.k = shape.k;
    args.a = a.data();
    args.scales = scales.data();
    args.offsets = options.form == FBIEDGE_BLOCK ? nullptr : scales.data();
    args.y = y.data();
    Result result = {isa, level, shape, 1e30, 0};
    const auto read_limit = [&] { return read_gigabytes_per_second(tiles, bytes * copies, team); };
    if (shape.m == 1) {
        result.limit = read_limit();
    } else if (level == FBIEDGE_INT8) {
        result.limit = peak * double(team.size());
    }
    // Thread i computes outputs i * rows ... , whole tiles; y has a column block for each, one after the other.
    const size_t rows = ((shape.n + team.size() - 1) / team.size() + 15) / 16 * 16;
    const size_t row_bytes = bytes / ((shape.n + 15) / 16) / 16;
    const auto compute = [&](const uint8_t* matrix, size_t thread) {
        if (thread * rows >= shape.n) return;
        fbiedge_matmul_args part = args;
        part.n = std::min(rows, shape.n - thread * rows);
        part.b = matrix + thread * rows * row_bytes;
        part.y = y.data() + thread * rows * shape.m;
        if (const int status = fbiedge_matmul(&part)) fail(fbiedge_status_message(status));
    };
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    for (size_t run = 0; run < 2 || std::chrono::duration<double>(Clock::now() - start).count() < options.seconds;
         ++run) {
        const uint8_t* matrix = tiles + run % copies * bytes;
        const auto before = Clock::now();
        team.run([&](size_t thread) { compute(matrix, thread); });
        const double seconds = std::chrono::duration<double>(Clock::now() - before).count();
        if (seconds < result.seconds) result.seconds = seconds;
    }
    if (shape.m == 1) result.limit = std::max(result.limit, read_limit());
    return result;
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv);
    Team team(options.threads);
    std::vector<Result> results;
    std::printf("%-12s %-5s %6s %6s %6s %12s %8s %9s %13s %5s\n", "kernel", "level", "M", "N", "K", "microseconds",
                "GB/s", "GMAC/s", "limit", "share");
    for (int i = 0; i < fbiedge_isa_count(); ++i) {
        const char* isa = fbiedge_isa_name(i);
        // scalar is the reference, two orders of magnitude slower: only on request
        if (options.isa.empty() ? std::strcmp(isa, "scalar") == 0 && fbiedge_isa_count() > 1 : options.isa != isa)
            continue;
        const double peak = int8_peak_gmacs_per_second(isa);
        for (const int level : {FBIEDGE_INT8, FBIEDGE_FP32}) {
            if (!options.level.empty() && options.level != level_name(level)) continue;
            for (const Shape& shape : options.shapes) {
                const Result r = measure(isa, level, shape, options, peak, team);
                std::printf("%-12s %-5s %6zu %6zu %6zu %12.1f %8.2f %9.1f", isa, level_name(level), shape.m, shape.n,
                            shape.k, r.seconds * 1e6, r.gigabytes_per_second(), r.gmacs_per_second());
                if (r.limit > 0) {
                    std::printf(" %6.1f %6s %3.0f %%", r.limit, shape.m == 1 ? "GB/s" : "GMAC/s",
                                100 * r.share_of_limit());
                }
                std::printf("\n");
                std::fflush(stdout);
                results.push_back(r);
            }
        }
    }
    if (results.empty()) fail("kernel '" + options.isa + "' doesn't run here");
    std::printf("{\"version\": \"%s\", \"threads\": %zu, \"results\": [", fbiedge_version(), team.size());
    for (size_t i = 0; i < results.size(); ++i) {
        const Result& r = results[i];
        std::printf(
            "%s{\"kernel\": \"%s\", \"level\": \"%s\", \"m\": %zu, \"n\": %zu, \"k\": %zu, \"seconds\": %.9f, "
            "\"gigabytes_per_second\": %.3f, \"gmacs_per_second\": %.3f, \"limit\": %.3f, \"share_of_limit\": %.4f}",
            i ? ", " : "", r.isa.c_str(), level_name(r.level), r.shape.m, r.shape.n, r.shape.k, r.seconds,
            r.gigabytes_per_second(), r.gmacs_per_second(), r.limit, r.share_of_limit());
    }
    std::printf("]}\n");
    return 0;
}
