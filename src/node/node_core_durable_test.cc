// The durable tier as the core drives it: wishes, drains, trouble, eviction, and what a node whose memory is new finds (I-22 to I-24).
#include "node/node_core_harness.h"

namespace sp {
namespace {

using H = NodeCoreHarness;

constexpr const char* kStore = "file:///store";
const Status kDown = Status(StatusCode::kUnavailable, "the store does not answer");

struct Durable : testing::Test {
  H h{8, 2, kStore};
  H::Writer w = h.Open(h.Connect(1), 1);

  static Id128 SaveDurable(H& node, const H::Writer& writer, uint64_t step) {
    const ReserveReply r = node.Reserve(writer, step);
    EXPECT_EQ(node.Ask(writer.client, MessageType::kMakeDurable, MakeDurableRequest{"job", r.attempt}).status, StatusCode::kOk);
    EXPECT_EQ(node.TrySeal(writer, r.lease).status, StatusCode::kOk) << step;
    return r.attempt;
  }
  bool Ends() const {
    return std::ranges::any_of(h.actions, [](const Action& a) { return std::holds_alternative<action::ExitDaemon>(a); });
  }
  const action::StoreShard* FirstSent() const {
    for (const Action& a : h.actions) {
      if (const auto* s = std::get_if<action::StoreShard>(&a)) return s;
    }
    return nullptr;
  }
  Frame Ask(const Id128& attempt) { return h.Ask(w.client, MessageType::kMakeDurable, MakeDurableRequest{"job", attempt}); }
  Id128 SaveDurable(uint64_t step) { return SaveDurable(h, w, step); }
  Level LevelOf(uint64_t step) {
    for (const AttemptInfo& i : h.List(w.client)) {
      if (i.step == step) return i.level;
    }
    return Level::kNone;
  }
  size_t Count(const std::string& log) {
    return static_cast<size_t>(std::ranges::count_if(h.actions, [&](const Action& a) {
      const auto* l = std::get_if<action::Log>(&a);
      return l && l->name == log;
    }));
  }
  size_t ShardsSent() {
    return static_cast<size_t>(std::ranges::count_if(h.actions, [](const Action& a) { return std::holds_alternative<action::StoreShard>(a); }));
  }
  uint64_t Waiting() { return h.StatusView()["durable"]["steps_waiting"].get<uint64_t>(); }
};

TEST_F(Durable, AStepThatIsAskedForBecomesDurable) {
  const Id128 attempt = SaveDurable(1);
  EXPECT_EQ(LevelOf(1), Level::kDurable);
  EXPECT_EQ(H::Body<WaitReply>(h.Wait(w.client, attempt, 0, Level::kDurable)).level, Level::kDurable);
  EXPECT_EQ(Count("attempt_durable"), 1u);
  ASSERT_EQ(h.stored.size(), 1u);
  EXPECT_EQ(h.stored[0].records.size(), 1u);
  EXPECT_EQ(h.stored[0].lineage.front().generation, w.generation);
  EXPECT_EQ(Ask(attempt).status, StatusCode::kOk) << "I-32: asking again changes nothing";
  EXPECT_EQ(h.stored.size(), 1u);
}

TEST_F(Durable, OthersStayInMemoryAndSaySo) {
  const Id128 attempt = h.Save(w, 1);
  EXPECT_EQ(LevelOf(1), Level::kMemory);
  EXPECT_EQ(h.Wait(w.client, attempt, 0, Level::kDurable).status, StatusCode::kInvalidArgument);
  EXPECT_EQ(Ask(attempt).status, StatusCode::kOk) << "afterwards is early enough";
  EXPECT_EQ(LevelOf(1), Level::kDurable);
}

TEST_F(Durable, WithoutATierItIsRefusedAtOnce) {
  H none;
  const H::Writer writer = none.Open(none.Connect(1), 1);
  const ReserveReply r = none.Reserve(writer, 1);
  EXPECT_EQ(none.Ask(writer.client, MessageType::kMakeDurable, MakeDurableRequest{"job", r.attempt}).status, StatusCode::kUnavailable);
}

TEST_F(Durable, I22_TroubleWithTheStoreIsToldOnceTriedAgainAndFailsNoSave) {
  h.store_status = kDown;
  const Id128 attempt = SaveDurable(1);
  EXPECT_EQ(LevelOf(1), Level::kMemory);
  for (int i = 0; i < 20; ++i) h.Advance(2 * kNanosPerSecond);
  EXPECT_EQ(Count("drain_in_trouble"), 1u) << "once per interval (F64)";
  EXPECT_GT(h.StatusView()["durable"]["failures"].get<uint64_t>(), 4u);
  EXPECT_LT(h.StatusView()["durable"]["failures"].get<uint64_t>(), 12u) << "with growing pauses (F57)";
  EXPECT_EQ(h.StatusView()["drains"][0]["trouble"], kDown.ToString());
  h.Save(w, 2);
  EXPECT_EQ(h.LatestStep(w.client), 2u);
  h.store_status = {};
  h.Advance(60 * kNanosPerSecond);
  EXPECT_EQ(H::Body<WaitReply>(h.Wait(w.client, attempt, 0, Level::kDurable)).level, Level::kDurable);
  EXPECT_EQ(Waiting(), 0u);
}

TEST_F(Durable, I23_AStepWhoseManifestWasNotMadeIsNotDurable) {
  h.manifest_status = kDown;
  const Id128 attempt = SaveDurable(1);
  EXPECT_EQ(ShardsSent(), 1u);
  EXPECT_EQ(h.StatusView()["drains"][0]["bytes_done"], h.StatusView()["drains"][0]["bytes"]);
  EXPECT_EQ(LevelOf(1), Level::kMemory);
  EXPECT_EQ(Count("attempt_durable"), 0u);
  EXPECT_EQ(Waiting(), 1u);
  h.manifest_status = {};
  h.Advance(60 * kNanosPerSecond);
  EXPECT_EQ(H::Body<WaitReply>(h.Wait(w.client, attempt, 0, Level::kDurable)).level, Level::kDurable);
  EXPECT_EQ(ShardsSent(), 1u) << "what is confirmed is not sent again";
}

TEST_F(Durable, F70_AStepOnItsWayIsNotRetired) {
  h.hold_store = true;
  SaveDurable(1);
  for (uint64_t step = 2; step <= 5; ++step) h.Save(w, step);
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{5, 4, 1}));
  h.hold_store = false;
  h.Release();
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{5, 4, 1})) << "listed still, but memory has let go of it";
  EXPECT_EQ(LevelOf(1), Level::kDurable);
  EXPECT_EQ(Count("attempt_evicted"), 1u);
  EXPECT_EQ(h.PoolBytes("sealed"), 2u);
}

