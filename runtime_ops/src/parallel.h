// Work cut into pieces that threads can share. No ORT, no threads: who has them brings them.
#pragma once

#include <cstddef>

namespace fbiedge {

// Runs fn(data, i) for i = 0..count-1, on any threads in any order; returns false when it could not.
struct ParallelFor {
    bool (*run)(void* context, size_t count, void (*fn)(void* data, size_t i), void* data);
    void* context;
};

inline bool run_serially(void*, size_t count, void (*fn)(void*, size_t), void* data) {
    for (size_t i = 0; i < count; ++i) fn(data, i);
    return true;
}
inline ParallelFor serial() { return {run_serially, nullptr}; }

// A single piece isn't worth handing out.
inline bool run_pieces(const ParallelFor& parallel, size_t count, void (*fn)(void*, size_t), void* data) {
    return (count > 1 ? parallel : serial()).run(parallel.context, count, fn, data);
}

}  // namespace fbiedge
