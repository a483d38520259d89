# Cross-compiles with the clang inside zig, which carries the C and C++ libraries of every system (pip install ziglang):
#   cmake -S runtime_ops -DCMAKE_TOOLCHAIN_FILE=cmake/zig.cmake -DFBIEDGE_ZIG_TARGET=aarch64-linux-gnu.2.17
# The target is processor-system-ABI; its number is the oldest glibc, or the oldest macOS, that the result runs on.
find_program(FBIEDGE_ZIG NAMES zig python-zig DOC "zig's program; python-zig is that of the package" REQUIRED)
set(FBIEDGE_ZIG_TARGET "" CACHE STRING "What to compile for, as zig spells it")
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES FBIEDGE_ZIG FBIEDGE_ZIG_TARGET)

string(REGEX MATCH "^([a-z0-9_]+)-([a-z]+)" matched "${FBIEDGE_ZIG_TARGET}")
set(CMAKE_SYSTEM_PROCESSOR ${CMAKE_MATCH_1})
set(system_linux Linux)
set(system_macos Darwin)
set(system_windows Windows)
set(CMAKE_SYSTEM_NAME ${system_${CMAKE_MATCH_2}})
if(NOT CMAKE_SYSTEM_NAME)
  message(FATAL_ERROR "FBIEDGE_ZIG_TARGET is '${FBIEDGE_ZIG_TARGET}', expected one such as aarch64-linux-gnu.2.17")
endif()

# -s, without symbols, at every call: zig makes its C++ library (minutes, once a target) for each way to link.
set(CMAKE_CXX_COMPILER ${FBIEDGE_ZIG} c++ -target ${FBIEDGE_ZIG_TARGET} -s)
set(FBIEDGE_BUILD_STATIC OFF CACHE BOOL "The archiver of this system knows its own files alone")