TEST_F(Durable, WhatMemoryLetGoOfIsReadFromTheStore) {
  SaveDurable(1);
  for (uint64_t step = 2; step <= 4; ++step) h.Save(w, step);
  OpenReadRequest one;
  one.choice = ReadChoice::kStep;
  one.step = 1;
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client, one));
  EXPECT_EQ(pin.store, kStore);
  const auto shard = H::Body<ShardInfoReply>(h.Ask(w.client, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0}));
  EXPECT_EQ(shard.extents, 0u);
  EXPECT_EQ(SealRecord::Decode(shard.record.span())->key.step, 1u);
  EXPECT_FALSE(H::Body<ReportCorruptReply>(h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0})).confirmed);
  one.step = 4;
  const auto here = H::Body<OpenReadReply>(h.TryRead(w.client, one));
  EXPECT_EQ(here.store, kStore) << "in case memory lets go of it meanwhile";
  EXPECT_GT(H::Body<ShardInfoReply>(h.Ask(w.client, MessageType::kShardInfo, ShardRequest{here.pin, 0, 0})).extents, 0u);
}

TEST_F(Durable, ACorruptCopyInMemoryIsReplacedByTheStores) {
  SaveDurable(1);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client));
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  EXPECT_TRUE(H::Body<ReportCorruptReply>(h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0})).confirmed);
  EXPECT_EQ(LevelOf(1), Level::kDurable);
  EXPECT_EQ(H::Body<ShardInfoReply>(h.Ask(w.client, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0})).extents, 0u);
}

