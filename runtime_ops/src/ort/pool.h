// The threads of a session as the library's parallel-for: its own, or ONNX Runtime's.
#pragma once

#include "../parallel.h"
#include "../thread_pool.h"
#include "api.h"

namespace fbiedge {

class Pool {
  public:
    // Without `own`, ONNX Runtime's threads are used.
    Pool(const OrtApi& api, const OrtKernelContext* context, ThreadPool* own)
        : api_(api), context_(context), own_(own) {}
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    ParallelFor parallel() { return {run, this}; }

    // For work that returned false: the pool's error, or that memory ran out. Throws OpError, which begins with `who`.
    [[noreturn]] void fail(const std::string& who);

  private:
    static bool run(void* pool, size_t count, void (*fn)(void*, size_t), void* data);

    const OrtApi& api_;
    const OrtKernelContext* context_;
    ThreadPool* own_;
    OrtStatus* status_ = nullptr;  // of the run that failed
};

}  // namespace fbiedge
