// safepoint_sim --seeds N [--first S] [--operations K]: any number of histories, by hand and nightly. Never part of the product.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base/plant.h"
#include "sim/history.h"

int main(int argc, char** argv) {
  uint64_t seeds = 1000, first = 1, operations = 500;
  for (int i = 1; i + 1 < argc; i += 2) {
    uint64_t* value = std::strcmp(argv[i], "--seeds") == 0        ? &seeds
                      : std::strcmp(argv[i], "--first") == 0      ? &first
                      : std::strcmp(argv[i], "--operations") == 0 ? &operations
                                                                  : nullptr;
    if (!value) {
      std::fprintf(stderr, "usage: safepoint_sim [--seeds N] [--first SEED] [--operations PER_HISTORY]\n");
      return 2;
    }
    *value = std::strtoull(argv[i + 1], nullptr, 10);
  }
  const auto begin = std::chrono::steady_clock::now();
  const sp::sim::Tally t = sp::sim::RunSeeds(first, seeds, operations);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%llu histories, %llu operations, %.1f s (%.0f histories/s), %llu acknowledgements, %llu shards read back, %llu steps durable, "
              "%llu audits of what the store has, %llu steps deleted, %llu twin runs\n",
              static_cast<unsigned long long>(t.histories), static_cast<unsigned long long>(t.operations), seconds,
              static_cast<double>(t.histories) / seconds, static_cast<unsigned long long>(t.acknowledged), static_cast<unsigned long long>(t.restores),
              static_cast<unsigned long long>(t.durable), static_cast<unsigned long long>(t.resumed),
              static_cast<unsigned long long>(t.deleted), static_cast<unsigned long long>(t.twins));
  if (t.report.empty()) return 0;
  std::printf("%s", t.report.c_str());
  return 1;
}