TEST_F(Durable, F61_AKillAtEveryLedgerEntryEndsDurable) {
  int entries = 0;
  {
    const size_t before = h.actions.size();
    SaveDurable(1);
    for (size_t i = before; i < h.actions.size(); ++i) entries += std::holds_alternative<action::Append>(h.actions[i]);
  }
  ASSERT_GE(entries, 6);  // Slot, lease, wish, seal, manifest, shard, manifest.
  for (const bool compact : {false, true}) {
    for (int n = 0; n < entries; ++n) {
      H k(8, 2, kStore);
      H::Writer writer = k.Open(k.Connect(1), 1);
      k.kill_after = n;
      const auto reserve = k.TryReserve(writer, 1);
      if (!k.killed) k.Ask(writer.client, MessageType::kMakeDurable, MakeDurableRequest{"job", Decode<ReserveReply>(reserve.body)->attempt});
      if (!k.killed) k.TrySeal(writer, Decode<ReserveReply>(reserve.body)->lease);
      ASSERT_TRUE(k.killed) << n;
      k.Restart();
      if (compact) {
        k.Compact();
        k.Restart();
      }
      // The client repeats what was not answered.
      writer.client = k.Reconnect(writer.client);
      const Frame again = k.TryReserve(writer, 1);
      if (again.status == StatusCode::kOk) {
        const auto lease = *Decode<ReserveReply>(again.body);
        k.Ask(writer.client, MessageType::kMakeDurable, MakeDurableRequest{"job", lease.attempt});
        EXPECT_EQ(k.TrySeal(writer, lease.lease).status, StatusCode::kOk) << n;
      }
      const auto list = k.List(writer.client);
      ASSERT_EQ(list.size(), 1u) << n;
      EXPECT_EQ(list[0].level, Level::kDurable) << n;
      EXPECT_EQ(k.stored.size(), 1u) << n << ": once, under one key (I-24)";
    }
  }
}

TEST_F(Durable, ARestartKnowsWhatTheStoreHas) {  // I-25
  SaveDurable(1);
  for (uint64_t step = 2; step <= 4; ++step) h.Save(w, step);
  const auto before = h.List(w.client);
  for (const bool compact : {false, true}) {
    if (compact) h.Compact();
    h.Restart();
    w.client = h.Reconnect(w.client);
    const auto after = h.List(w.client);
    ASSERT_EQ(after.size(), before.size());
    for (size_t i = 0; i < after.size(); ++i) EXPECT_EQ(after[i], before[i]) << i;
    EXPECT_EQ(h.PoolBytes("sealed"), 2u);
  }
}

// The extents of an evicted step went to another user, which makes new ones of them: the next worker cannot adopt its slots, and knows it all the same.
TEST_F(Durable, I25_AnEvictedStepWhoseMemoryIsGoneIsKnownAfterARestart) {
  H small(3, 2, kStore);
  H::Writer writer = small.Open(small.Connect(1), 1);
  SaveDurable(small, writer, 1);
  for (uint64_t step = 2; step <= 3; ++step) small.Save(writer, step);
  small.Die(writer.client);
  small.Save(small.Open(small.Connect(2, 1001), 2), 1);
  for (const bool compact : {false, true}) {
    if (compact) small.Compact();
    small.Restart();
    EXPECT_EQ(small.Steps(small.Connect(3)), (std::vector<uint64_t>{3, 2, 1})) << compact;
  }
}

