#include <cstring>

#include "binary_matmul.h"
#include "dispatch.h"
#include "fbiedge_ops.h"

using namespace fbiedge;

namespace {

constexpr size_t kMaxSize = 0x7fffffff;

bool good_size(size_t size) { return size > 0 && size <= kMaxSize; }

int choose_kernels(const char* isa, const KernelTable*& kernels) {
    if (!isa || !*isa) isa = forced_isa();
    kernels = find_kernels(isa);
    if (kernels) return FBIEDGE_OK;
    return is_known_isa(isa) ? FBIEDGE_UNAVAILABLE_ISA : FBIEDGE_UNKNOWN_ISA;
}

int choose_form(const fbiedge_matmul_args& args, BinaryMatrix& matrix) {
    switch (args.scale_form) {
        case FBIEDGE_COLUMN:
            matrix.form = ScaleForm::kColumn;
            break;
        case FBIEDGE_ROW:
            matrix.form = ScaleForm::kRow;
            break;
        case FBIEDGE_SINGLE:
            matrix.form = ScaleForm::kSingle;
            break;
        case FBIEDGE_BLOCK:
            matrix.form = ScaleForm::kBlock;
            matrix.block = args.scales;
            matrix.block_fp16 = args.scales_are_fp16 != 0;
            return args.offsets ? FBIEDGE_BAD_SCALES : FBIEDGE_OK;
        default:
            return FBIEDGE_BAD_SCALES;
    }
    if (args.scales_are_fp16) return FBIEDGE_BAD_SCALES;
    matrix.alpha = static_cast<const float*>(args.scales);
    matrix.beta = args.offsets;
    return FBIEDGE_OK;
}

}  // namespace

const char* fbiedge_version(void) { return FBIEDGE_VERSION; }

const char* fbiedge_status_message(int status) {
    switch (status) {
        case FBIEDGE_OK:
            return "ok";
        case FBIEDGE_NULL_POINTER:
            return "a pointer that must be given is null";
        case FBIEDGE_BAD_SIZE:
            return "K or N is 0 or above 2^31 - 1, or a buffer or struct is too small";
        case FBIEDGE_BAD_SCALES:
            return "unknown scale form, offsets in block form, or fp16 scales outside block form";
        case FBIEDGE_BAD_ACCURACY:
            return "unknown accuracy level; expected 0 (default), 1 (fp32) or 4 (int8)";
        case FBIEDGE_UNKNOWN_ISA:
            return "unknown kernel; expected avx512vbmi, avx512vnni, avx2, neon_i8mm, neon_dotprod, neon or scalar";
        case FBIEDGE_UNAVAILABLE_ISA:
            return "this machine or build can't run that kernel";
        case FBIEDGE_OUT_OF_MEMORY:
            return "out of memory";
        default:
            return "unknown status code";
    }
}

int fbiedge_isa_count(void) { return static_cast<int>(available_kernels().count); }

const char* fbiedge_isa_name(int index) {
    const AvailableKernels& kernels = available_kernels();
    return index >= 0 && static_cast<size_t>(index) < kernels.count ? kernels.tables[index]->isa : nullptr;
}

const char* fbiedge_active_isa(void) {
    const KernelTable* kernels = find_kernels(forced_isa());
    return kernels ? kernels->isa : nullptr;
}

size_t fbiedge_packed_bytes(size_t n, size_t k) {
    return good_size(n) && good_size(k) ? ceil_div(n, kTileRows) * ceil_div(k, kTileInputs) * kTileBytes : 0;
}

int fbiedge_pack(const float* weight, size_t n, size_t k, uint8_t* tiles, size_t tiles_bytes) {
    if (!weight || !tiles) return FBIEDGE_NULL_POINTER;
    const size_t bytes = fbiedge_packed_bytes(n, k);
    if (bytes == 0 || tiles_bytes < bytes) return FBIEDGE_BAD_SIZE;
    const size_t k_tiles = ceil_div(k, kTileInputs);
    std::memset(tiles, 0, bytes);
    for (size_t row = 0; row < n; ++row) {
        for (size_t input = 0; input < k; ++input) {
            const size_t tile = row / kTileRows * k_tiles + input / kTileInputs;
            const size_t byte = 4 * (row % kTileRows) + input % kTileInputs / 8;
            const unsigned bit = weight[row * k + input] >= 0.0f ? 1u : 0u;
            tiles[tile * kTileBytes + byte] |= static_cast<uint8_t>(bit << (input % 8));
        }
    }
    return FBIEDGE_OK;
}

int fbiedge_matmul(const fbiedge_matmul_args* args) {
    if (!args) return FBIEDGE_NULL_POINTER;
    if (args->struct_bytes < sizeof *args) return FBIEDGE_BAD_SIZE;
    if (!good_size(args->n) || !good_size(args->k) || args->m > kMaxSize) return FBIEDGE_BAD_SIZE;
    if (!args->b || !args->scales || (args->m > 0 && (!args->a || !args->y))) return FBIEDGE_NULL_POINTER;
    if (args->accuracy_level != FBIEDGE_DEFAULT && args->accuracy_level != FBIEDGE_FP32 &&
        args->accuracy_level != FBIEDGE_INT8) {
        return FBIEDGE_BAD_ACCURACY;
    }
    BinaryMatrix matrix = {};
    matrix.n = args->n;
    matrix.k = args->k;
    matrix.tiles = args->b;
    matrix.bias = args->bias;
    if (const int status = choose_form(*args, matrix)) return status;
    const KernelTable* kernels;
    if (const int status = choose_kernels(args->isa, kernels)) return status;
    const auto level = args->accuracy_level == FBIEDGE_FP32 ? AccuracyLevel::kFp32 : AccuracyLevel::kInt8;
    const BinaryLayer layer(&matrix, 1);  // without a norm it allocates nothing
    const bool done = layer.run(*kernels, level, args->a, args->m, nullptr, args->y, serial());
    return done ? FBIEDGE_OK : FBIEDGE_OUT_OF_MEMORY;
}
