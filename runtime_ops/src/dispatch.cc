#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "kernels/tables.h"

#if defined(FBIEDGE_X86)
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(FBIEDGE_ARM64)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif
#endif

namespace fbiedge {
namespace {

#if defined(FBIEDGE_X86)

struct Registers {
    unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf) {
    Registers r = {0, 0, 0, 0};
#if defined(_MSC_VER)
    int values[4];
    __cpuid(values, 0);
    if (static_cast<unsigned>(values[0]) < leaf) return r;
    __cpuidex(values, static_cast<int>(leaf), 0);
    r = {static_cast<unsigned>(values[0]), static_cast<unsigned>(values[1]), static_cast<unsigned>(values[2]),
         static_cast<unsigned>(values[3])};
#else
    __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

// The registers that the operating system saves at a context switch. Without it, using wide registers corrupts state
// although CPUID says that the processor has them.
unsigned saved_registers() {
#if defined(_MSC_VER)
    return static_cast<unsigned>(_xgetbv(0));
#else
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
}

bool all(unsigned value, unsigned mask) { return (value & mask) == mask; }

void detect(bool& avx2, bool& avx512vnni, bool& avx512vbmi) {
    avx2 = avx512vnni = avx512vbmi = false;
    const Registers leaf1 = cpuid(1), leaf7 = cpuid(7);
    const unsigned osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29;
    if (!all(leaf1.c, osxsave | avx | f16c)) return;
    const unsigned saved = saved_registers();
    avx2 = all(saved, 0x06) && all(leaf7.b, 1u << 5);
    const unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, vnni = 1u << 11;
    avx512vnni = avx2 && all(saved, 0xe6) && all(leaf7.b, f | dq | bw | vl) && all(leaf7.c, vnni);
    avx512vbmi = avx512vnni && all(leaf7.c, 1u << 1);
}

#elif defined(FBIEDGE_ARM64)

void detect(bool& dotprod, bool& i8mm) {
    dotprod = i8mm = false;
#if defined(__linux__)
    const unsigned long asimddp = 1ul << 20, i8mm_bit = 1ul << 13;  // HWCAP_ASIMDDP, HWCAP2_I8MM
    dotprod = (getauxval(AT_HWCAP) & asimddp) != 0;
    i8mm = dotprod && (getauxval(AT_HWCAP2) & i8mm_bit) != 0;
#elif defined(__APPLE__)
    const auto has = [](const char* name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    dotprod = has("hw.optional.arm.FEAT_DotProd");
    i8mm = dotprod && has("hw.optional.arm.FEAT_I8MM");
#elif defined(_WIN32)
    const DWORD dotprod_feature = 43, i8mm_feature = 66;  // PF_ARM_V82_{DP,I8MM}_INSTRUCTIONS_AVAILABLE
    dotprod = IsProcessorFeaturePresent(dotprod_feature) != 0;
    i8mm = dotprod && IsProcessorFeaturePresent(i8mm_feature) != 0;
#endif
}

#endif

AvailableKernels detect_kernels() {
    AvailableKernels kernels = {};
#if defined(FBIEDGE_X86)
    bool avx2, avx512vnni, avx512vbmi;
    detect(avx2, avx512vnni, avx512vbmi);
    if (avx512vbmi) kernels.tables[kernels.count++] = &kKernelsAvx512Vbmi;
    if (avx512vnni) kernels.tables[kernels.count++] = &kKernelsAvx512Vnni;
    if (avx2) kernels.tables[kernels.count++] = &kKernelsAvx2;
#elif defined(FBIEDGE_ARM64)
    bool dotprod, i8mm;
    detect(dotprod, i8mm);
    if (i8mm) kernels.tables[kernels.count++] = &kKernelsNeonI8mm;
    if (dotprod) kernels.tables[kernels.count++] = &kKernelsNeonDotprod;
    kernels.tables[kernels.count++] = &kKernelsNeon;  // every AArch64 has NEON
#endif
    kernels.tables[kernels.count++] = &kKernelsScalar;
    return kernels;
}

}  // namespace

const AvailableKernels& available_kernels() {
    static const AvailableKernels kernels = detect_kernels();
    return kernels;
}

bool is_known_isa(const char* isa) {
    static const char* const names[] = {"avx512vbmi",   "avx512vnni", "avx2",  "neon_i8mm",
                                        "neon_dotprod", "neon",       "scalar"};
    for (const char* name : names) {
        if (std::strcmp(name, isa) == 0) return true;
    }
    return false;
}

const KernelTable* find_kernels(const char* isa) {
    const AvailableKernels& kernels = available_kernels();
    if (!isa || !*isa) return kernels.tables[0];
    for (size_t i = 0; i < kernels.count; ++i) {
        if (std::strcmp(kernels.tables[i]->isa, isa) == 0) return kernels.tables[i];
    }
    return nullptr;
}

const char* forced_isa() {
    const char* isa = std::getenv("FBIEDGE_ISA");
    return isa && *isa ? isa : nullptr;
}

}  // namespace fbiedge
