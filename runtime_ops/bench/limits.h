// What this machine could do at best, the measures that the microbenchmark holds kernels against.
#pragma once

#include <cstddef>
#include <cstdint>

#include "team.h"

// Bytes a second that a plain loop over `bytes` of memory reads, in GB/s: the fastest slice of a few passes, as kernels
// are given by their fastest run. Each thread of the team reads its part of a slice. `bytes` beyond the last-level
// cache measure memory.
double read_gigabytes_per_second(const uint8_t* data, size_t bytes, Team& team);

// Multiply-accumulates a second, in GMAC/s, of the instruction that `isa` multiplies int8 with, on registers alone:
//   avx512vnni  vpdpbusd, 64 at a time      avx2  vpmaddubsw and the vpaddw that gathers it, 32 at a time
//   avx512vbmi  likewise; it looks up instead, which is faster

//   neon_i8mm   smmla, 32 at a time         neon_dotprod  sdot, 16 at a time
//   neon        tbl and the add that gathers it, two of each for 64      0 for scalar: no such instruction
double int8_peak_gmacs_per_second(const char* isa);
