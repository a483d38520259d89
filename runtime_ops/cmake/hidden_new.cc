// For macOS by zig, whose linker can't be told what to export. It would export the standard library's operators new and
// delete, which programs may replace and which the system then unites across libraries. These are in their place,
// hidden by the option that compiles this file. All of them must be here: one that is missing would bring the others
// back.

#include <cstdlib>
#include <new>

namespace {

void* allocate(std::size_t size, std::align_val_t alignment) noexcept {
    const std::size_t bytes = static_cast<std::size_t>(alignment);
    void* memory = nullptr;
    const int error = posix_memalign(&memory, bytes < sizeof(void*) ? sizeof(void*) : bytes, size ? size : 1);
    return error ? nullptr : memory;
}

void* or_throw(void* memory) {
    if (!memory) throw std::bad_alloc();
    return memory;
}

constexpr std::align_val_t kUsual = std::align_val_t(__STDCPP_DEFAULT_NEW_ALIGNMENT__);

}  // namespace

void* operator new(std::size_t size) { return or_throw(allocate(size, kUsual)); }
void* operator new[](std::size_t size) { return or_throw(allocate(size, kUsual)); }
void* operator new(std::size_t size, std::align_val_t alignment) { return or_throw(allocate(size, alignment)); }
void* operator new[](std::size_t size, std::align_val_t alignment) { return or_throw(allocate(size, alignment)); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return allocate(size, kUsual); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return allocate(size, kUsual); }
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return allocate(size, alignment);
}
void* operator new[](std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
    return allocate(size, alignment);
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); }
