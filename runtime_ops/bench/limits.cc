#include "limits.h"

#include <algorithm>
#include <chrono>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
// Only these functions may use the instructions, and they run only where the library said that the machine has them.
#if defined(__GNUC__)
#define FOR_TARGET(features) __attribute__((target(features)))
#else
#define FOR_TARGET(features)
#endif

namespace {

constexpr int kChains = 16;        // independent sums: more than latency times throughput of any of the instructions
constexpr long kRounds = 100'000;  // half a millisecond: short enough to fall between interruptions
constexpr int kPeakRepetitions = 20;
constexpr int kReadRepetitions = 5;
constexpr size_t kSliceBytes = 4 << 20;  // as long as a large matrix, which is what it is compared with

volatile uint64_t sink;  // keeps the compiler from dropping what nobody reads

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

#if defined(__x86_64__) || defined(_M_X64)

FOR_TARGET("avx512f,avx512vnni") double rounds_avx512vnni() {
    const auto start = std::chrono::steady_clock::now();
    const __m512i a_u8x64 = _mm512_set1_epi8(2), b_i8x64 = _mm512_set1_epi8(static_cast<char>(kChains));
    __m512i sums_i32x16[kChains];
    for (int c = 0; c < kChains; ++c) sums_i32x16[c] = _mm512_setzero_si512();
    for (long i = 0; i < kRounds; ++i) {
        for (int c = 0; c < kChains; ++c) sums_i32x16[c] = _mm512_dpbusd_epi32(sums_i32x16[c], a_u8x64, b_i8x64);
    }
    for (int c = 1; c < kChains; ++c) sums_i32x16[0] = _mm512_add_epi32(sums_i32x16[0], sums_i32x16[c]);
    sink = static_cast<uint64_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(sums_i32x16[0])));
    return seconds_since(start);
}

// 8 chains: with the two operands, they fit in the 16 registers.
constexpr int kChainsAvx2 = 8;
FOR_TARGET("avx2") double rounds_avx2() {
    const auto start = std::chrono::steady_clock::now();
    __m256i a_u8x32 = _mm256_set1_epi8(2);
    const __m256i b_i8x32 = _mm256_set1_epi8(1);
    __m256i sums_i16x16[kChainsAvx2];
    for (int c = 0; c < kChainsAvx2; ++c) sums_i16x16[c] = _mm256_setzero_si256();
    for (long i = 0; i < kRounds; ++i) {
        for (int c = 0; c < kChainsAvx2; ++c) {
#if defined(__GNUC__)
            __asm__ volatile("" : "+x"(a_u8x32));  // else the product, always the same, is computed once
#endif
            sums_i16x16[c] = _mm256_add_epi16(sums_i16x16[c], _mm256_maddubs_epi16(a_u8x32, b_i8x32));
        }
    }
    for (int c = 1; c < kChainsAvx2; ++c) sums_i16x16[0] = _mm256_add_epi16(sums_i16x16[0], sums_i16x16[c]);
    sink = static_cast<uint64_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(sums_i16x16[0])));
    return seconds_since(start);
}

#elif defined(__aarch64__)

// With the architecture, because GCC refuses to inline intrinsics of a later one.
FOR_TARGET("arch=armv8.2-a+dotprod") double rounds_neon_dotprod() {
    const auto start = std::chrono::steady_clock::now();
    const int8x16_t a_i8x16 = vdupq_n_s8(2), b_i8x16 = vdupq_n_s8(1);
    int32x4_t sums_i32x4[kChains];
    for (int c = 0; c < kChains; ++c) sums_i32x4[c] = vdupq_n_s32(0);
    for (long i = 0; i < kRounds; ++i) {
        for (int c = 0; c < kChains; ++c) sums_i32x4[c] = vdotq_s32(sums_i32x4[c], a_i8x16, b_i8x16);
    }
    for (int c = 1; c < kChains; ++c) sums_i32x4[0] = vaddq_s32(sums_i32x4[0], sums_i32x4[c]);
    sink = static_cast<uint64_t>(vgetq_lane_s32(sums_i32x4[0], 0));
    return seconds_since(start);
}

