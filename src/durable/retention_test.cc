// What goes from a store, and what never does: I-17 on the durable tier.
#include "durable/retention.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "durable/faulty_store.h"
#include "durable/memory_store.h"
#include "durable/step_store.h"
#include "format/manifest.h"
#include "os/test_util.h"

namespace sp {
namespace {

constexpr int64_t kDay = 24 * 3600;

std::vector<uint64_t> Kept(const RetentionRule& rule, const std::vector<DatedStep>& newest_first, int64_t now = 1'000'000) {
  const auto judgements = Judge(rule, newest_first, now);
  EXPECT_EQ(judgements.size(), newest_first.size());
  std::vector<uint64_t> kept;
  for (size_t i = 0; i < judgements.size(); ++i) {
    EXPECT_FALSE(judgements[i].why.empty());
    if (judgements[i].stays) kept.push_back(newest_first[i].step);
  }
  return kept;
}

std::vector<DatedStep> EveryMinute(std::initializer_list<uint64_t> newest_first) {
  std::vector<DatedStep> steps;
  for (const uint64_t step : newest_first) steps.push_back({step, 1'000'000 - 60 * static_cast<int64_t>(steps.size())});
  return steps;
}

TEST(RetentionRule, EachKeepsWhatItNamesAndTheNewestStaysAnyway) {
  const auto steps = EveryMinute({70, 60, 50, 40, 30, 20, 10});
  EXPECT_EQ(Kept({.keep_last = 2}, steps), (std::vector<uint64_t>{70, 60}));
  EXPECT_EQ(Kept({.keep_last = 1, .keep_every = 20}, steps), (std::vector<uint64_t>{70, 60, 40, 20}));
  EXPECT_EQ(Kept({.keep_for_s = 120}, steps), (std::vector<uint64_t>{70, 60, 50}));
  EXPECT_EQ(Kept({.keep_for_s = 1}, steps), (std::vector<uint64_t>{70}));
  EXPECT_EQ(Kept({.keep_last = 4, .keep_for_s = 60}, steps), (std::vector<uint64_t>{70, 60, 50, 40}));
  EXPECT_EQ(Kept({.keep_last = 100}, steps).size(), 7u);
  EXPECT_TRUE(Kept({.keep_last = 1}, {}).empty());
}

TEST(RetentionRule, NothingGoesWithoutOne) {
  EXPECT_EQ(Kept({}, EveryMinute({3, 2, 1})).size(), 3u);
  EXPECT_EQ(Kept({.keep_every = 2}, EveryMinute({3, 2, 1})).size(), 3u) << "exceptions from no rule";
}

TEST(RetentionRule, AStepThatIsNewestByGenerationStaysThoughOlderByTheClock) {
  // Of a second daemon, whose clock is behind: the store's time does not decide what is the newest.
  EXPECT_EQ(Kept({.keep_last = 1}, {{10, 500}, {20, 900}}), (std::vector<uint64_t>{10}));
  EXPECT_EQ(Kept({.keep_for_s = 100}, {{10, 500}, {20, 900}, {30, 850}, {40, 450}, {50, 399}}), (std::vector<uint64_t>{10, 20, 30, 40}));
}

TEST(RetentionRule, OneWrongClockDeletesNothingEarly) {
  constexpr int64_t kYear = 365 * kDay, kNow = 50 * kYear;
  const std::vector<DatedStep> fresh = {{3, kNow - 10}, {2, kNow - 20}, {1, kNow - 30}};
  EXPECT_EQ(Kept({.keep_for_s = 60}, fresh, kNow + 10 * kYear).size(), 3u) << "this machine's is ahead";
  EXPECT_EQ(Kept({.keep_for_s = 60}, fresh, 0).size(), 3u) << "or behind";
  EXPECT_EQ(Kept({.keep_for_s = 60}, {{3, kNow + 10 * kYear}, {2, kNow - 20}, {1, kNow - 30}}, kNow).size(), 3u) << "the store's was ahead for the newest";
  EXPECT_EQ(Kept({.keep_for_s = 60}, {{3, kNow - 10}, {2, kNow + 10 * kYear}, {1, kNow - 30}}, kNow).size(), 3u) << "or for another one";
}

struct Retained : testing::Test {
  ManualClock clock;
  MemoryStore memory{clock};
  FaultyStore store{memory, clock};
  KnownKeys known;
  int64_t now = 100 * 365 * kDay;  // This machine's clock.

