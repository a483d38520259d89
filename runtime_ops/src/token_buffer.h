// Memory of prepared tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "kernel_table.h"

namespace fbiedge {

// On the stack where they fit, as one token of a few thousand inputs does, so that decoding a small model allocates
// nothing.
class TokenBuffer {
  public:
    explicit TokenBuffer(size_t bytes)
        : heap_(bytes > sizeof stack_ ? ::operator new(bytes, std::align_val_t(kAlignment), std::nothrow) : nullptr),
          data_(bytes > sizeof stack_ ? static_cast<uint8_t*>(heap_) : stack_) {}
    ~TokenBuffer() { ::operator delete(heap_, std::align_val_t(kAlignment)); }
    TokenBuffer(const TokenBuffer&) = delete;
    TokenBuffer& operator=(const TokenBuffer&) = delete;
    uint8_t* data() { return data_; }

  private:
    alignas(kAlignment) uint8_t stack_[32 * 1024];
    void* heap_;
    uint8_t* data_;
};

// A thread's own, kept from one use to the next and freed with the thread.
class ThreadMemory {
  public:
    ThreadMemory() = default;
    ~ThreadMemory() { release(); }
    ThreadMemory(const ThreadMemory&) = delete;
    ThreadMemory& operator=(const ThreadMemory&) = delete;

    // At least so many bytes, of any content. False when there is no memory; there is none then.
    bool reserve(size_t bytes) {
        if (bytes <= bytes_) return true;
        release();
        data_ = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(kAlignment), std::nothrow));
        bytes_ = data_ ? bytes : 0;
        return data_;
    }
    uint8_t* data() { return data_; }

  private:
    void release() { ::operator delete(data_, std::align_val_t(kAlignment)); }

    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace fbiedge
