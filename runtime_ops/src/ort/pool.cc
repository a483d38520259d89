#include "pool.h"

#include "../patience.h"

namespace fbiedge {
namespace {

struct Region {
    void (*fn)(void*, size_t);
    void* data;
    const void* caller;  // address of the calling thread's marker
    Patience patience;
};

thread_local char thread_marker;

void run_piece(void* data, size_t index) {
    Region& region = *static_cast<Region*>(data);
    region.fn(region.data, index);
    if (region.caller == &thread_marker) region.patience.after_piece();
}

}  // namespace

Pool::~Pool() {
    if (status_) api_.ReleaseStatus(status_);
}

bool Pool::run(void* data, size_t count, void (*fn)(void*, size_t), void* fn_data) {
    Pool& pool = *static_cast<Pool*>(data);
    if (pool.own_) {
        pool.own_->run(count, fn, fn_data);
        return true;
    }
    const Nanoseconds begin = now();
    if (!threads_help(begin)) {
        for (size_t i = 0; i < count; ++i) fn(fn_data, i);
        return true;
    }
    Region region = {fn, fn_data, &thread_marker, Patience(begin)};
    pool.status_ = pool.api_.KernelContext_ParallelFor(pool.context_, run_piece, count, 0, &region);
    region.patience.after_region();
    return !pool.status_;
}

void Pool::fail(const std::string& who) {
    OrtStatus* status = status_;
    status_ = nullptr;
    throw OpError{who + ": " + (status ? take_message(api_, status) : "out of memory")};
}

}  // namespace fbiedge
