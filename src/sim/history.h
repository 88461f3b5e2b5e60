// Histories from seeds: make, run, shrink, report.
#pragma once

#include <string>

#include "sim/world.h"

namespace sp::sim {

struct Outcome {
  std::string violation;  // Empty: every invariant held.
  uint64_t trace = 0, acknowledged = 0, restores = 0, durable = 0, resumed = 0, deleted = 0;
  size_t failed_at = 0;   // Index of the operation; ops.size() means at the end.
};

std::vector<Op> MakeHistory(uint64_t seed, size_t operations);
Outcome RunHistory(const WorldConfig& config, const std::vector<Op>& ops);
// The shortest part of `ops` that was found to break the same invariant.
std::vector<Op> Shrink(const WorldConfig& config, std::vector<Op> ops, const std::string& violation);

struct Tally {
  uint64_t histories = 0, operations = 0, acknowledged = 0, restores = 0, durable = 0, resumed = 0, deleted = 0, twins = 0;
  std::string report;  // Of the first violation: seed, invariant, shrunk history. Empty: none.
};
// Seeds first..first+count-1; stops at the first violation. Every hundredth is run twice and must leave the same trace.
Tally RunSeeds(uint64_t first, uint64_t count, size_t operations);

}  // namespace sp::sim
