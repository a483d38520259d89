#include "binary_matmul.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

namespace fbiedge {
namespace {

// Prepared tokens of a chunk stay in a core's L2 cache (fp32 tables are 11 to 16 bytes an input).
constexpr size_t kChunkBytes = 512 * 1024;
// Work of one parallel piece, in packed bytes times tokens: about half a microsecond, against ~0.1 us to hand it out.
constexpr size_t kPieceBytes = 12 * 1024;
constexpr size_t kPieceTiles = 4;            // a multiple of the most tiles that a kernel computes side by side
constexpr size_t kPrepareBytes = 16 * 1024;  // input bytes below which preparing tokens in parallel doesn't pay

struct AlignedDelete {
    void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
};
using AlignedBytes = std::unique_ptr<uint8_t, AlignedDelete>;

AlignedBytes allocate(size_t bytes) {
    return AlignedBytes(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(kAlignment), std::nothrow)));
}

struct Work {
    const BinaryMatrix& matrix;
    const LevelKernels& kernels;
    const float* x;
    size_t m;
    float* y;
    uint8_t* tokens;
    size_t token_bytes;
    size_t tiles_per_piece;
    float single_alpha[kTileRows];
    float single_beta[kTileRows];
};

void prepare_token(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const bool column = work.matrix.form == ScaleForm::kColumn;
    TokenInput in;
    in.x = work.x + index * work.matrix.k;
    in.alpha = column ? work.matrix.alpha : nullptr;
    in.beta = column ? work.matrix.beta : nullptr;
    in.k = work.matrix.k;
    work.kernels.prepare(in, work.tokens + index * work.token_bytes);
}

MultiplyArgs arguments(const Work& work, size_t first_tile, size_t n_tiles) {
    const BinaryMatrix& matrix = work.matrix;
    MultiplyArgs args = {};
    args.k = matrix.k;
    args.k_tiles = ceil_div(matrix.k, kTileInputs);
    args.n_tiles = n_tiles;
    args.tiles = matrix.tiles + first_tile * args.k_tiles * kTileBytes;
    args.tokens = work.tokens;
    args.token_stride_in_bytes = work.token_bytes;
    args.m = work.m;
    const size_t first_row = first_tile * kTileRows;
    if (matrix.form == ScaleForm::kRow) {
        args.row_step = kTileRows;
        args.row_alpha = matrix.alpha + first_row;
        args.row_beta = matrix.beta ? matrix.beta + first_row : nullptr;
    } else if (matrix.form == ScaleForm::kSingle) {
        args.row_alpha = work.single_alpha;
        args.row_beta = matrix.beta ? work.single_beta : nullptr;
    } else if (matrix.form == ScaleForm::kBlock) {
        const size_t value_bytes = matrix.block_fp16 ? sizeof(uint16_t) : sizeof(float);
        const size_t tile_bytes = ceil_div(matrix.k, kGroupInputs) * kTileRows * value_bytes;
        args.block_scales = static_cast<const uint8_t*>(matrix.block) + first_tile * tile_bytes;
        args.block_scales_fp16 = matrix.block_fp16;
    }
    args.add_offset_sum = matrix.form == ScaleForm::kColumn && matrix.beta;
    args.bias = matrix.bias ? matrix.bias + first_row : nullptr;
    args.y = work.y + first_row;
    args.y_stride = matrix.n;
    return args;
}

// The last tile when N is not a multiple of 16. Kernels only know whole tiles, so its row values are padded and its
// outputs go through a buffer.
void multiply_partial_tile(const Work& work, size_t tile) {
    const size_t rows = work.matrix.n - tile * kTileRows;
    MultiplyArgs args = arguments(work, tile, 1);
    float alpha[kTileRows] = {}, beta[kTileRows] = {}, bias[kTileRows] = {};
    float y[kMaxTokens][kTileRows];
    const auto pad = [rows](const float*& values, float* padded) {
        if (!values) return;
        std::memcpy(padded, values, rows * sizeof(float));
        values = padded;
    };
    if (work.matrix.form == ScaleForm::kRow) {
        pad(args.row_alpha, alpha);
        pad(args.row_beta, beta);
    }
    pad(args.bias, bias);
    float* const out = args.y;
    args.y = y[0];
    args.y_stride = kTileRows;
    work.kernels.multiply(args);
    for (size_t token = 0; token < work.m; ++token) {
        std::memcpy(out + token * work.matrix.n, y[token], rows * sizeof(float));
    }
}

void multiply_piece(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const size_t whole_tiles = work.matrix.n / kTileRows;
    const size_t first = index * work.tiles_per_piece;
    const size_t last = std::min(first + work.tiles_per_piece, ceil_div(work.matrix.n, kTileRows));
    const size_t last_whole = std::min(last, whole_tiles);
    if (first < last_whole) work.kernels.multiply(arguments(work, first, last_whole - first));
    if (last > whole_tiles) multiply_partial_tile(work, whole_tiles);
}

bool run(const ParallelFor& parallel, size_t count, void (*fn)(void*, size_t), void* data) {
    if (count > 1) return parallel.run(parallel.context, count, fn, data);
    if (count == 1) fn(data, 0);
    return true;
}

bool run_serially(void*, size_t count, void (*fn)(void*, size_t), void* data) {
    for (size_t i = 0; i < count; ++i) fn(data, i);
    return true;
}

}  // namespace

ParallelFor serial() { return {run_serially, nullptr}; }

bool binary_matmul(const BinaryMatrix& matrix, const LevelKernels& kernels, const float* x, size_t m, float* y,
                   const ParallelFor& parallel) {
    if (m == 0 || matrix.n == 0) return true;
    const size_t token_bytes = kernels.token_bytes(matrix.k);
    const size_t fitting = std::max<size_t>(kChunkBytes / token_bytes / 8 * 8, 8);
    const size_t chunk = std::min({fitting, kMaxTokens, m});
    const AlignedBytes tokens = allocate(chunk * token_bytes);
    if (!tokens) return false;

    Work work = {matrix, kernels, x, 0, y, tokens.get(), token_bytes, 0, {}, {}};
    if (matrix.form == ScaleForm::kSingle) {
        std::fill_n(work.single_alpha, kTileRows, matrix.alpha[0]);
        std::fill_n(work.single_beta, kTileRows, matrix.beta ? matrix.beta[0] : 0.0f);
    }
    const size_t n_tiles = ceil_div(matrix.n, kTileRows);
    const size_t tile_row_bytes = ceil_div(matrix.k, kTileInputs) * kTileBytes;
    for (size_t first = 0; first < m; first += chunk) {
        work.m = std::min(chunk, m - first);
        work.x = x + first * matrix.k;
        work.y = y + first * matrix.n;
        const bool small = work.m * matrix.k * sizeof(float) < kPrepareBytes;
        if (!run(small ? serial() : parallel, work.m, prepare_token, &work)) return false;
        const size_t tiles = ceil_div(kPieceBytes, tile_row_bytes * work.m);
        work.tiles_per_piece = ceil_div(tiles, kPieceTiles) * kPieceTiles;
        if (!run(parallel, ceil_div(n_tiles, work.tiles_per_piece), multiply_piece, &work)) return false;
    }
    return true;
}

}  // namespace fbiedge
