#include "matmul_nbits.h"

#include <algorithm>
#include <cstring>

#include "token_buffer.h"

namespace fbiedge {
namespace {

// Weights of one parallel piece, in bytes times tokens: about 5 us of reading, against ~0.1 us to hand it out.
constexpr size_t kPieceBytes = 128 * 1024;
constexpr size_t kPieceTiles = 4;            // a multiple of the most tiles that a kernel computes side by side
constexpr size_t kPrepareBytes = 16 * 1024;  // input bytes below which preparing tokens in parallel doesn't pay

struct Work {
    const NBitsMatrix& matrix;
    const NBitsLevelKernels& kernels;
    const float* x;
    size_t m;
    float* y;
    uint8_t* tokens;
    size_t token_bytes;
    size_t tiles_per_piece;
};

void prepare_token(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const NBitsMatrix& matrix = work.matrix;
    work.kernels.prepare(work.x + index * matrix.k, matrix.k, matrix.bits, work.tokens + index * work.token_bytes);
}

NBitsMultiplyArgs arguments(const Work& work, size_t first_tile, size_t n_tiles) {
    NBitsMultiplyArgs args = {};
    args.n_tiles = n_tiles;
    args.groups = ceil_div(work.matrix.k, kGroupInputs);
    args.bits = work.matrix.bits;
    args.tiles = work.matrix.tiles + first_tile * args.groups * nbits_group_bytes(args.bits);
    args.tokens = work.tokens;
    args.token_stride_in_bytes = work.token_bytes;
    args.m = work.m;
    args.y = work.y + first_tile * kTileRows;
    args.y_stride = work.matrix.n;
    return args;
}

// The last tile when N is not a multiple of 16: kernels only know whole tiles, so its outputs go through a buffer.
void multiply_partial_tile(const Work& work, size_t tile) {
    const size_t rows = work.matrix.n - tile * kTileRows;
    NBitsMultiplyArgs args = arguments(work, tile, 1);
    float y[kMaxTokens][kTileRows];
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

}  // namespace

bool matmul_nbits(const NBitsMatrix& matrix, const NBitsLevelKernels& kernels, const float* x, size_t m, float* y,
                  const ParallelFor& parallel) {
    if (m == 0) return true;
    const size_t token_bytes = kernels.token_bytes(matrix.k);
    const size_t chunk = std::min(kMaxTokens, m);
    TokenBuffer tokens(chunk * token_bytes);
    if (!tokens.data()) return false;

    Work work = {matrix, kernels, x, 0, y, tokens.data(), token_bytes, 0};
    const size_t n_tiles = ceil_div(matrix.n, kTileRows);
    const size_t tile_bytes = ceil_div(matrix.k, kGroupInputs) * nbits_group_bytes(matrix.bits);
    for (size_t first = 0; first < m; first += chunk) {
        work.m = std::min(chunk, m - first);
        work.x = x + first * matrix.k;
        work.y = y + first * matrix.n;
        const bool small = work.m * matrix.k * sizeof(float) < kPrepareBytes;
        if (!run_pieces(small ? serial() : parallel, work.m, prepare_token, &work)) return false;
        const size_t tiles = ceil_div(kPieceBytes, tile_bytes * work.m);
        work.tiles_per_piece = ceil_div(tiles, kPieceTiles) * kPieceTiles;
        if (!run_pieces(parallel, ceil_div(n_tiles, work.tiles_per_piece), multiply_piece, &work)) return false;
    }
    return true;
}

}  // namespace fbiedge
