// The simulator's own tests, and the histories that every change runs.
#include "sim/history.h"

#include <gtest/gtest.h>

namespace sp::sim {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(NDEBUG) || defined(SP_PLANT_BUG_all)
constexpr uint64_t kHistories = 250;  // Sanitizers and unoptimised builds are slow; the optimised build runs the rest.
#else
constexpr uint64_t kHistories = 2500;
#endif
constexpr size_t kOperations = 500;

// I-1 to I-7, I-9, I-10, I-12, I-14, I-16, I-17, I-21 to I-25, I-27, I-28, I-30 to I-33, I-38: the checks are in model*.cc, sim_store.cc and
// world*.cc.
TEST(Simulator, NoHistoryBreaksAnInvariant) {
  const Tally t = RunSeeds(1, kHistories, kOperations);
  EXPECT_EQ(t.report, "");
  std::printf("%llu histories, %llu operations, %llu acknowledgements, %llu shards read back, %llu steps durable, %llu audits of "
              "what the store has, %llu steps deleted there, %llu twin runs\n",
              static_cast<unsigned long long>(t.histories), static_cast<unsigned long long>(t.operations), static_cast<unsigned long long>(t.acknowledged),
              static_cast<unsigned long long>(t.restores), static_cast<unsigned long long>(t.durable), static_cast<unsigned long long>(t.resumed),
              static_cast<unsigned long long>(t.deleted), static_cast<unsigned long long>(t.twins));
  if (t.report.empty()) {
    // A simulator in which nothing is ever saved or read would find nothing either.
    EXPECT_GT(t.acknowledged, 5 * kHistories);
    EXPECT_GT(t.restores, kHistories);
    EXPECT_GT(t.durable, kHistories);
    EXPECT_GT(t.resumed, kHistories / 4);
    EXPECT_GT(t.deleted, kHistories / 10);
    EXPECT_EQ(t.twins, kHistories / 100);
  }
}

TEST(Simulator, OneSeedIsOneHistory) {
  const auto a = MakeHistory(7, 100), b = MakeHistory(7, 100), c = MakeHistory(8, 100);
  const auto same = [](const std::vector<Op>& x, const std::vector<Op>& y) {
    for (size_t i = 0; i < x.size(); ++i) {
      if (x[i].kind != y[i].kind || x[i].arg != y[i].arg) return false;
    }
    return true;
  };
  EXPECT_TRUE(same(a, b));
  EXPECT_FALSE(same(a, c));
  EXPECT_EQ(RunHistory(MakeConfig(7), a).trace, RunHistory(MakeConfig(7), b).trace);
}

TEST(Simulator, AnyPartOfAHistoryIsAHistory) {  // What shrinking relies on.
  const WorldConfig config = MakeConfig(11);
  const std::vector<Op> ops = MakeHistory(11, 300);
  for (size_t skip = 1; skip < 6; ++skip) {
    std::vector<Op> part;
    for (size_t i = 0; i < ops.size(); ++i) {
      if (i % (skip + 1) != 0) part.push_back(ops[i]);
    }
    EXPECT_EQ(RunHistory(config, part).violation, "");
  }
}

// --- the reference model refuses what it should: a check that cannot fail proves nothing -------------------------------------------------------

class ModelTest : public ::testing::Test {
 protected:
  static Id128 Id(uint8_t n) {
    Id128 id;
    id.bytes.fill(n);
    return id;
  }
  AttemptKey Key(uint64_t step, uint64_t generation = 1) const { return {1000, "job", generation, Id(1), step, 0}; }
  template <typename T>
  void Append(const T& entry) {
    model.Append(now, 600 * kNanosPerSecond, entry);
  }
  template <typename T>
  std::string Refusal(const T& entry) {
    try {
      Append(entry);
    } catch (const Violation& v) {
      return v.what.substr(0, v.what.find(':'));
    }
    return "";
  }
  ledger::Generation Generation(uint64_t number) const { return {1000, "job", number, Id(static_cast<uint8_t>(number)), 1, false, {}, 0, 0, false, false}; }
  ledger::Sealed SealedEntry(uint64_t n, uint64_t step) const {
    SealRecord r;
    r.key = Key(step);
    r.attempt = r.key.AttemptId();
    r.world_size = 1;
    r.length_bytes = 4096;
    ledger::Sealed s{n, n, {}};
    s.record.bytes = r.Encode();
    return s;
  }
  ledger::Manifest ManifestEntry(uint64_t step) const {
    SealRecord r;
    r.key = Key(step);
    r.attempt = r.key.AttemptId();
    r.kind = ShardKind::kManifest;
    r.world_size = 1;
    ledger::Manifest m;
    m.record.bytes = r.Encode();
    return m;
  }
  void SaveStep(uint64_t n, uint64_t step) {
    Append(ledger::Slot{n, SessionKey{Id(9), 1000, 5, 5}, {static_cast<uint32_t>(n)}});
    Append(ledger::Lease{n, n, Key(step), 1, 0});
    model.SealCheckPassed(n);
    Append(SealedEntry(n, step));
    Append(ManifestEntry(step));
  }
  ledger::DurableWish Wish(uint64_t step, bool on) const { return {1000, "job", Key(step).AttemptId(), on, on ? "" : "why"}; }
  ledger::Evicted Evicted(uint64_t step) const { return {1000, "job", Key(step).AttemptId()}; }
  ledger::StoredShard StoredShard(uint64_t step) const { return {SealedEntry(step, step).record, false}; }
  ledger::StoredManifest StoredManifest(uint64_t step) const { return {ManifestEntry(step).record}; }
  ledger::Tombstone Retired(uint64_t step) const { return {1000, "job", Key(step).AttemptId(), ledger::TombstoneWhy::kRetired, ""}; }