FOR_TARGET("arch=armv8.2-a+i8mm") double rounds_neon_i8mm() {
    const auto start = std::chrono::steady_clock::now();
    const int8x16_t a_i8x16 = vdupq_n_s8(2), b_i8x16 = vdupq_n_s8(1);
    int32x4_t sums_i32x4[kChains];
    for (int c = 0; c < kChains; ++c) sums_i32x4[c] = vdupq_n_s32(0);
    for (long i = 0; i < kRounds; ++i) {
        for (int c = 0; c < kChains; ++c) sums_i32x4[c] = vmmlaq_s32(sums_i32x4[c], a_i8x16, b_i8x16);
    }
    for (int c = 1; c < kChains; ++c) sums_i32x4[0] = vaddq_s32(sums_i32x4[0], sums_i32x4[c]);
    sink = static_cast<uint64_t>(vgetq_lane_s32(sums_i32x4[0], 0));
    return seconds_since(start);
}

double rounds_neon() {
    const auto start = std::chrono::steady_clock::now();
    const uint8x16_t table_u8x16 = vdupq_n_u8(1);
    uint8x16_t index_u8x16 = vdupq_n_u8(2);
    uint8x16_t sums_u8x16[kChains];
    for (int c = 0; c < kChains; ++c) sums_u8x16[c] = vdupq_n_u8(0);
    for (long i = 0; i < kRounds; ++i) {
        for (int c = 0; c < kChains; ++c) {
#if defined(__GNUC__)
            __asm__ volatile("" : "+w"(index_u8x16));  // else the lookup, always the same, is done once
#endif
            sums_u8x16[c] = vaddq_u8(sums_u8x16[c], vqtbl1q_u8(table_u8x16, index_u8x16));
        }
    }
    for (int c = 1; c < kChains; ++c) sums_u8x16[0] = vaddq_u8(sums_u8x16[0], sums_u8x16[c]);
    sink = vgetq_lane_u8(sums_u8x16[0], 0);
    return seconds_since(start);
}

#endif

double best_gmacs(double (*rounds)(), int chains, int macs) {
    double best = 1e30;
    for (int i = 0; i < kPeakRepetitions; ++i) {
        const double seconds = rounds();
        if (seconds < best) best = seconds;
    }
    return double(kRounds) * chains * macs / 1e9 / best;
}

void read_all(const uint8_t* data, size_t bytes) {
    constexpr size_t kWords = 32;  // 256 bytes a step
    uint64_t gathered[kWords] = {};
    for (size_t at = 0; at + sizeof gathered <= bytes; at += sizeof gathered) {
        uint64_t words[kWords];
        std::memcpy(words, data + at, sizeof words);
        for (size_t w = 0; w < kWords; ++w) gathered[w] |= words[w];
    }
    uint64_t all = 0;
    for (const uint64_t word : gathered) all |= word;
    sink = all;
}

}  // namespace

double read_gigabytes_per_second(const uint8_t* data, size_t bytes, Team& team) {
    double best = 0.0;
    const size_t slice = std::min(kSliceBytes, bytes);
    const size_t part = slice / team.size();
    for (int i = 0; i < kReadRepetitions; ++i) {
        for (size_t first = 0; first + slice <= bytes; first += slice) {
            const auto start = std::chrono::steady_clock::now();
            team.run([&](size_t thread) { read_all(data + first + thread * part, part); });
            best = std::max(best, double(part * team.size()) / 1e9 / seconds_since(start));
        }
    }
    return best;
}

double int8_peak_gmacs_per_second(const char* isa) {
#if defined(__x86_64__) || defined(_M_X64)
    if (std::strncmp(isa, "avx512", 6) == 0) return best_gmacs(rounds_avx512vnni, kChains, 64);
    if (std::strcmp(isa, "avx2") == 0) return best_gmacs(rounds_avx2, kChainsAvx2, 32);
#elif defined(__aarch64__)
    if (std::strcmp(isa, "neon_i8mm") == 0) return best_gmacs(rounds_neon_i8mm, kChains, 32);
    if (std::strcmp(isa, "neon_dotprod") == 0) return best_gmacs(rounds_neon_dotprod, kChains, 16);
    if (std::strcmp(isa, "neon") == 0) return best_gmacs(rounds_neon, kChains, 32);
#endif
    (void)isa;
    (void)best_gmacs;
    return 0.0;
}
