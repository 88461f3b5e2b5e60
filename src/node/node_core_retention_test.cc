// What the core lets go of in the durable tier (I-17, I-24), and when.
#include <utility>

#include "node/node_core_harness.h"

namespace sp {
namespace {

using H = NodeCoreHarness;

struct RetainedDurable : testing::Test {
  H h{8, 2, "file:///store"};
  H::Writer w;

  void SetUp() override {
    h.config.durable_keeps = 1;
    h.config.durable_every = 1;
    h.Restart();
    w = h.Open(h.Connect(1), 1);
  }
  // What the shell would find to go: everything but the newest.
  void PlanAllButNewest() {
    h.departures.clear();
    for (size_t i = 0; i + 1 < h.stored.size(); ++i) h.departures.push_back({NameOf(h.stored[i]), "not among the newest 1"});
  }
  static StepName NameOf(const StoredStep& s) { return {s.records[0].key.ns, s.records[0].key.step, s.records[0].attempt}; }
  template <typename T>
  std::vector<T> All() {
    std::vector<T> found;
    for (const Action& any : h.actions) {
      if (const auto* a = std::get_if<T>(&any)) found.push_back(*a);
    }
    return found;
  }
  Level LevelOf(uint64_t step) {
    for (const AttemptInfo& i : h.List(w.client)) {
      if (i.step == step) return i.level;
    }
    return Level::kNone;
  }
  std::vector<uint64_t> Stored() {
    std::vector<uint64_t> steps;
    for (const StoredStep& s : h.stored) steps.push_back(s.records[0].key.step);
    return steps;
  }
};

TEST_F(RetainedDurable, NothingIsPlannedWithoutARule) {
  h.config.durable_keeps.reset();
  h.Restart();
  w = h.Open(h.Connect(2), 2);
  h.Save(w, 1);
  EXPECT_TRUE(All<action::PlanRetention>().empty());
}

TEST_F(RetainedDurable, WhatMemoryHasStaysAndGoesWhenMemoryHasLetGoOfIt) {
  h.Save(w, 1);
  PlanAllButNewest();
  h.Save(w, 2);
  PlanAllButNewest();
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{1, 2}));
  EXPECT_TRUE(All<action::DeleteSteps>().empty()) << "memory has both";
  h.Save(w, 3);  // Memory lets go of 1.
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{2, 3}));
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{3, 2})) << "and it is not offered any more";
  EXPECT_EQ(h.StatusView()["durable"]["deleted"], 1);
  h.Restart();
  EXPECT_EQ(h.Steps(h.Reconnect(w.client)), (std::vector<uint64_t>{3, 2})) << "I-25";
}

TEST_F(RetainedDurable, I17_AStepThatIsBeingReadStaysUntilItIsNot) {
  h.Save(w, 1);
  h.Save(w, 2);
  h.Save(w, 3);
  OpenReadRequest one;
  one.choice = ReadChoice::kStep;
  one.step = 1;
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client, one));
  PlanAllButNewest();
  h.Save(w, 4);
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{1, 3, 4})) << "1 is read, 3 and 4 are in memory";
  EXPECT_EQ(h.Ask(w.client, MessageType::kUnpin, PinRequest{pin.pin}).status, StatusCode::kOk);
  PlanAllButNewest();
  h.Save(w, 5);
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{4, 5}));
}

TEST_F(RetainedDurable, I28_NothingIsLeftOfAStepThatHasGone) {
  h.Save(w, 1);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client));
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0});
  h.block_check = {};
  h.Ask(w.client, MessageType::kUnpin, PinRequest{pin.pin});
  h.Save(w, 2);
  h.Save(w, 3);
  const auto quarantines = [&] {
    return std::ranges::count_if(h.core->Snapshot(), [](const LedgerEntry& e) { return std::holds_alternative<ledger::Quarantine>(e); });
  };
  ASSERT_EQ(quarantines(), 1);
  PlanAllButNewest();
  h.Step(event::RetentionPlanned{1000, "job", {}, h.departures});
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{2, 3}));
  EXPECT_EQ(quarantines(), 0) << "as after a restart";
}