TEST_F(Durable, ANodeThatLostItsMemoryResumesFromTheStore) {
  for (const uint64_t step : {10, 20}) SaveDurable(step);
  h.Save(w, 25);
  h.LoseMemory();
  const H::Client c = h.Connect(2);
  EXPECT_EQ(h.LatestStep(c), 20u);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(c));
  EXPECT_EQ(pin.store, kStore);
  H::Writer next{c, 0, TestId(9)};
  const Frame opened = h.TryOpen(next);
  const auto generation = *Decode<OpenGenerationReply>(opened.body);
  EXPECT_GT(generation.generation, w.generation) << "I-21: numbers go on, so that the old launch stays fenced";
  EXPECT_EQ(generation.parent_step, 20u);
  w = next;
  SaveDurable(30);
  EXPECT_EQ(h.Steps(c), (std::vector<uint64_t>{30, 20, 10}));
  ASSERT_EQ(h.stored.size(), 3u);
  EXPECT_EQ(h.stored[2].lineage.size(), 2u) << "with the generation that it continues";
}

TEST_F(Durable, I6_ALineageOfTheStoreIsRolledBackLikeAnyOther) {
  const Id128 first = SaveDurable(10);
  SaveDurable(20);
  w = h.Open(w.client, 2, 1, 0, ParentMode::kAttempt, first);
  SaveDurable(15);
  h.LoseMemory();
  const H::Client c = h.Connect(2);
  EXPECT_EQ(h.Steps(c), (std::vector<uint64_t>{15, 10, 20})) << "the abandoned branch last";
  EXPECT_EQ(h.LatestStep(c), 15u);
}

TEST_F(Durable, I31_AStoreThatCannotBeAskedIsNotAnEmptyOne) {
  SaveDurable(10);
  h.store_status = kDown;
  h.LoseMemory();
  const H::Client c = h.Connect(2);
  EXPECT_EQ(h.TryLatest(c).status, StatusCode::kUnavailable);
  EXPECT_EQ(h.TryRead(c).status, StatusCode::kUnavailable);
  H::Writer next{c, 0, TestId(9)};
  EXPECT_EQ(h.TryOpen(next).status, StatusCode::kUnavailable);
  h.store_status = {};
  h.Advance(2 * kNanosPerSecond);
  EXPECT_EQ(h.LatestStep(c), 10u) << "and is asked again";
}

TEST_F(Durable, I31_ADaemonThatIsToEndDoesNotCallTheUnknownEmpty) {
  SaveDurable(10);
  h.LoseMemory();
  const H::Client c = h.Connect(2);
  h.Step(event::Shutdown{});
  EXPECT_EQ(h.TryLatest(c).status, StatusCode::kUnavailable);
  EXPECT_EQ(h.TryRead(c).status, StatusCode::kUnavailable);
}

TEST_F(Durable, CallsWaitForTheListing) {
  SaveDurable(10);
  h.hold_store = true;
  h.LoseMemory();
  const H::Client c = h.Connect(2);
  EXPECT_EQ(h.TryLatest(c).status, StatusCode::kInternal) << "no answer yet";
  const uint64_t request = h.last_request;
  h.hold_store = false;
  h.Release();
  EXPECT_EQ(H::Body<AttemptInfo>(h.Reply(request)).step, 10u);
}

TEST_F(Durable, WhatMemoryKnowsNeedsNoStore) {  // I-22
  h.Save(w, 1);
  h.store_status = kDown;
  h.Restart();
  w.client = h.Reconnect(w.client);
  EXPECT_EQ(h.LatestStep(w.client), 1u);
  h.Save(w, 2);
  EXPECT_EQ(h.LatestStep(w.client), 2u);
}

TEST_F(Durable, I22_ASaveThatNeedsTheMemoryOfAStepThatTheStoreDoesNotTakeGetsIt) {
  H small(3, 1, kStore);  // One retained, one being written, one more.
  H::Writer writer = small.Open(small.Connect(1), 1);
  small.store_status = kDown;
  const Id128 first = SaveDurable(small, writer, 1);
  for (uint64_t step = 2; step <= 6; ++step) SaveDurable(small, writer, step);
  EXPECT_EQ(small.LatestStep(writer.client), 6u);
  const Frame told = small.Wait(writer.client, first, 0, Level::kDurable);
  EXPECT_NE(told.status, StatusCode::kDeadline);
  EXPECT_EQ(small.StatusView()["durable"]["completed"], 0);
}

