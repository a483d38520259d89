// ONNX Runtime's thread pool as the library's parallel-for, used only while it helps.
//
// A parallel region ends when its slowest thread does. When another process takes a core away from one of them in the
// middle of a piece, the rest wait until it is scheduled again: milliseconds, against microseconds of work, and
// decoding falls to a quarter of its speed. So the pool watches how long the calling thread waits after its own last
// piece. After a wait that the work can't explain, regions run on the calling thread alone for a while, each time
// longer while it goes on happening; then the pool is tried again. The state is the process's, as is what it measures.
#pragma once

#include "../binary_matmul.h"
#include "api.h"

namespace fbiedge {

class Pool {
  public:
    Pool(const OrtApi& api, const OrtKernelContext* context) : api_(api), context_(context) {}
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
    OrtStatus* status_ = nullptr;  // of the run that failed
};

}  // namespace fbiedge
