#include "binary_matmul.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "activation_kernels.h"
#include "token_buffer.h"

namespace fbiedge {
namespace {

// Prepared tokens of a chunk stay in a core's L2 cache (fp32 tables are 11 to 16 bytes an input).
constexpr size_t kChunkBytes = 512 * 1024;
// Work is measured in packed bytes times tokens: 20 KB are about a microsecond. Below kSerialBytes, handing it out
// costs more than it saves. Pieces are about kPieceBytes long, and there are no more than kMostPieces.
constexpr size_t kSerialBytes = 96 * 1024;
constexpr size_t kPieceBytes = 48 * 1024;
constexpr size_t kMostPieces = 64;
constexpr size_t kPieceTiles = 4;            // a multiple of the most tiles that a kernel computes side by side
constexpr size_t kPrepareBytes = 16 * 1024;  // input bytes below which preparing tokens in parallel doesn't pay
constexpr size_t kScratchFloats = kMaxTokens * kPieceTiles * kTileRows;

// A chunk of tokens through a layer.
struct Work {
    const BinaryLayer::Part* parts;
    size_t n_parts;
    size_t preparations;
    const RmsNorm& norm;
    const LevelKernels& level;
    const ActivationKernels& activations;
    const float* x;
    size_t m;
    const float* residual;
    float* y;
    size_t outputs;
    uint8_t* tokens;  // [preparations, preparation_bytes], each [m, token_bytes]; null: each thread has its OwnToken
    size_t token_bytes;
    size_t preparation_bytes;
    size_t tiles_per_piece;
    uint64_t region;            // of the OwnTokens that are this work's
    std::atomic<bool>* failed;  // no memory for an OwnToken
};

size_t row_tiles(const BinaryLayer::Part& part) { return ceil_div(part.matrix.n, kTileRows); }

TokenInput normed_input(const Work& work, size_t index) {
    TokenInput in;
    in.k = work.parts[0].matrix.k;
    in.x = work.x + index * in.k;
    if (work.norm.weight) {
        const float mean = work.activations.sum_of_squares(in.x, in.k) / static_cast<float>(in.k);
        in.multiplier = 1.0f / std::sqrt(mean + work.norm.epsilon);
    }
    return in;
}

void prepare(const Work& work, TokenInput in, size_t preparation, uint8_t* token) {
    in.alpha = work.parts[preparation].input_alpha;
    in.beta = work.parts[preparation].input_beta;
    work.level.prepare(in, token);
}

void prepare_token(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const TokenInput in = normed_input(work, index);
    for (size_t i = 0; i < work.preparations; ++i) {
        prepare(work, in, i, work.tokens + i * work.preparation_bytes + index * work.token_bytes);
    }
}

// A single token is prepared by each thread for itself, as much of it as the thread's pieces take. Nobody waits for
// another's preparation, and none is fetched from another core, which may be far away: where the host had put two cores
// so, what one prepared and the other read cost a tenth of a token's time.
struct OwnToken {
    uint64_t region = 0;
    TokenInput in;
    bool prepared[BinaryLayer::kMaxParts];
    ThreadMemory memory;
};

const uint8_t* own_token(const Work& work, size_t preparation) {
    thread_local OwnToken own;
    if (own.region != work.region) {
        if (!own.memory.reserve(work.preparations * work.token_bytes)) {
            work.failed->store(true, std::memory_order_relaxed);
            return nullptr;
        }
        own.in = normed_input(work, 0);
        std::fill_n(own.prepared, work.preparations, false);
        own.region = work.region;
    }
    uint8_t* const token = own.memory.data() + preparation * work.token_bytes;
    if (!own.prepared[preparation]) prepare(work, own.in, preparation, token);
    own.prepared[preparation] = true;
    return token;
}

uint64_t next_region() {
    static std::atomic<uint64_t> regions{0};
    return regions.fetch_add(1, std::memory_order_relaxed) + 1;
}

// Where the outputs of a range of tiles go: into y, or into a buffer.
struct Target {
    float* y;  // of the first tile's first row
    size_t stride;
};

MultiplyArgs arguments(const Work& work, const BinaryLayer::Part& part, size_t first_tile, size_t n_tiles,
                       const Target& target) {
    const BinaryMatrix& matrix = part.matrix;
    MultiplyArgs args = {};
    args.k = matrix.k;
    args.k_tiles = ceil_div(matrix.k, kTileInputs);
    args.n_tiles = n_tiles;
    args.tiles = matrix.tiles + first_tile * args.k_tiles * kTileBytes;
    args.tokens =
        work.tokens ? work.tokens + part.preparation * work.preparation_bytes : own_token(work, part.preparation);
    args.token_stride_in_bytes = work.token_bytes;
    args.m = work.m;
    const size_t first_row = first_tile * kTileRows;
    if (matrix.form == ScaleForm::kRow) {
        args.row_step = kTileRows;
        args.row_alpha = matrix.alpha + first_row;
        args.row_beta = matrix.beta ? matrix.beta + first_row : nullptr;
    } else if (matrix.form == ScaleForm::kSingle) {
        args.row_alpha = part.single_alpha;
        args.row_beta = matrix.beta ? part.single_beta : nullptr;
    } else if (matrix.form == ScaleForm::kBlock) {
        const size_t value_bytes = matrix.block_fp16 ? sizeof(uint16_t) : sizeof(float);
        const size_t tile_bytes = ceil_div(matrix.k, kGroupInputs) * kTileRows * value_bytes;
        args.block_scales = static_cast<const uint8_t*>(matrix.block) + first_tile * tile_bytes;
        args.block_scales_fp16 = matrix.block_fp16;
    }
    args.add_offset_sum = matrix.form == ScaleForm::kColumn && matrix.beta;
    if (work.residual) {
        args.bias = work.residual + first_row;
        args.bias_stride = work.outputs;
    } else if (matrix.bias) {
        args.bias = matrix.bias + first_row;
    }
    args.y = target.y;
    args.y_stride = target.stride;
    return args;
}

// The last tile when N is not a multiple of 16. Kernels only know whole tiles, so its row values are padded and its
// outputs go through a buffer.
void multiply_partial_tile(const Work& work, const BinaryLayer::Part& part, size_t tile, const Target& target) {
    const size_t rows = part.matrix.n - tile * kTileRows;
    MultiplyArgs args = arguments(work, part, tile, 1, target);
    float alpha[kTileRows] = {}, beta[kTileRows] = {};
    float y[kMaxTokens][kTileRows], bias[kMaxTokens][kTileRows];
    const auto pad = [rows](const float*& values, float* padded) {
        if (!values) return;
        std::memcpy(padded, values, rows * sizeof(float));
        values = padded;
    };
    if (part.matrix.form == ScaleForm::kRow) {
        pad(args.row_alpha, alpha);
        pad(args.row_beta, beta);
    }
    if (args.bias) {
        const size_t biases = args.bias_stride ? work.m : 1;
        for (size_t i = 0; i < biases; ++i) {
            std::fill_n(bias[i], kTileRows, 0.0f);
            std::memcpy(bias[i], args.bias + i * args.bias_stride, rows * sizeof(float));
        }
        args.bias = bias[0];
        args.bias_stride = args.bias_stride ? kTileRows : 0;
    }
    args.y = y[0];
    args.y_stride = kTileRows;
    work.level.multiply(args);
    for (size_t token = 0; token < work.m; ++token) {
        std::memcpy(target.y + token * target.stride, y[token], rows * sizeof(float));
    }
}

// Tiles first..last-1 of one part.
void multiply_tiles(const Work& work, const BinaryLayer::Part& part, size_t first, size_t last, const Target& target) {
    const size_t whole_tiles = part.matrix.n / kTileRows;
    const size_t last_whole = std::min(last, whole_tiles);
    if (!work.tokens && !own_token(work, part.preparation)) return;
    if (first < last_whole) work.level.multiply(arguments(work, part, first, last_whole - first, target));
    if (last <= whole_tiles) return;
    multiply_partial_tile(work, part, whole_tiles, {target.y + (whole_tiles - first) * kTileRows, target.stride});
}

// A range of the tiles of all parts, which lie one after the other.
void concat_piece(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    size_t first = index * work.tiles_per_piece, count = work.tiles_per_piece;
    float* y = work.y;
    for (size_t i = 0; i < work.n_parts && count > 0; ++i) {
        const BinaryLayer::Part& part = work.parts[i];
        const size_t tiles = row_tiles(part);
        if (first < tiles) {
            const size_t last = std::min(first + count, tiles);
            multiply_tiles(work, part, first, last, {y + first * kTileRows, work.outputs});
            count -= last - first;
            first = 0;
        } else {
            first -= tiles;
        }
        y += part.matrix.n;
    }
}

// A range of the gate's tiles and the same of up's. The gate goes to y and up to a buffer, both small enough to stay in
// the cache until they are joined.
void swiglu_piece(void* data, size_t index) {
    const Work& work = *static_cast<const Work*>(data);
    const BinaryLayer::Part &gate = work.parts[0], &up = work.parts[1];
    const size_t end = std::min((index + 1) * work.tiles_per_piece, row_tiles(gate));
    const size_t step = kScratchFloats / (work.m * kTileRows) / kPieceTiles * kPieceTiles;
    float scratch[kScratchFloats];
    for (size_t first = index * work.tiles_per_piece; first < end; first += step) {
        const size_t last = std::min(first + step, end), row = first * kTileRows;
        const size_t rows = std::min(last * kTileRows, gate.matrix.n) - row;
        multiply_tiles(work, gate, first, last, {work.y + row, work.outputs});
        multiply_tiles(work, up, first, last, {scratch, rows});
        for (size_t token = 0; token < work.m; ++token) {
            float* y = work.y + token * work.outputs + row;
            work.activations.silu_multiply(y, scratch + token * rows, y, rows);
        }
    }
}

// Tiles of a piece. An even number of pieces, as two threads are the least that share them.
size_t piece_tiles(size_t tiles, size_t work_bytes) {
    if (work_bytes < kSerialBytes) return tiles;
    const size_t pieces = std::min(ceil_div(work_bytes, 2 * kPieceBytes) * 2, kMostPieces);
    return ceil_div(ceil_div(tiles, pieces), kPieceTiles) * kPieceTiles;
}

}  // namespace

BinaryLayer::BinaryLayer(const BinaryMatrix* parts, size_t count, Join join, const RmsNorm& norm)
    : count_(count), join_(join), norm_(norm) {
    const size_t inputs = parts[0].k;
    for (size_t i = 0; i < count; ++i) {
        const BinaryMatrix& matrix = parts[i];
        Part& part = parts_[i];
        part.matrix = matrix;
        part.input_alpha = part.input_beta = norm.weight;
        part.preparation = 0;
        if (matrix.form == ScaleForm::kColumn) {
            if (norm.weight) folded_.reserve(2 * count * inputs);
            part.input_alpha = folded(matrix.alpha, norm.weight);
            part.input_beta = folded(matrix.beta, norm.weight);
            part.preparation = i;
        } else if (matrix.form == ScaleForm::kSingle) {
            std::fill_n(part.single_alpha, kTileRows, matrix.alpha[0]);
            std::fill_n(part.single_beta, kTileRows, matrix.beta ? matrix.beta[0] : 0.0f);
        }
        preparations_ = std::max(preparations_, part.preparation + 1);
        outputs_ += join == Join::kSwiglu && i > 0 ? 0 : matrix.n;
    }
}

const float* BinaryLayer::folded(const float* factors, const float* gamma) {
    if (!factors || !gamma) return factors;
    const size_t first = folded_.size(), inputs = k();  // within the reserved capacity, so that nothing moves
    for (size_t i = 0; i < inputs; ++i) folded_.push_back(gamma[i] * factors[i]);
    return folded_.data() + first;
}

bool BinaryLayer::run(const KernelTable& kernels, AccuracyLevel accuracy, const float* x, size_t m,
                      const float* residual, float* y, const ParallelFor& parallel) const {
    if (m == 0) return true;
    const LevelKernels& level = level_kernels(kernels, accuracy);
    const size_t token_bytes = level.token_bytes(k());
    const size_t fitting = std::max<size_t>(kChunkBytes / token_bytes / 8 * 8, 8);
    const size_t chunk = std::min({fitting, kMaxTokens, m});
    const bool one = m == 1;
    TokenBuffer tokens(one ? 0 : preparations_ * chunk * token_bytes);
    if (!tokens.data()) return false;
    std::atomic<bool> failed{false};

    Work work = {parts_,
                 count_,
                 preparations_,
                 norm_,
                 level,
                 *kernels.activations,
                 nullptr,
                 0,
                 nullptr,
                 nullptr,
                 outputs_,
                 one ? nullptr : tokens.data(),
                 token_bytes,
                 chunk * token_bytes,
                 0,
                 one ? next_region() : 0,
                 &failed};
    const bool swiglu = join_ == Join::kSwiglu;
    size_t tiles = 0;
    for (size_t i = 0; i < (swiglu ? 1 : count_); ++i) tiles += row_tiles(parts_[i]);
    const size_t tile_row_bytes = ceil_div(k(), kTileInputs) * kTileBytes * (swiglu ? 2 : 1);
    for (size_t first = 0; first < m; first += chunk) {
        work.m = std::min(chunk, m - first);
        work.x = x + first * k();
        work.y = y + first * outputs_;
        work.residual = residual ? residual + first * outputs_ : nullptr;
        const bool small = work.m * k() * sizeof(float) * preparations_ < kPrepareBytes;
        if (!one && !run_pieces(small ? serial() : parallel, work.m, prepare_token, &work)) return false;
        work.tiles_per_piece = piece_tiles(tiles, tiles * tile_row_bytes * work.m);
        const size_t pieces = ceil_div(tiles, work.tiles_per_piece);
        if (!run_pieces(parallel, pieces, swiglu ? swiglu_piece : concat_piece, &work)) return false;
    }
    return !failed.load(std::memory_order_relaxed);
}

}  // namespace fbiedge