  Model model{2, true};
  Nanos now = 0;
};

TEST_F(ModelTest, RefusesWhatBreaksTheRules) {
  model.SetGoodCoverage(Hash256{}, true);
  Append(Generation(1));
  EXPECT_EQ(Refusal(Generation(1)), "I-21");
  Append(ledger::Slot{1, SessionKey{Id(9), 1000, 5, 5}, {1}});
  EXPECT_EQ(Refusal(ledger::Slot{2, SessionKey{Id(8), 1000, 6, 6}, {1}}), "I-10");
  EXPECT_EQ(Refusal(ledger::Lease{1, 1, Key(1, 2), 1, 0}), "I-21");
  Append(ledger::Lease{1, 1, Key(1), 1, 0});
  EXPECT_EQ(Refusal(ledger::Lease{2, 1, Key(2), 1, 0}), "I-10");
  EXPECT_EQ(Refusal(ledger::SlotGone{1}), "I-16");
  EXPECT_EQ(Refusal(ledger::LeaseEnded{1, 1, false}), "I-10");
  EXPECT_EQ(Refusal(SealedEntry(1, 1)), "I-2");
  model.SealCheckPassed(1);
  EXPECT_EQ(Refusal(SealedEntry(1, 2)), "I-3");
  EXPECT_EQ(Refusal(ManifestEntry(1)), "I-1");
  Append(SealedEntry(1, 1));
  Append(ManifestEntry(1));
  EXPECT_EQ(Refusal(ManifestEntry(1)), "I-3");
  EXPECT_EQ(Refusal(Retired(1)), "I-14");
  EXPECT_EQ(Refusal(ledger::Tombstone{1000, "job", Key(1).AttemptId(), ledger::TombstoneWhy::kClosed, ""}), "I-14");
}

TEST_F(ModelTest, KnowsWhatMayBeRetired) {
  model.SetGoodCoverage(Hash256{}, true);
  Append(Generation(1));
  for (uint64_t step = 1; step <= 3; ++step) SaveStep(step, step);
  EXPECT_EQ(Refusal(Retired(2)), "I-14");
  Append(ledger::ReadPin{1, SessionKey{Id(7), 1000, 6, 6}, "job", Key(1).AttemptId(), true});
  EXPECT_EQ(Refusal(Retired(1)), "I-17");
  EXPECT_EQ(Refusal(ledger::ReadPin{1, SessionKey{Id(7), 1000, 6, 6}, "job", Key(1).AttemptId(), false}), "I-17");
  now = 601 * kNanosPerSecond;
  Append(ledger::ReadPin{1, SessionKey{Id(7), 1000, 6, 6}, "job", Key(1).AttemptId(), false});
  Append(Retired(1));
  EXPECT_EQ(model.Latest({1000, "job"})->key.step, 3u);
}

TEST_F(ModelTest, KnowsWhatIsDurable) {
  model.SetGoodCoverage(Hash256{}, true);
  Append(Generation(1));
  for (uint64_t step = 1; step <= 3; ++step) SaveStep(step, step);
  Append(StoredShard(1));
  EXPECT_EQ(Refusal(StoredManifest(1)), "I-23") << "nobody has asked for it";
  EXPECT_EQ(Refusal(Wish(1, false)), "I-32");
  Append(Wish(1, true));
  EXPECT_EQ(Refusal(Wish(1, true)), "I-32");
  EXPECT_EQ(Refusal(Retired(1)), "I-17");
  EXPECT_EQ(Refusal(Evicted(1)), "I-14");
  Append(StoredManifest(1));
  EXPECT_EQ(Refusal(StoredManifest(1)), "I-32");
  EXPECT_EQ(Refusal(Retired(1)), "I-14") << "it is in memory still";
  Append(Wish(2, true));
  EXPECT_EQ(Refusal(StoredManifest(2)), "I-23") << "its shard is not confirmed";
  Append(StoredShard(2));
  Append(StoredManifest(2));
  EXPECT_EQ(Refusal(Evicted(2)), "I-14") << "one of the newest";
  Append(Evicted(1));
  EXPECT_EQ(Refusal(Evicted(1)), "I-14");
  EXPECT_EQ(model.Lineage({1000, "job"}).size(), 3u) << "the store has it";
  EXPECT_TRUE(model.IsMine({1000, "job"}));
  Model without(2, false);
  EXPECT_THROW(without.Append(now, 0, Wish(1, true)), Violation);
}

TEST_F(ModelTest, KnowsWhatMayGoFromTheStore) {
  model = Model(1, true, 2);
  model.SetGoodCoverage(Hash256{}, true);
  Append(Generation(1));
  for (uint64_t step = 1; step <= 4; ++step) {
    SaveStep(step, step);
    if (step == 4) break;
    Append(Wish(step, true));
    Append(StoredShard(step));
    Append(StoredManifest(step));
  }
  EXPECT_EQ(Refusal(Retired(1)), "I-14") << "it is in memory still";
  for (uint64_t step = 1; step <= 3; ++step) Append(Evicted(step));
  EXPECT_EQ(Refusal(Retired(2)), "I-14") << "one of the two newest that are durable";
  Append(ledger::OperatorPin{1000, "job", Key(1).AttemptId(), true});
  EXPECT_EQ(Refusal(Retired(1)), "I-17");
  Append(ledger::OperatorPin{1000, "job", Key(1).AttemptId(), false});
  Append(Retired(1));
  EXPECT_EQ(model.Lineage({1000, "job"}).size(), 3u);
}

TEST_F(ModelTest, KnowsWhatANewMemoryTakesOver) {
  StoredStep step;
  step.records = {*SealRecord::Decode(SealedEntry(1, 7).record.span())};
  step.lineage = {Generation(1)};
  model.TakeOver(step);
  EXPECT_FALSE(model.IsMine({1000, "job"}));
  EXPECT_EQ(model.Latest({1000, "job"})->key.step, 7u);
  EXPECT_EQ(Refusal(Generation(1)), "I-21");
  Append(Generation(2));
  EXPECT_EQ(model.NothingLeft({1000, "job"}), StatusCode::kLost);
}

TEST_F(ModelTest, ABadCoverageIsNotComplete) {
  model.SetGoodCoverage(Hash256{}, false);
  Append(Generation(1));
  EXPECT_THROW(SaveStep(1, 1), Violation);
}

}  // namespace
}  // namespace sp::sim