TEST_F(Durable, F70_WhileTheStoreTakesItASaveIsRefused) {
  H small(2, 1, kStore);
  H::Writer writer = small.Open(small.Connect(1), 1);
  small.hold_store = true;
  SaveDurable(small, writer, 1);
  small.Save(writer, 2);
  EXPECT_EQ(small.TryReserve(writer, 3).status, StatusCode::kNoSpace);
  small.hold_store = false;
  small.Release();
  small.Save(writer, 4);
  EXPECT_EQ(small.LatestStep(writer.client), 4u);
}

TEST_F(Durable, F66_WhatDoesNotMatchIsNotDurable) {
  h.store_status = Status(StatusCode::kCorrupt, "block 3 does not match its checksum");
  const Id128 attempt = SaveDurable(1);
  EXPECT_EQ(Waiting(), 1u) << "it may have happened on the way";
  for (int i = 0; i < 5; ++i) h.Advance(2 * kNanosPerSecond);
  EXPECT_EQ(LevelOf(1), Level::kMemory);
  const Frame told = h.Wait(w.client, attempt, 0, Level::kDurable);
  EXPECT_EQ(told.status, StatusCode::kClosed);
  EXPECT_NE(AsText(told.body).find("block 3"), std::string_view::npos);
  EXPECT_EQ(Waiting(), 0u);
  EXPECT_EQ(Count("durable_given_up"), 1u);
}

TEST_F(Durable, PolicyChoosesEveryNthStep) {
  H::Writer writer = w;
  H p(16, 2, kStore);
  p.config.durable_every = 10;
  p.Restart();
  writer = p.Open(p.Connect(1), 1);
  for (uint64_t step = 5; step <= 20; step += 5) p.Save(writer, step);
  std::vector<uint64_t> steps;
  for (const StoredStep& step : p.stored) steps.push_back(step.records[0].key.step);
  EXPECT_EQ(steps, (std::vector<uint64_t>{10, 20}));
}

TEST_F(Durable, PolicyChoosesByTime) {
  H p(16, 2, kStore);
  p.config.durable_interval = 100 * kNanosPerSecond;
  p.Restart();
  const H::Writer writer = p.Open(p.Connect(1), 1);
  for (uint64_t step = 1; step <= 6; ++step) {
    p.Save(writer, step);
    p.Advance(40 * kNanosPerSecond);
  }
  std::vector<uint64_t> steps;
  for (const StoredStep& step : p.stored) steps.push_back(step.records[0].key.step);
  EXPECT_EQ(steps, (std::vector<uint64_t>{1, 4}));
}

TEST_F(Durable, ADaemonThatIsToEndDrainsFirst) {
  h.hold_store = true;
  SaveDurable(1);
  h.Step(event::Shutdown{});
  EXPECT_FALSE(Ends());
  EXPECT_TRUE(h.core->IsDraining());
  h.hold_store = false;
  h.Release();
  EXPECT_TRUE(Ends());
  EXPECT_EQ(h.stored.size(), 1u);
}

// Also what is still being copied: its ranks are at it, and the trainer need not know that the daemon is to end.
TEST_F(Durable, ADaemonThatIsToEndWaitsForTheStepThatIsBeingWritten) {
  const ReserveReply r = h.Reserve(w, 1);
  ASSERT_EQ(Ask(r.attempt).status, StatusCode::kOk);
  h.Step(event::Shutdown{});
  EXPECT_FALSE(Ends());
  EXPECT_TRUE(h.core->IsDraining());
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kOk);
  EXPECT_TRUE(Ends());
  EXPECT_EQ(h.stored.size(), 1u);
}

