// Microbenchmark of MatMulNBits, on one thread, without ONNX Runtime.
//
//   bench_matmul_nbits                          heads of FBI-LLM 130M, 1.3B and 7B
//   bench_matmul_nbits 1x32000x768              shapes M x N x K
//   options: --isa NAME, --level fp32|int8, --bits 4|8, --seconds S a line (0.3)
//
// GB/s counts the bytes of the matrix, codes and scales, GMAC/s multiply-accumulates, both of the fastest of the runs.
// Up to 4 tokens are held against a plain loop that reads the same memory; each run takes another copy of the matrix,
// 256 MB of them, as the rest of a model would have displaced it from the caches. More tokens at the int8 level are
// held against the ISA's multiplying instruction (limits.h). The last line is JSON.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"
#include "limits.h"
#include "matmul_nbits.h"

using namespace fbiedge;

namespace {

constexpr double kMegabytes = 256;

struct Shape {
    size_t m, n, k;
};

struct Options {
    std::vector<Shape> shapes;
    std::string isa, level;
    unsigned bits = 0;
    double seconds = 0.3;
};

struct Result {
    std::string isa;
    AccuracyLevel level;
    unsigned bits;
    Shape shape;
    size_t bytes;
    double seconds;
    double limit;  // GB/s up to 4 tokens, else GMAC/s; 0: none known
    bool reads() const { return shape.m <= 4; }
    double gigabytes_per_second() const { return double(bytes) / 1e9 / seconds; }
    double gmacs_per_second() const { return double(shape.m) * double(shape.n) * double(shape.k) / 1e9 / seconds; }
    double share_of_limit() const {
        return limit > 0 ? (reads() ? gigabytes_per_second() : gmacs_per_second()) / limit : 0;
    }
};

const char* level_name(AccuracyLevel level) { return level == AccuracyLevel::kFp32 ? "fp32" : "int8"; }

[[noreturn]] void fail(const std::string& message) {
    std::fprintf(stderr, "bench_matmul_nbits: %s\n", message.c_str());
    std::exit(2);
}

Options parse_options(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        Shape shape;
        char rest;
        if (std::sscanf(argv[i], "%zux%zux%zu%c", &shape.m, &shape.n, &shape.k, &rest) == 3) {
            options.shapes.push_back(shape);
            continue;
        }
        if (i + 1 == argc) fail(name + " is no shape MxNxK, or needs a value");
        const std::string value = argv[++i];
        if (name == "--isa") {
            options.isa = value;
        } else if (name == "--level" && (value == "fp32" || value == "int8")) {
            options.level = value;
        } else if (name == "--bits" && (value == "4" || value == "8")) {
            options.bits = static_cast<unsigned>(std::atoi(value.c_str()));
        } else if (name == "--seconds") {
            options.seconds = std::atof(value.c_str());
        } else {
            fail("unknown option " + name + " " + value);
        }
    }
    if (options.shapes.empty()) {
        options.shapes = {{1, 32000, 768}, {4, 32000, 768}, {128, 32000, 768}, {1, 32000, 2048}, {1, 32000, 4096}};
    }
    return options;
}

