#include "sim/history.h"

#include <algorithm>

namespace sp::sim {
namespace {

// "I-5: ..." -> "I-5"; two failures with the same number count as the same failure while shrinking.
std::string Invariant(const std::string& violation) { return violation.substr(0, violation.find(':')); }

std::string Report(uint64_t seed, const WorldConfig& config, const std::vector<Op>& ops, const Outcome& outcome) {
  const std::vector<Op> shrunk = Shrink(config, ops, outcome.violation);
  const Outcome again = RunHistory(config, shrunk);
  std::string text = "seed " + std::to_string(seed) + ", operation " + std::to_string(outcome.failed_at) + " of " + std::to_string(ops.size()) + ": " +
                     outcome.violation + "\nshrunk to " + std::to_string(shrunk.size()) + " operations (" + again.violation + "):\n";
  for (const Op& op : shrunk) text += "  {" + std::string(OpName(op.kind)) + ", " + std::to_string(op.arg) + "}\n";
  return text;
}

}  // namespace

std::vector<Op> MakeHistory(uint64_t seed, size_t operations) {
  Random random(Mix(seed, 2));
  // A random subset of the faults at random rates.
  std::vector<uint32_t> weight(kOpKinds, 0);
  const auto set = [&](OpKind kind, uint32_t w) { weight[static_cast<size_t>(kind)] = w; };
  const auto fault = [&](OpKind kind, uint32_t most) { set(kind, random.Percent(55) ? static_cast<uint32_t>(1 + random.Below(most)) : 0); };
  set(OpKind::kClient, 600);
  set(OpKind::kDeliver, 80 + static_cast<uint32_t>(random.Below(100)));
  set(OpKind::kJob, 150 + static_cast<uint32_t>(random.Below(150)));
  set(OpKind::kAdvance, 20);
  set(OpKind::kLaunch, 6);
  set(OpKind::kReader, 8);
  set(OpKind::kAudit, 4);
  fault(OpKind::kLeap, 10);
  fault(OpKind::kKill, 8);
  fault(OpKind::kKillLaunch, 5);
  fault(OpKind::kStop, 10);
  fault(OpKind::kScribble, 10);
  fault(OpKind::kDisconnect, 12);
  fault(OpKind::kRepeat, 30);
  fault(OpKind::kGarbage, 20);
  fault(OpKind::kBye, 6);
  fault(OpKind::kKillWorker, 12);
  fault(OpKind::kCompact, 8);
  fault(OpKind::kNoMemory, 6);
  fault(OpKind::kOperator, 4);
  fault(OpKind::kLoseKeeper, 2);
  if (MakeConfig(seed).store) {
    set(OpKind::kWish, 6);
    fault(OpKind::kStore, 10);
    fault(OpKind::kStoreFault, 30);
    fault(OpKind::kTerminate, 2);
  }
  uint32_t total = 0;
  for (uint32_t w : weight) total += w;
  std::vector<Op> ops{{OpKind::kLaunch, static_cast<uint32_t>(random.Next())}};
  while (ops.size() < operations) {
    auto roll = static_cast<uint32_t>(random.Below(total));
    size_t kind = 0;
    while (roll >= weight[kind]) roll -= weight[kind++];
    ops.push_back({static_cast<OpKind>(kind), static_cast<uint32_t>(random.Next())});
  }
  return ops;
}

Outcome RunHistory(const WorldConfig& config, const std::vector<Op>& ops) {
  Outcome outcome;
  World world(config);
  try {
    for (outcome.failed_at = 0; outcome.failed_at < ops.size(); ++outcome.failed_at) world.Run(ops[outcome.failed_at]);
    world.Finish();
  } catch (const Violation& v) {
    outcome.violation = v.what;
  }
  outcome.trace = world.trace();
  outcome.acknowledged = world.acknowledged();
  outcome.restores = world.restores();
  outcome.durable = world.durable();
  outcome.resumed = world.resumed();
  outcome.deleted = world.deleted();
  return outcome;
}

std::vector<Op> Shrink(const WorldConfig& config, std::vector<Op> ops, const std::string& violation) {
  const auto still_fails = [&](const std::vector<Op>& part) { return Invariant(RunHistory(config, part).violation) == Invariant(violation); };
#ifdef SP_PLANT_BUG_all
  int budget = 0;  // That the bug is noticed is all that matters.
#else
  int budget = 3000;  // Runs; what is left then is short enough to read.
#endif
  for (size_t chunk = std::max<size_t>(ops.size() / 2, 1); budget > 0; chunk = std::max<size_t>(chunk / 2, 1)) {
    bool shorter = false;
    for (size_t begin = 0; begin < ops.size() && budget > 0; --budget) {
      std::vector<Op> part(ops.begin(), ops.begin() + static_cast<ptrdiff_t>(begin));
      part.insert(part.end(), ops.begin() + static_cast<ptrdiff_t>(std::min(begin + chunk, ops.size())), ops.end());
      if (still_fails(part)) {
        ops = std::move(part);
        shorter = true;
      } else {
        begin += chunk;
      }
    }
    if (chunk == 1 && !shorter) break;
  }
  return ops;
}

Tally RunSeeds(uint64_t first, uint64_t count, size_t operations) {
  Tally tally;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const WorldConfig config = MakeConfig(seed);
    const std::vector<Op> ops = MakeHistory(seed, operations);
    const Outcome outcome = RunHistory(config, ops);
    ++tally.histories;
    tally.operations += ops.size();
    tally.acknowledged += outcome.acknowledged;
    tally.restores += outcome.restores;
    tally.durable += outcome.durable;
    tally.resumed += outcome.resumed;
    tally.deleted += outcome.deleted;
    if (!outcome.violation.empty()) {
      tally.report = Report(seed, config, ops, outcome);
      return tally;
    }
    if (seed % 100 == 0) {
      ++tally.twins;
      if (RunHistory(config, ops).trace != outcome.trace) {
        tally.report = "seed " + std::to_string(seed) + ": two runs left different traces";
        return tally;
      }
    }
  }
  return tally;
}

}  // namespace sp::sim