TEST_F(Durable, ADaemonThatIsToEndDoesNotWaitInVain) {
  // A rank that has not begun cannot begin any more; one that gives up, or dies, does not come back.
  const H::Writer pair = h.Open(h.Connect(3), 3, 2, 0, ParentMode::kFresh);
  const ReserveReply half = h.Reserve(pair, 1);
  ASSERT_EQ(h.Ask(pair.client, MessageType::kMakeDurable, MakeDurableRequest{"job", half.attempt}).status, StatusCode::kOk);
  const ReserveReply other = h.Reserve(h.Open(h.Connect(4), 4, 1, 0, ParentMode::kFresh, {}, "other"), 1);  // Nobody asked for it to be durable.
  (void)other;
  const H::Writer last = h.Open(h.Connect(5), 5, 1, 0, ParentMode::kFresh, {}, "third");
  const ReserveReply wanted = h.Reserve(last, 1);
  ASSERT_EQ(h.Ask(last.client, MessageType::kMakeDurable, MakeDurableRequest{"third", wanted.attempt}).status, StatusCode::kOk);
  h.Step(event::Shutdown{});
  EXPECT_FALSE(Ends());
  h.Abort(last.client, wanted.lease);
  EXPECT_TRUE(Ends());
}

TEST_F(Durable, FewShardsAreOnTheirWayAtOnce) {
  h.hold_store = true;
  for (const uint64_t step : {1, 2, 3, 4}) SaveDurable(step);
  EXPECT_EQ(ShardsSent(), 2u);
  EXPECT_EQ(Waiting(), 4u);
  h.hold_store = false;
  h.Release();
  EXPECT_EQ(Waiting(), 0u);
  std::vector<uint64_t> steps;
  for (const StoredStep& step : h.stored) steps.push_back(step.records[0].key.step);
  EXPECT_EQ(steps, (std::vector<uint64_t>{1, 2, 3, 4})) << "the oldest first";
}

// Killed between any two entries of what a listing told, the next worker knows all of it in the end (I-25).
TEST_F(Durable, AKillWhileTheListingIsWrittenDownLosesNothing) {
  const Id128 first = SaveDurable(10);
  SaveDurable(20);
  w = h.Open(w.client, 2, 1, 0, ParentMode::kAttempt, first);
  SaveDurable(15);
  for (int n = 0;; ++n) {
    H k(8, 2, kStore);
    k.stored = h.stored;
    k.config.markers = h.config.markers;
    k.LoseMemory();
    k.kill_after = n;
    k.TryLatest(k.Connect(2));
    const bool killed = k.killed;
    if (killed) k.Restart();
    const H::Client c = k.Connect(3);
    EXPECT_EQ(k.Steps(c), (std::vector<uint64_t>{15, 10, 20})) << n;
    EXPECT_EQ(k.LatestStep(c), 15u) << n;
    if (!killed) break;
    ASSERT_LT(n, 100);
  }
}

// Another daemon made them durable after this one had looked (I-31).
TEST_F(Durable, WhatIsOnlyInTheStoreIsLookedUpAgain) {
  H other(8, 2, kStore);
  const H::Client c = other.Connect(2);
  EXPECT_EQ(other.TryLatest(c).status, StatusCode::kNotFound);
  SaveDurable(10);
  other.stored = h.stored;
  other.Advance(2 * kNanosPerSecond);
  EXPECT_EQ(other.LatestStep(c), 10u);
  SaveDurable(20);
  other.stored = h.stored;
  other.Advance(2 * kNanosPerSecond);
  EXPECT_EQ(other.LatestStep(c), 20u);
}

TEST_F(Durable, I38_NobodySeesAnothersStepsOfTheSameName) {
  SaveDurable(10);
  h.LoseMemory();
  EXPECT_EQ(h.TryLatest(h.Connect(2, 1001)).status, StatusCode::kNotFound);
  EXPECT_EQ(h.LatestStep(h.Connect(3)), 10u);
}

TEST_F(Durable, F68_ADamagedNewestStepIsNotPassedOver) {
  SaveDurable(10);
  h.newest_damaged = Status(StatusCode::kIncomplete, "step-20/lineage.json is missing");
  h.LoseMemory();
  const H::Client c = h.Connect(2);
  EXPECT_EQ(h.TryLatest(c).status, StatusCode::kIncomplete);
  EXPECT_EQ(h.TryRead(c).status, StatusCode::kIncomplete);
  H::Writer next{c, 0, TestId(9)};
  EXPECT_EQ(h.TryOpen(next).status, StatusCode::kIncomplete);
  OpenReadRequest one;
  one.choice = ReadChoice::kStep;
  one.step = 10;
  EXPECT_EQ(H::Body<OpenReadReply>(h.TryRead(c, one)).info.step, 10u) << "by explicit choice";
}