TEST_F(RetainedDurable, AnOperatorsPinHoldsItInTheStoreToo) {
  const Id128 attempt = h.Save(w, 1);
  EXPECT_EQ(h.Ask(w.client, MessageType::kPinStep, PinStepRequest{"job", attempt, true}).status, StatusCode::kOk);
  for (uint64_t step = 2; step <= 5; ++step) {
    PlanAllButNewest();
    h.Save(w, step);
  }
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{1, 4, 5}));
}

TEST_F(RetainedDurable, ALaunchThatWasRolledBackKeepsItsOwnNewestStep) {
  const Id128 first = h.Save(w, 10);
  h.Save(w, 20);
  h.Save(w, 30);
  // A new launch that continues step 10: what memory would read is not what the store's order calls the newest.
  H::Client c = h.Connect(3);
  OpenGenerationRequest request{"job", TestId(3), 1, 0, ParentMode::kAttempt, first};
  const Frame opened = h.Ask(c, MessageType::kOpenGeneration, request);
  ASSERT_EQ(opened.status, StatusCode::kOk);
  h.departures = {{NameOf(h.stored[0]), "not among the newest 1"}};
  h.Step(event::RetentionPlanned{1000, "job", {}, h.departures});
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{10, 20, 30}));
}

TEST_F(RetainedDurable, TroubleIsToldAndTriedAgainAndHoldsUpNothing) {
  h.Save(w, 1);
  h.Save(w, 2);
  h.Save(w, 3);
  const size_t plans = All<action::PlanRetention>().size();
  h.hold_store = true;
  h.Save(w, 4);
  const auto is_plan = [](const Event& e) { return std::holds_alternative<event::RetentionPlanned>(e); };
  h.Release();  // The shard.
  h.Release();  // The manifest: 4 is durable, and a plan is asked for.
  ASSERT_EQ(std::ranges::count_if(h.held, is_plan), 1);
  EXPECT_EQ(All<action::PlanRetention>().size(), plans + 1);
  h.held.clear();
  h.hold_store = false;
  h.Step(event::RetentionPlanned{1000, "job", Status(StatusCode::kUnavailable, "503"), {}});
  EXPECT_EQ(All<action::PlanRetention>().size(), plans + 1) << "not at once";
  PlanAllButNewest();
  h.Advance(61 * kNanosPerSecond);
  EXPECT_EQ(All<action::PlanRetention>().size(), plans + 2);
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{3, 4}));
}

TEST_F(RetainedDurable, OneIsPlannedAtATimeAndNamespacesTakeTurns) {
  const auto other = h.Open(h.Connect(2, 2000), 2);
  h.hold_store = true;
  h.Save(w, 1);
  h.Save(other, 1);
  for (int i = 0; i < 2; ++i) h.Release();  // Shards, manifests: both are durable, and one plan is asked for.
  ASSERT_EQ(All<action::PlanRetention>().size(), 1u);
  EXPECT_EQ(All<action::PlanRetention>()[0].uid, 1000u);
  h.Release();
  ASSERT_EQ(All<action::PlanRetention>().size(), 2u);
  EXPECT_EQ(All<action::PlanRetention>()[1].uid, 2000u);
}

TEST_F(RetainedDurable, AStepThatBecomesDurableMeanwhileIsPlannedForAfterwards) {
  h.hold_store = true;
  h.Save(w, 1);
  for (int i = 0; i < 2; ++i) h.Release();
  ASSERT_EQ(All<action::PlanRetention>().size(), 1u);
  const std::vector<Event> plan = std::exchange(h.held, {});
  ASSERT_EQ(plan.size(), 1u);
  h.Save(w, 2);
  for (int i = 0; i < 2; ++i) h.Release();
  EXPECT_EQ(LevelOf(2), Level::kDurable);
  EXPECT_EQ(All<action::PlanRetention>().size(), 1u);
  h.Step(plan[0]);
  EXPECT_EQ(All<action::PlanRetention>().size(), 2u);
}

