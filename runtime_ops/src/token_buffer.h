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

}  // namespace fbiedge