TEST_F(Durable, AListingThatTakesLongIsNotWaitedFor) {  // I-29
  SaveDurable(10);
  h.hold_store = true;
  h.LoseMemory();
  const H::Client c = h.Connect(2);
  h.TryLatest(c);
  const uint64_t request = h.last_request;
  h.Advance(25 * kNanosPerSecond);
  EXPECT_EQ(h.Reply(request).status, StatusCode::kUnavailable);
  h.hold_store = false;
  h.Release();
  EXPECT_EQ(h.LatestStep(c), 10u);
}

TEST_F(Durable, WhoeverWaitsForAStepThatThePolicyChoosesIsNotTurnedAway) {
  H p(16, 2, kStore);
  p.config.durable_every = 10;
  p.Restart();
  const H::Writer writer = p.Open(p.Connect(1), 1);
  const ReserveReply r = p.Reserve(writer, 10);
  p.Wait(writer.client, r.attempt, 60 * kNanosPerSecond, Level::kDurable);
  const uint64_t waits = p.last_request;
  p.TrySeal(writer, r.lease);
  EXPECT_EQ(H::Body<WaitReply>(p.Reply(waits)).level, Level::kDurable);
}

TEST_F(Durable, I28_ACorruptDurableStepGivesItsMemoryBack) {
  SaveDurable(1);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client));
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0});
  h.block_check = {};
  h.Ask(w.client, MessageType::kUnpin, PinRequest{pin.pin});
  for (uint64_t step = 2; step <= 4; ++step) h.Save(w, step);
  EXPECT_EQ(h.PoolBytes("sealed"), 2u);
}

TEST_F(Durable, I17_AStepThatIsBeingReadFromTheStoreStaysKnown) {
  SaveDurable(1);
  for (uint64_t step = 2; step <= 4; ++step) SaveDurable(step);
  OpenReadRequest one;
  one.choice = ReadChoice::kStep;
  one.step = 1;
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client, one));
  for (uint64_t step = 5; step <= 40; ++step) {
    SaveDurable(step);
    h.Ask(w.client, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0});
  }
  EXPECT_EQ(H::Body<ShardInfoReply>(h.Ask(w.client, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0})).extents, 0u);
}

TEST_F(Durable, AStepThatIsCompleteIsNotWrittenAgain) {
  SaveDurable(1);
  for (uint64_t step = 2; step <= 4; ++step) h.Save(w, step);
  EXPECT_EQ(h.TryReserve(w, 1).status, StatusCode::kClosed);
}

TEST_F(Durable, I22_AStoreThatHangsGivesWayToo) {
  H small(2, 1, kStore);
  H::Writer writer = small.Open(small.Connect(1), 1);
  small.hold_store = true;
  const Id128 first = SaveDurable(small, writer, 1);
  small.Save(writer, 2);
  EXPECT_EQ(small.TryReserve(writer, 3).status, StatusCode::kNoSpace);
  small.Advance(31 * kNanosPerSecond);
  EXPECT_EQ(small.StatusView()["durable"]["steps_in_trouble"], 1);
  EXPECT_EQ(small.StatusView()["drains"][0]["trouble"], "nothing has arrived there for 31 s");
  small.Save(writer, 4);
  EXPECT_EQ(small.Wait(writer.client, first, 0, Level::kDurable).status, StatusCode::kClosed);
}

// F70: what is being read back, or waits for its turn, is on its way.
TEST_F(Durable, WhatIsReadBackIsNotStalled) {
  h.hold_store = true;
  SaveDurable(1);
  const auto* sent = FirstSent();
  ASSERT_TRUE(sent);
  const Hash256 record = sent->record.Identity();
  for (int i = 0; i < 4; ++i) {
    h.Advance(20 * kNanosPerSecond);
    h.Step(event::ShardProgress{record, 0, true});
    EXPECT_EQ(h.StatusView()["durable"]["steps_in_trouble"], 0);
  }
  h.Advance(31 * kNanosPerSecond);
  h.Step(event::ShardProgress{record, 0, false});
  EXPECT_EQ(h.StatusView()["durable"]["steps_in_trouble"], 1);
}

