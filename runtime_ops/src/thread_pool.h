// Threads that wait for short parallel regions, tens of microseconds apart, as decoding a token has them. No ORT.
//
// Handing out a region costs two stores a thread and a few hundred nanoseconds, because workers look for it in a loop
// for a while before they sleep. The caller takes pieces as well, and waits only for workers that hold one: a worker
// that comes late, or that isn't scheduled at all, is not waited for.
//
// Each thread has neighbouring pieces of its own, and takes those of others once it is through. So a core reads memory
// on from where it was, what it prefetches is mostly what it reads next, and its counter mostly stays in its cache.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fbiedge {

class ThreadPool {
  public:
    // `threads` in all, the calling one included. Where the system has no more threads to give, it runs with fewer.
    explicit ThreadPool(size_t threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // Runs fn(data, i) for i = 0..count-1. While one caller's region runs, those of others run on their own thread.
    void run(size_t count, void (*fn)(void*, size_t), void* data);

    // The process's pool of so many threads; it ends with its last user.
    static std::shared_ptr<ThreadPool> shared(size_t threads);

  private:
    // Pieces that one thread takes first, in cache lines of their own (they have 128 bytes on Apple's cores).
    struct alignas(128) Share {
        std::atomic<size_t> next{0};
        size_t end = 0;
    };

    void work(size_t thread);
    template <typename AfterPiece>
    void take_pieces(size_t thread, AfterPiece after_piece);
    bool wait_for_region(uint32_t seen);

    std::mutex one_region_;

    // The region; written while it is closed, read by workers that found it open.
    void (*fn_)(void*, size_t) = nullptr;
    void* data_ = nullptr;
    std::vector<Share> shares_;  // of the caller, then of the workers, and of those that could not be started, unused

    // Each in a cache line of its own: all threads look at the first, and write the others.
    alignas(64) std::atomic<uint32_t> epoch_{0};  // counts regions
    std::atomic<bool> open_{false};
    std::atomic<bool> ending_{false};
    alignas(64) std::atomic<size_t> joined_{0};  // workers that look at the region, or have looked and found it closed

    alignas(64) std::atomic<size_t> sleeping_{0};
    std::mutex sleep_;
    std::condition_variable wake_;

    std::vector<std::thread> workers_;
};

}  // namespace fbiedge
