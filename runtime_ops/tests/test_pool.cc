// Threads: those of an ONNX Runtime made up here, whose second thread is held up on demand, and the library's own.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

#include "../src/ort/pool.h"

namespace {

using namespace fbiedge;
using Clock = std::chrono::steady_clock;

int parallel_calls = 0;
int pieces = 0;
bool hold_up = false;

OrtApi made_up_api() {
    OrtApi api = {};
    api.KernelContext_ParallelFor = [](const OrtKernelContext*, void (*fn)(void*, size_t), size_t count, size_t,
                                       void* data) -> OrtStatus* {
        ++parallel_calls;
        fn(data, 0);
        std::thread other([=] {
            if (hold_up) std::this_thread::sleep_for(std::chrono::milliseconds(5));
            for (size_t i = 1; i < count; ++i) fn(data, i);
        });
        other.join();
        return nullptr;
    };
    return api;
}

void run_region(const OrtApi& api) {
    Pool pool(api, nullptr, nullptr);
    const ParallelFor parallel = pool.parallel();
    pieces = 0;
    parallel.run(parallel.context, 4, [](void*, size_t) { ++pieces; }, nullptr);
}

// Runs regions for at most 10 s, until one does (or doesn't) use the pool.
bool reach(const OrtApi& api, bool uses_pool) {
    for (const auto end = Clock::now() + std::chrono::seconds(10); Clock::now() < end;) {
        const int before = parallel_calls;
        run_region(api);
        if (pieces != 4) return false;
        if ((parallel_calls != before) == uses_pool) return true;
    }
    return false;
}

// Every piece of every region runs once, in regions of many sizes, from two callers at a time.
bool all_pieces_run(ThreadPool& pool, int regions) {
    std::atomic<bool> right{true};
    const auto call = [&] {
        for (int region = 0; region < regions; ++region) {
            const size_t count = static_cast<size_t>(region) % 37;
            std::vector<int> runs(count);
            pool.run(count, [](void* data, size_t i) { ++static_cast<int*>(data)[i]; }, runs.data());
            for (const int times : runs) {
                if (times != 1) right = false;
            }
        }
    };
    std::thread other(call);
    call();
    other.join();
    return right;
}

// A worker that sleeps is woken; one that comes late isn't waited for, and finds nothing left to do.
bool wakes_up(ThreadPool& pool) {
    std::atomic<int> ran{0};
    for (int region = 0; region < 20; ++region) {
        std::this_thread::sleep_for(std::chrono::milliseconds(region % 4 * 2));
        pool.run(3, [](void* data, size_t) { ++*static_cast<std::atomic<int>*>(data); }, &ran);
    }
    return ran == 60;
}

int failed = 0;
void expect(bool ok, const char* what) {
    if (ok) return;
    std::printf("%s\n", what);
    ++failed;
}

}  // namespace

int main() {
    const OrtApi api = made_up_api();
    expect(reach(api, true), "a pool that nothing is known of isn't used");
    hold_up = true;
    expect(reach(api, false), "a pool that keeps the caller waiting is used on and on");
    expect(reach(api, true), "the pool isn't tried again");
    expect(reach(api, false), "waiting again doesn't pause the pool again");
    hold_up = false;
    expect(reach(api, true), "a pool that works again isn't used again");
    for (const size_t threads : {1, 2, 5}) {
        ThreadPool pool(threads);
        expect(all_pieces_run(pool, 2000), "a piece of a region didn't run once");
        expect(wakes_up(pool), "a piece didn't run after a pause");
    }
    expect(ThreadPool::shared(2) != ThreadPool::shared(3), "pools of different sizes are one");
    const std::shared_ptr<ThreadPool> pool = ThreadPool::shared(2);
    expect(pool == ThreadPool::shared(2), "a pool isn't shared");
    std::printf("%d failed\n", failed);
    return failed != 0;
}
