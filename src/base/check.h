// CHECK: for our own bugs. Stays on in release builds; never reachable from input that a peer or client sent.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace sp::internal {
[[noreturn]] inline void CheckFailed(const char* expr, const char* file, int line) {
  std::fprintf(stderr, "CHECK failed: %s at %s:%d\n", expr, file, line);
  std::abort();
}
}  // namespace sp::internal

#define SP_CHECK(expr) \
  do {                 \
    if (!(expr)) [[unlikely]] ::sp::internal::CheckFailed(#expr, __FILE__, __LINE__); \
  } while (0)