TEST_F(RetainedDurable, ADaemonThatIsToEndDeletesNothing) {
  for (uint64_t step = 1; step <= 3; ++step) h.Save(w, step);
  h.hold_store = true;
  h.Save(w, 4);
  for (int i = 0; i < 2; ++i) h.Release();
  ASSERT_EQ(h.held.size(), 1u);
  PlanAllButNewest();
  h.held.clear();
  h.Step(event::Shutdown{});
  h.Step(event::RetentionPlanned{1000, "job", {}, h.departures});
  EXPECT_TRUE(All<action::DeleteSteps>().empty());
  EXPECT_FALSE(All<action::ExitDaemon>().empty());
}

TEST_F(RetainedDurable, OnlyWhatIsGoneIsToldAndTheRestIsTriedAgainWithGrowingPauses) {
  h.undeletable = 1;
  for (uint64_t step = 1; step <= 4; ++step) {
    PlanAllButNewest();
    h.Save(w, step);
  }
  h.Advance(120 * kNanosPerSecond);
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{1, 3, 4})) << "one that cannot be deleted keeps no other one";
  EXPECT_EQ(h.StatusView()["durable"]["deleted"], 1);
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{4, 3})) << "it is offered no more all the same";
  const size_t plans = All<action::PlanRetention>().size();
  PlanAllButNewest();
  for (int minute = 0; minute < 60; ++minute) h.Advance(60 * kNanosPerSecond);
  const size_t tries = All<action::PlanRetention>().size() - plans;
  EXPECT_GE(tries, 4u);
  EXPECT_LE(tries, 7u);
  EXPECT_EQ(h.StatusView()["durable"]["deleted"], 1) << "counted once";
  h.undeletable = 0;
  for (int minute = 0; minute < 70; ++minute) h.Advance(60 * kNanosPerSecond);
  EXPECT_EQ(Stored(), (std::vector<uint64_t>{3, 4}));
}

TEST_F(RetainedDurable, AKillBetweenTheTombstoneAndTheDeletionLosesNothing) {  // I-25
  for (uint64_t step = 1; step <= 3; ++step) h.Save(w, step);
  const StoredStep first = h.stored.front();
  PlanAllButNewest();
  h.hold_store = true;
  h.Step(event::RetentionPlanned{1000, "job", {}, h.departures});
  ASSERT_EQ(All<action::DeleteSteps>().size(), 1u);
  h.held.clear();
  h.hold_store = false;
  h.stored.insert(h.stored.begin(), first);  // The order was not carried out.
  h.Restart();
  EXPECT_EQ(h.Steps(h.Reconnect(w.client)), (std::vector<uint64_t>{3, 2}));
  w = h.Open(h.Connect(4), 4);
  PlanAllButNewest();
  h.Save(w, 4);
  EXPECT_EQ(std::ranges::count(Stored(), 1u), 0) << "the next plan finds it";
}

// I-23, I-24: whoever's they are, what is being written here or read from here does not go as remains of a plan.
TEST_F(RetainedDurable, I24_ADrainUnderWayOfAnotherUserIsNotRemains) {
  const auto other = h.Open(h.Connect(5, 2000), 5);
  h.hold_store = true;
  h.Save(other, 7);
  const auto sent = All<action::StoreShard>();
  ASSERT_EQ(sent.size(), 1u);
  h.Step(event::RetentionPlanned{1000, "job", {}, {{StepName{"job", 7, sent[0].record.attempt}, "nobody has finished writing it in 7 days"}}});
  EXPECT_TRUE(All<action::DeleteSteps>().empty());
}

TEST_F(RetainedDurable, I23_AStepWhoseShardsAreGoneIsNotCalledDurable) {
  h.manifest_status = Status(StatusCode::kIncomplete, "rank-0.safetensors has gone since it was confirmed");
  const Id128 attempt = h.Save(w, 1);
  const Frame told = h.Wait(w.client, attempt, 0, Level::kDurable);
  EXPECT_EQ(told.status, StatusCode::kClosed);
  EXPECT_EQ(LevelOf(1), Level::kMemory);
}

}  // namespace
}  // namespace sp