  // A whole step of one small shard.
  StepName Put(uint64_t number, uint64_t generation = 7, uint32_t uid = 1000) {
    const StoredStep step = Make(number, generation, uid);
    const std::vector<uint8_t> content(100, static_cast<uint8_t>(number));
    SealRecord record = step.records[0];
    EXPECT_TRUE(PutShard(memory, {true, true}, record, PutSource::OfMemory(content), {}).has_value());
    EXPECT_TRUE(PutManifest(memory, StoreAbilities{true, true}, step, {}).ok());
    return {"run-3", number, record.attempt};
  }
  static StoredStep Make(uint64_t number, uint64_t generation, uint32_t uid) {
    const std::vector<uint8_t> content(100, static_cast<uint8_t>(number));
    SealRecord record;
    record.key = AttemptKey{uid, "run-3", generation, {}, number, 0};
    record.attempt = record.key.AttemptId();
    record.world_size = 1;
    record.length_bytes = content.size();
    record.block_root = BlockRoot(PutSource::OfMemory(content).block_crcs);
    record.header_bytes = 64;
    record.static_offset = 32;
    return {{record}, {ledger::Generation{uid, "run-3", generation, {}, 1, false, {}, 0, 0, false, true}}};
  }
  std::vector<uint64_t> Plan(const RetentionRule& rule, uint32_t uid = 1000) {
    const auto plan = PlanRetention(store, rule, "run-3", uid, now, known, {});
    EXPECT_TRUE(plan.has_value()) << plan.error().ToString();
    std::vector<uint64_t> steps;
    if (plan) {
      for (const Departure& departure : *plan) steps.push_back(departure.step.step);
    }
    std::ranges::sort(steps);
    return steps;
  }
  size_t Objects() { return memory.List("", "", {}).value().objects.size(); }
};

TEST_F(Retained, TheNewestIsThatOfTheNewestGeneration) {
  Put(100, 1);
  Put(200, 2);
  Put(300, 2);
  Put(110, 3);
  EXPECT_EQ(Plan({.keep_last = 1}), (std::vector<uint64_t>{100, 200, 300}));
  EXPECT_EQ(Plan({.keep_last = 2}), (std::vector<uint64_t>{100, 200}));
}

TEST_F(Retained, I38_EachUserHasANewestStepOfTheirOwn) {
  Put(1);
  Put(2);
  Put(3, 7, 2000);
  EXPECT_EQ(Plan({.keep_last = 1}), (std::vector<uint64_t>{1}));
  EXPECT_EQ(Plan({.keep_last = 1}, 2000), std::vector<uint64_t>());
}

TEST_F(Retained, AStepThatCannotBeReadIsLeftAlone) {
  const StepName damaged = Put(1);
  Put(2);
  Put(3);
  SP_ASSERT_OK(memory.Delete(damaged.Prefix() + "manifest.json", {}));
  ASSERT_TRUE(memory.Create(damaged.Prefix() + "manifest.json", AsBytes("{}"), {}).value());
  EXPECT_EQ(Plan({.keep_last = 1}), (std::vector<uint64_t>{2}));
}

TEST_F(Retained, EachManifestIsReadOnce) {
  for (uint64_t step = 1; step <= 5; ++step) Put(step);
  EXPECT_EQ(Plan({.keep_last = 2}).size(), 3u);
  store.Add({.call = StoreCall::kReadRange, .kind = FaultKind::kFailBefore, .nth = 1, .times = 100, .key_part = "", .status = Status(StatusCode::kUnavailable, "503"), .at = 0});
  EXPECT_EQ(Plan({.keep_last = 2}).size(), 3u);
  Put(6);
  EXPECT_FALSE(PlanRetention(store, {.keep_last = 2}, "run-3", 1000, now, known, {}).has_value()) << "one that is not known has to be read";
}

// A copy that somebody made under another step's name, or another run's, is not a step; reading the true one before does not make it one.
TEST_F(Retained, ACopyOfAStepIsForeign) {
  const StepName step = Put(1);
  Put(2);
  const std::vector<ObjectInfo> objects = ListAll(memory, step.Prefix(), {}).value();
  for (const ObjectInfo& object : objects) {
    const std::string content = ReadObject(memory, object.key, 1 << 20, {}).value();
    for (const char* place : {"run-3/step-5/", "run-4/step-1/"}) {
      ASSERT_TRUE(memory.Create(place + object.key.substr(std::string("run-3/step-1/").size()), AsBytes(content), {}).value());
    }
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(Plan({.keep_last = 1}), (std::vector<uint64_t>{1}));
    const auto other = PlanRetention(store, {.keep_last = 1}, "run-4", 1000, now, known, {});
    ASSERT_TRUE(other.has_value());
    EXPECT_TRUE(other->empty());
  }
}

TEST_F(Retained, AStepThatMayNotBeReadKeepsNoOtherOne) {
  Put(1);
  const StepName denied = Put(2);
  Put(3);
  for (const StatusCode code : {StatusCode::kDenied, StatusCode::kLimit}) {
    known.clear();
    store.Add({.call = StoreCall::kReadRange, .kind = FaultKind::kFailBefore, .nth = 1, .times = 1, .key_part = denied.Prefix(), .status = Status(code, "no"), .at = 0});
    EXPECT_EQ(Plan({.keep_last = 1}), (std::vector<uint64_t>{1}));
  }
}

TEST_F(Retained, F68_AStepWithoutItsLineageIsNotTheNewest) {
  Put(1);
  Put(2);
  const StepName damaged = Put(3);
  SP_ASSERT_OK(memory.Delete(damaged.Prefix() + "lineage.json", {}));
  EXPECT_EQ(Plan({.keep_last = 1}), (std::vector<uint64_t>{1}));
}

// I-23: whatever deleted a shard of a step that is being written, the step does not become whole without it.
TEST_F(Retained, I23_NoManifestIsMadeForWhatHasGone) {
  const StoredStep step = Make(1, 7, 1000);
  const StepName name{"run-3", 1, step.records[0].attempt};
  const std::vector<uint8_t> content(100, 1);
  const auto put = [&] { return PutShard(memory, {true, true}, step.records[0], PutSource::OfMemory(content), {}).has_value(); };
  for (const std::string file : {"rank-0.safetensors", "rank-0.crc32c"}) {
    ASSERT_TRUE(put());
    SP_ASSERT_OK(memory.Delete(name.Prefix() + file, {}));
    SP_EXPECT_CODE(kIncomplete, PutManifest(store, StoreAbilities{true, true}, step, {}));
  }
  ASSERT_TRUE(put());
  ASSERT_TRUE(memory.Create(name.Prefix() + "deleting.json", AsBytes("{}"), {}).value());
  SP_EXPECT_CODE(kIncomplete, PutManifest(store, StoreAbilities{true, true}, step, {}));
  SP_ASSERT_OK(memory.Delete(name.Prefix() + "deleting.json", {}));
  SP_ASSERT_OK(PutManifest(store, StoreAbilities{true, true}, step, {}));
}

TEST_F(Retained, F61_ADeletionThatWasCutShortAnywhereIsFoundAndFinished) {
  const StepName kept = Put(2);
  const size_t before = Objects();
  for (uint64_t nth = 1;; ++nth) {
    const StepName gone = Put(1);
    FaultyStore cut(memory, clock);
    cut.Add({.call = StoreCall::kDelete, .kind = FaultKind::kFailBefore, .nth = nth, .times = 100, .key_part = "", .status = Status(StatusCode::kUnavailable, "503"), .at = 0});
    const Status deleted = DeleteStep(cut, gone, {});
    if (deleted.ok()) {
      EXPECT_EQ(nth, 6u) << "manifest, shard, checksums, lineage, mark";
      break;
    }
    const auto plan = PlanRetention(store, {.keep_last = 1}, "run-3", 1000, now, known, {});
    ASSERT_TRUE(plan.has_value());
    ASSERT_EQ(plan->size(), 1u) << nth;
    EXPECT_EQ((*plan)[0].step, gone);
    SP_ASSERT_OK(DeleteStep(memory, gone, {}));
    EXPECT_EQ(Objects(), before);
  }
  EXPECT_EQ(ListSteps(memory, "", {}).value().front().name, kept);
  EXPECT_EQ(Objects(), before);
}

TEST_F(Retained, AFullStoreCanBeEmptied) {
  const StepName gone = Put(1);
  store.Add({.call = StoreCall::kCreate, .kind = FaultKind::kFailBefore, .nth = 1, .times = 1, .key_part = "", .status = Status(StatusCode::kNoSpace, "full"), .at = 0});
  SP_ASSERT_OK(DeleteStep(store, gone, {}));
  EXPECT_EQ(Objects(), 0u);
}

// I-24: what a drain has written that nobody will finish goes in the end; what one may be writing does not.
TEST_F(Retained, I24_WhatNobodyFinishesGoesAfterAWeekByTheStoresClock) {
  const StoredStep half = Make(1, 7, 1000);
  ASSERT_TRUE(PutShard(memory, {true, true}, half.records[0], PutSource::OfMemory(std::vector<uint8_t>(100, 1)), {}).has_value());
  EXPECT_TRUE(Plan({.keep_last = 1}).empty()) << "there is nothing newer to go by";
  Put(2);
  EXPECT_TRUE(Plan({.keep_last = 1}).empty());
  clock.Advance(6 * kDay * kNanosPerSecond);
  Put(3);
  EXPECT_EQ(Plan({.keep_last = 2}), std::vector<uint64_t>());
  clock.Advance(2 * kDay * kNanosPerSecond);
  EXPECT_EQ(Plan({.keep_last = 2}), std::vector<uint64_t>()) << "an idle store's clock does not go on";
  Put(4);
  EXPECT_EQ(Plan({.keep_last = 3}), std::vector<uint64_t>({1}));
}

TEST_F(Retained, I24_ADrainThatIsUnderWayIsNotOldForOneWrongClock) {
  const StoredStep half = Make(1, 7, 1000);
  ASSERT_TRUE(PutShard(memory, {true, true}, half.records[0], PutSource::OfMemory(std::vector<uint8_t>(100, 1)), {}).has_value());
  const int64_t written = ListAll(memory, "", {}).value().front().modified_unix_s;
  clock.Advance(30 * kDay * kNanosPerSecond);  // The store's clock was ahead for a while.
  Put(2);
  now = written + kDay;
  EXPECT_TRUE(Plan({.keep_last = 1}).empty());
  now = written + 8 * kDay;
  EXPECT_EQ(Plan({.keep_last = 1}), std::vector<uint64_t>({1}));
}

TEST_F(Retained, ForeignObjectsAreNeitherStepsNorRemains) {
  const StepName step = Put(1);
  ASSERT_TRUE(memory.Create("run-3/step-9/notes.txt", AsBytes("x"), {}).value());
  ASSERT_TRUE(memory.Create("run-3/step-9/" + std::string(32, 'a') + "/notes.txt", AsBytes("x"), {}).value());
  ASSERT_TRUE(memory.Create("run-3/step-007/" + std::string(32, 'a') + "/manifest.json", AsBytes("x"), {}).value());
  ASSERT_TRUE(memory.Create("other.txt", AsBytes("x"), {}).value());
  clock.Advance(30 * kDay * kNanosPerSecond);
  Put(2);
  EXPECT_EQ(Plan({.keep_last = 1}), std::vector<uint64_t>({1}));
  SP_ASSERT_OK(DeleteStep(memory, step, {}));
  EXPECT_EQ(Objects(), 4u + 4u);
}

}  // namespace
}  // namespace sp