TEST_F(Durable, NoDeadlineStaysDueWhileAFailedStepWaitsForItsTurn) {
  h.store_status = kDown;
  SaveDurable(1);
  h.hold_store = true;
  for (const uint64_t step : {2, 3}) SaveDurable(step);
  h.Advance(5 * kNanosPerSecond);  // Fails if ticks do not end.
  EXPECT_EQ(Waiting(), 3u);
}

// Something else happens after the pause and before the tick: that must not be taken for the tick.
TEST_F(Durable, I30_AFailedStepIsTriedAgainWhateverHappensMeanwhile) {
  h.store_status = kDown;
  const Id128 attempt = SaveDurable(1);
  h.store_status = {};
  h.now += 5 * kNanosPerSecond;
  h.Connect(2);
  h.Advance(60 * kNanosPerSecond);
  EXPECT_EQ(H::Body<WaitReply>(h.Wait(w.client, attempt, 0, Level::kDurable)).level, Level::kDurable);
}

TEST_F(Durable, ProgressIsShown) {
  h.hold_store = true;
  SaveDurable(1);
  const auto* sent = FirstSent();
  ASSERT_TRUE(sent);
  h.Step(event::ShardProgress{sent->record.Identity(), 1000});
  const auto drain = h.StatusView()["drains"][0];
  EXPECT_EQ(drain["bytes_done"], 1000);
  EXPECT_EQ(drain["bytes"], 4096);
  EXPECT_EQ(drain["step"], 1);
  EXPECT_TRUE(h.StatusView(1001)["drains"].empty()) << "I-38";
}

TEST_F(Durable, OnlyTheNewestOfWhatMemoryLetGoOfAreListed) {
  const Id128 first = SaveDurable(1);
  for (uint64_t step = 2; step <= 70; ++step) SaveDurable(step);
  EXPECT_EQ(h.Steps(w.client).size(), 18u);  // 16, and the two that memory has.
  EXPECT_EQ(h.stored.size(), 70u) << "the store keeps them all";
  EXPECT_EQ(H::Body<WaitReply>(h.Wait(w.client, first, 0, Level::kDurable)).level, Level::kDurable);
}

// I-22: what is read keeps its memory, so giving it up would help nobody.
TEST_F(Durable, I22_AStepThatIsReadIsNotGivenUpInVain) {
  H small(2, 1, kStore);
  const H::Writer writer = small.Open(small.Connect(1), 1);
  small.store_status = kDown;
  SaveDurable(small, writer, 1);
  ASSERT_EQ(small.TryRead(writer.client).status, StatusCode::kOk);
  small.Save(writer, 2);
  EXPECT_EQ(small.TryReserve(writer, 3).status, StatusCode::kNoSpace);
  EXPECT_EQ(small.StatusView()["durable"]["steps_waiting"], 1);
}

// I-14, of what is listed: a launch that was rolled back goes on from a step that is older than those it left behind.
TEST_F(Durable, AfterARollbackWhatItGoesOnFromIsNotForgottenBeforeWhatItLeftBehind) {
  std::map<uint64_t, Id128> attempts;
  for (uint64_t step = 1; step <= 25; ++step) attempts[step] = SaveDurable(step);
  const H::Writer back = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kAttempt, attempts.at(12));
  for (uint64_t step = 13; step <= 20; ++step) SaveDurable(h, back, step);
  std::set<Id128> listed;
  for (const AttemptInfo& i : h.List(back.client)) {
    if (i.state == AttemptState::kComplete) listed.insert(i.attempt);
  }
  EXPECT_EQ(listed.size(), 18u);
  for (uint64_t step = 8; step <= 12; ++step) EXPECT_TRUE(listed.contains(attempts.at(step))) << step;
  EXPECT_FALSE(listed.contains(attempts.at(14)));
}

}  // namespace
}  // namespace sp
