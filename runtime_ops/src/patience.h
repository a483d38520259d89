// When to stop waiting for other threads. No ORT, no intrinsics.
//
// A parallel region ends when its slowest thread does. When another process takes a core away from one of them in the
// middle of a piece, the rest wait until it is scheduled again: milliseconds, against microseconds of work, and
// decoding falls to a quarter of its speed. So the calling thread notes how long it waits after its own last piece.
// After a wait that the work can't explain, regions run on the calling thread alone for a while, each time longer while
// it goes on happening; then threads are tried again. The state is the process's, as is what it measures.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fbiedge {

using Nanoseconds = int64_t;

Nanoseconds now();

// Whether a region that begins at `at` should use other threads.
bool threads_help(Nanoseconds at);

// A region as the calling thread sees it.
class Patience {
  public:
    explicit Patience(Nanoseconds begin) : last_(begin) {}

    // The calling thread has ended a piece.
    void after_piece();

    // The region has ended.
    void after_region() const;

  private:
    Nanoseconds last_;  // when the calling thread began or ended its last piece
    Nanoseconds longest_ = 0;
};

}  // namespace fbiedge
