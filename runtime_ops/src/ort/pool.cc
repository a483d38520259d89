#include "pool.h"

namespace fbiedge {

Pool::~Pool() {
    if (status_) api_.ReleaseStatus(status_);
}

bool Pool::run(void* data, size_t count, void (*fn)(void*, size_t), void* fn_data) {
    Pool& pool = *static_cast<Pool*>(data);
    pool.status_ = pool.api_.KernelContext_ParallelFor(pool.context_, fn, count, 0, fn_data);
    return !pool.status_;
}

void Pool::fail(const std::string& who) {
    OrtStatus* status = status_;
    status_ = nullptr;
    throw OpError{who + ": " + (status ? take_message(api_, status) : "out of memory")};
}

}  // namespace fbiedge
