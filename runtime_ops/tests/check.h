// What the native tests count and print.
#pragma once

#include <cstdio>
#include <string>

static int failures = 0;
static int checks = 0;

static inline void expect(bool condition, const char* what, const std::string& where) {
    ++checks;
    if (condition) return;
    ++failures;
    std::printf("FAILED: %s (%s)\n", what, where.c_str());
}
