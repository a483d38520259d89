#include "thread_pool.h"

#include <algorithm>
#include <exception>

#include "patience.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace fbiedge {
namespace {

// How long a worker looks for the next region before it sleeps: longer than what lies between two tokens, so that
// decoding never waits for a sleeper (waking one takes some 50 us), and short enough that an idle program is idle.
constexpr Nanoseconds kSpin = 2 * 1000 * 1000;
constexpr int kLooksPerClock = 64;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    __asm__ volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(size_t threads) : shares_(std::max<size_t>(threads, 1)) {
    try {
        workers_.reserve(shares_.size() - 1);
        for (size_t thread = 1; thread < shares_.size(); ++thread) {
            workers_.emplace_back([this, thread] { work(thread); });
        }
    } catch (const std::exception&) {
        return;  // no more threads, or no memory for one: works with what it got
    }
}

ThreadPool::~ThreadPool() {
    ending_.store(true);
    {
        const std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(size_t count, void (*fn)(void*, size_t), void* data) {
    const Nanoseconds begin = now();
    std::unique_lock<std::mutex> lock(one_region_, std::defer_lock);
    if (workers_.empty() || count < 2 || !threads_help(begin) || !lock.try_lock()) {
        for (size_t i = 0; i < count; ++i) fn(data, i);
        return;
    }
    fn_ = fn;
    data_ = data;
    const size_t shares = workers_.size() + 1;
    // Rounded up: where pieces are fewer than threads, the caller has one, by which it measures how long others may
    // take.
    const auto first = [count, shares](size_t share) { return (count * share + shares - 1) / shares; };
    for (size_t i = 0; i < shares; ++i) {
        shares_[i].next.store(first(i), std::memory_order_relaxed);
        shares_[i].end = first(i + 1);
    }
    open_.store(true);
    epoch_.fetch_add(1);
    if (sleeping_.load() > 0) {
        const std::lock_guard<std::mutex> sleepers(sleep_);
        wake_.notify_all();
    }
    Patience patience(begin);
    take_pieces(0, [&patience] { patience.after_piece(); });
    open_.store(false);
    while (joined_.load() != 0) relax();
    patience.after_region();
}

// The thread's own share, then what is left of the others'.
template <typename AfterPiece>
void ThreadPool::take_pieces(size_t thread, AfterPiece after_piece) {
    const size_t shares = workers_.size() + 1;
    for (size_t i = 0; i < shares; ++i) {
        Share& share = shares_[(thread + i) % shares];
        // A look writes nothing, which matters to many threads at the end of a region.
        if (share.next.load(std::memory_order_relaxed) >= share.end) continue;
        for (size_t piece; (piece = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
            fn_(data_, piece);
            after_piece();
        }
    }
}

// A worker counts itself before it looks whether the region is open, and the caller closes the region before it looks
// at the count: so either the worker sees it closed, or the caller sees the worker. All of this in the one order that
// sequentially consistent operations have.
void ThreadPool::work(size_t thread) {
    for (uint32_t seen = 0; wait_for_region(seen);) {
        seen = epoch_.load();
        joined_.fetch_add(1);
        if (open_.load()) take_pieces(thread, [] {});
        joined_.fetch_sub(1);
    }
}

// False when the pool ends.
bool ThreadPool::wait_for_region(uint32_t seen) {
    const Nanoseconds begin = now();
    do {
        for (int i = 0; i < kLooksPerClock; ++i) {
            if (epoch_.load() != seen) return true;
            if (ending_.load()) return false;
            relax();
        }
    } while (now() - begin < kSpin);
    std::unique_lock<std::mutex> lock(sleep_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [this, seen] { return epoch_.load() != seen || ending_.load(); });
    sleeping_.fetch_sub(1);
    return !ending_.load();
}

std::shared_ptr<ThreadPool> ThreadPool::shared(size_t threads) {
    struct Entry {
        size_t threads;
        std::weak_ptr<ThreadPool> pool;
    };
    static std::mutex& mutex = *new std::mutex;
    static std::vector<Entry>& entries = *new std::vector<Entry>;
    const std::lock_guard<std::mutex> lock(mutex);
    entries.erase(std::remove_if(entries.begin(), entries.end(), [](const Entry& e) { return e.pool.expired(); }),
                  entries.end());
    for (const Entry& entry : entries) {
        if (std::shared_ptr<ThreadPool> pool = entry.threads == threads ? entry.pool.lock() : nullptr) return pool;
    }
    auto pool = std::make_shared<ThreadPool>(threads);
    entries.push_back({threads, pool});
    return pool;
}

}  // namespace fbiedge
