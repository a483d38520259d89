#include "patience.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace fbiedge {
namespace {

// A wait that neither handing out work nor a neighbour in the cache explains; slices of the schedulers are 1 to 4 ms.
constexpr Nanoseconds kSuspiciousWait = 300 * 1000;
// Pieces of one region may differ in length, by far less than this factor.
constexpr Nanoseconds kPiecesOfWait = 8;
constexpr Nanoseconds kShortestPause = 4 * 1000 * 1000;
constexpr Nanoseconds kLongestPause = 512 * 1000 * 1000;
// So long without a wait, and the next one counts as the first again.
constexpr Nanoseconds kForgiven = 250 * 1000 * 1000;

// Read and written without order: threads may see it late, which changes speed and never results.
struct Pause {
    std::atomic<Nanoseconds> until{0};
    std::atomic<Nanoseconds> length{0};  // of the last one
};
Pause pause;

}  // namespace

Nanoseconds now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

bool threads_help(Nanoseconds at) { return at >= pause.until.load(std::memory_order_relaxed); }

void Patience::after_piece() {
    const Nanoseconds end = now();
    longest_ = std::max(longest_, end - last_);
    last_ = end;
}

void Patience::after_region() const {
    const Nanoseconds at = now();
    if (at - last_ <= std::max(kSuspiciousWait, kPiecesOfWait * longest_)) return;
    const bool forgiven = at - pause.until.load(std::memory_order_relaxed) > kForgiven;
    const Nanoseconds doubled = std::min(2 * pause.length.load(std::memory_order_relaxed), kLongestPause);
    const Nanoseconds length = forgiven ? kShortestPause : std::max(doubled, kShortestPause);
    pause.length.store(length, std::memory_order_relaxed);
    pause.until.store(at + length, std::memory_order_relaxed);
}

}  // namespace fbiedge