Result measure(const KernelTable& table, AccuracyLevel level, unsigned bits, const Shape& shape, double seconds,
               double peak) {
    std::mt19937 generator(1);
    const size_t groups = ceil_div(shape.k, kGroupInputs), group_bytes = nbits_group_bytes(bits);
    const size_t bytes = ceil_div(shape.n, kTileRows) * groups * group_bytes;
    if (!bytes || !shape.m) fail("shape out of range");
    Result result = {table.isa, level, bits, shape, bytes, 1e30, 0};
    const size_t copies = result.reads() ? static_cast<size_t>(kMegabytes * 1e6 / double(bytes)) + 1 : 1;
    std::vector<uint8_t> tiles(bytes * copies + kAlignment);
    uint8_t* const first = tiles.data() + kAlignment - reinterpret_cast<uintptr_t>(tiles.data()) % kAlignment;
    for (size_t at = 0; at < bytes * copies; at += sizeof(uint32_t)) {  // small fp16 numbers as scales
        const uint32_t random = static_cast<uint32_t>(generator()) & (at % group_bytes < 128 ? 0x0fff0fffu : ~0u);
        std::memcpy(first + at, &random, sizeof random);
    }
    std::vector<float> x(shape.m * shape.k), y(shape.m * shape.n);
    for (float& value : x) value = static_cast<float>(generator()) / 4e9f - 0.5f;
    Team alone(1);
    const auto read_limit = [&] { return read_gigabytes_per_second(first, bytes * copies, alone); };
    if (result.reads()) {
        result.limit = read_limit();
    } else if (level == AccuracyLevel::kInt8) {
        result.limit = peak;
    }
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    for (size_t run = 0; run < 2 || std::chrono::duration<double>(Clock::now() - start).count() < seconds; ++run) {
        const NBitsMatrix matrix = {shape.n, shape.k, bits, first + run % copies * bytes};
        const auto before = Clock::now();
        if (!matmul_nbits(matrix, nbits_level_kernels(table, level), x.data(), shape.m, y.data(), serial())) {
            fail("out of memory");
        }
        result.seconds = std::min(result.seconds, std::chrono::duration<double>(Clock::now() - before).count());
    }
    if (result.reads()) result.limit = std::max(result.limit, read_limit());
    return result;
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv);
    std::vector<Result> results;
    std::printf("%-12s %-5s %4s %6s %6s %6s %12s %8s %9s %13s %5s\n", "kernel", "level", "bits", "M", "N", "K",
                "microseconds", "GB/s", "GMAC/s", "limit", "share");
    const AvailableKernels& kernels = available_kernels();
    for (size_t i = 0; i < kernels.count; ++i) {
        const KernelTable& table = *kernels.tables[i];
        // scalar is the reference, two orders of magnitude slower: only on request
        if (options.isa.empty() ? std::strcmp(table.isa, "scalar") == 0 && kernels.count > 1 : options.isa != table.isa)
            continue;
        const double peak = int8_peak_gmacs_per_second(table.isa);
        for (const AccuracyLevel level : {AccuracyLevel::kInt8, AccuracyLevel::kFp32}) {
            if (!options.level.empty() && options.level != level_name(level)) continue;
            for (const unsigned bits : {8u, 4u}) {
                if (options.bits && options.bits != bits) continue;
                for (const Shape& shape : options.shapes) {
                    const Result r = measure(table, level, bits, shape, options.seconds, peak);
                    std::printf("%-12s %-5s %4u %6zu %6zu %6zu %12.1f %8.2f %9.1f", table.isa, level_name(level), bits,
                                shape.m, shape.n, shape.k, r.seconds * 1e6, r.gigabytes_per_second(),
                                r.gmacs_per_second());
                    if (r.limit > 0) {
                        std::printf(" %6.1f %6s %3.0f %%", r.limit, r.reads() ? "GB/s" : "GMAC/s",
                                    100 * r.share_of_limit());
                    }
                    std::printf("\n");
                    std::fflush(stdout);
                    results.push_back(r);
                }
            }
        }
    }
    if (results.empty()) fail("kernel '" + options.isa + "' doesn't run here");
    std::printf("{\"results\": [");
    for (size_t i = 0; i < results.size(); ++i) {
        const Result& r = results[i];
        std::printf(
            "%s{\"kernel\": \"%s\", \"level\": \"%s\", \"bits\": %u, \"m\": %zu, \"n\": %zu, \"k\": %zu, "
            "\"seconds\": %.9f, \"gigabytes_per_second\": %.3f, \"gmacs_per_second\": %.3f, \"limit\": %.3f, "
            "\"share_of_limit\": %.4f}",
            i ? ", " : "", r.isa.c_str(), level_name(r.level), r.bits, r.shape.m, r.shape.n, r.shape.k, r.seconds,
            r.gigabytes_per_second(), r.gmacs_per_second(), r.limit, r.share_of_limit());
    }
    std::printf("]}\n");
    return 0;
}
