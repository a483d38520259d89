#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace fbiedge {
namespace {

using Nanoseconds = int64_t;

// A wait that neither handing out work nor a neighbour in the cache explains; slices of the schedulers are 1 to 4 ms.
constexpr Nanoseconds kSuspiciousWait = 300 * 1000;
// Pieces of one region may differ in length, by far less than this factor.
constexpr Nanoseconds kPiecesOfWait = 8;
constexpr Nanoseconds kShortestPause = 4 * 1000 * 1000;
constexpr Nanoseconds kLongestPause = 512 * 1000 * 1000;
// So long without a wait, and the next one counts as the first again.
constexpr Nanoseconds kForgiven = 250 * 1000 * 1000;

Nanoseconds now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

// Read and written without order: threads may see it late, which changes speed and never results.
struct Pause {
    std::atomic<Nanoseconds> until{0};
    std::atomic<Nanoseconds> length{0};  // of the last one
};
Pause pause;

void after_wait(Nanoseconds at) {
    const Nanoseconds last_end = pause.until.load(std::memory_order_relaxed);
    const Nanoseconds last_length = pause.length.load(std::memory_order_relaxed);
    const bool forgiven = at - last_end > kForgiven;
    const Nanoseconds length = forgiven ? kShortestPause : std::min(2 * last_length, kLongestPause);
    pause.length.store(std::max(length, kShortestPause), std::memory_order_relaxed);
    pause.until.store(at + length, std::memory_order_relaxed);
}

struct Region {
    void (*fn)(void*, size_t);
    void* data;
    const void* caller;       // address of the calling thread's marker
    Nanoseconds last;         // when the calling thread began or ended its last piece
    Nanoseconds longest = 0;  // of its pieces
};

thread_local char thread_marker;

void run_piece(void* data, size_t index) {
    Region& region = *static_cast<Region*>(data);
    region.fn(region.data, index);
    if (region.caller != &thread_marker) return;
    const Nanoseconds end = now();
    region.longest = std::max(region.longest, end - region.last);
    region.last = end;
}

}  // namespace

Pool::~Pool() {
    if (status_) api_.ReleaseStatus(status_);
}

bool Pool::run(void* data, size_t count, void (*fn)(void*, size_t), void* fn_data) {
    Pool& pool = *static_cast<Pool*>(data);
    const Nanoseconds begin = now();
    if (begin < pause.until.load(std::memory_order_relaxed)) {
        for (size_t i = 0; i < count; ++i) fn(fn_data, i);
        return true;
    }
    Region region = {fn, fn_data, &thread_marker, begin};
    pool.status_ = pool.api_.KernelContext_ParallelFor(pool.context_, run_piece, count, 0, &region);
    const Nanoseconds end = now();
    if (end - region.last > std::max(kSuspiciousWait, kPiecesOfWait * region.longest)) after_wait(end);
    return !pool.status_;
}

void Pool::fail(const std::string& who) {
    OrtStatus* status = status_;
    status_ = nullptr;
    throw OpError{who + ": " + (status ? take_message(api_, status) : "out of memory")};
}

}  // namespace fbiedge
