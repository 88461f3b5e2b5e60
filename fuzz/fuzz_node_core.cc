// The connections' and sessions' state machine (T-2): a string of operations against the simulated node, with every check of the reference model
// (src/sim). Among them messages that no client sends: seal before reserve, somebody else's lease, a stale generation, repeats.
//
// Input: two bytes choose the topology; then per operation one byte for its kind and four for its number.
#include <cstdio>

#include "fuzz.h"
#include "sim/history.h"
#include "sim/random.h"

namespace {

using namespace sp::sim;

constexpr size_t kOperationsMax = 120;

sp::fuzz::Input AsInput(uint16_t topology, const std::vector<Op>& ops) {
  sp::fuzz::Input input = {static_cast<uint8_t>(topology), static_cast<uint8_t>(topology >> 8)};
  for (const Op& op : ops) {
    input.push_back(static_cast<uint8_t>(op.kind));
    for (int shift = 0; shift < 32; shift += 8) input.push_back(static_cast<uint8_t>(op.arg >> shift));
  }
  return input;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sp::fuzz::Numbers in({data, size});
  const WorldConfig config = MakeConfig(in.U16());
  std::vector<Op> ops;
  while (!in.done() && ops.size() < kOperationsMax) {
    const auto kind = static_cast<OpKind>(in.U8() % kOpKinds);
    ops.push_back({kind, in.U32()});
  }
  const Outcome outcome = RunHistory(config, ops);
  if (outcome.violation.empty()) return 0;
  std::fprintf(stderr, "operation %zu of %zu: %s\n", outcome.failed_at, ops.size(), outcome.violation.c_str());
  for (const Op& op : ops) std::fprintf(stderr, "  {%s, %u}\n", OpName(op.kind), op.arg);
  std::abort();
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  std::vector<Input> seeds;
  for (uint16_t seed = 1; seed <= 12; ++seed) {
    // A history of the simulator, with a forged message after every fourth operation.
    std::vector<Op> ops;
    Random random(seed);
    for (const Op& op : MakeHistory(seed, 100)) {
      ops.push_back(op);
      if (ops.size() % 4 == 0) ops.push_back({OpKind::kForge, static_cast<uint32_t>(random.Next())});
    }
    seeds.push_back(::AsInput(seed, ops));
  }
  for (uint32_t type = 0; type < 19; ++type) {  // Each message to a daemon that knows of nothing.
    seeds.push_back(::AsInput(3, {{OpKind::kLaunch, 1}, {OpKind::kClient, 1}, {OpKind::kForge, type}, {OpKind::kDeliver, 0}}));
  }
  return seeds;
}
