// Threads that start work together and wait spinning, so that microseconds of work can be timed.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <thread>
#include <vector>

class Team {
  public:
    explicit Team(size_t size) {
        for (size_t i = 1; i < size; ++i) threads_.emplace_back([this, i] { work(i); });
    }

    ~Team() {
        run({});
        for (std::thread& thread : threads_) thread.join();
    }

    size_t size() const { return threads_.size() + 1; }

    // Calls fn(i) on thread i, for all i at once, and returns when all are done. The caller is thread 0.
    void run(const std::function<void(size_t)>& fn) {
        fn_ = fn;
        running_.store(threads_.size(), std::memory_order_relaxed);
        round_.fetch_add(1, std::memory_order_release);
        if (fn) fn(0);
        while (running_.load(std::memory_order_acquire) != 0) {
        }
    }

  private:
    void work(size_t index) {
        for (size_t round = 1;; ++round) {
            while (round_.load(std::memory_order_acquire) < round) {
            }
            const bool last = !fn_;
            if (!last) fn_(index);
            running_.fetch_sub(1, std::memory_order_release);
            if (last) return;
        }
    }

    std::function<void(size_t)> fn_;  // empty: threads end
    std::atomic<size_t> round_{0}, running_{0};
    std::vector<std::thread> threads_;
};
