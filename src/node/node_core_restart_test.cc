// NodeCore after a SIGKILL of its worker: a new core from the ledger's bytes knows what the old one knew, wherever the kill came (I-25).
#include <gtest/gtest-spi.h>

#include "node/node_core_harness.h"

namespace sp {
namespace {

using H = NodeCoreHarness;

// Everything that a listing or a status tells, without what a new worker counts anew.
std::string View(H& h) {
  std::string view;
  for (uint32_t uid : {1000u, 1001u}) {
    nlohmann::json status = h.StatusView(uid);
    for (const char* what : {"incarnation", "connections", "sessions", "totals"}) status.erase(what);
    for (auto& lease : status["leases"]) lease.erase("expires_ms");
    view += status.dump() + "\n";
  }
  return view;
}

// A state with everything in it: retired, complete, corrupt, pinned, open, sealed in part, a zombie, two tenants, free extents of both.
void Fill(H& h) {
  const H::Writer a = h.Open(h.Connect(1), 1), p0 = h.Open(h.Connect(2), 2, 2, 0, ParentMode::kLatest, {}, "pair"),
                  p1 = h.Open(h.Connect(3), 2, 2, 1, ParentMode::kLatest, {}, "pair"), b = h.Open(h.Connect(4, 1001), 4);
  for (uint64_t step = 1; step <= 4; ++step) h.Save(a, step);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(a.client));
  h.Ask(a.client, MessageType::kPinStep, PinStepRequest{"job", pin.info.attempt, true});
  h.Save(a, 5);
  const auto corrupt = H::Body<OpenReadReply>(h.TryRead(a.client));
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  h.Ask(a.client, MessageType::kReportCorrupt, ShardRequest{corrupt.pin, 0, 0});
  h.Save(p0, 7);
  h.Save(p1, 7);
  const ReserveReply late = h.Reserve(p0, 8);
  h.Advance(h.config.lease_ns);
  EXPECT_EQ(h.TrySeal(p0, late.lease).status, StatusCode::kFenced);
  h.Save(p1, 9);
  h.Reserve(p0, 9);
  h.Save(b, 1);
  H::Writer gone = h.Open(h.Connect(5, 1001), 5, 1, 0, ParentMode::kLatest, {}, "short");
  h.Reserve(gone, 1);
  h.Die(gone.client);
}

TEST(Restart, EverythingIsKnownAgain) {  // I-25
  H h(32);
  Fill(h);
  const std::string before = View(h);
  h.Restart();
  EXPECT_EQ(View(h), before);
  h.Restart();
  EXPECT_EQ(View(h), before);
}

bool Reads(const H& h) {
  return std::any_of(h.actions.begin(), h.actions.end(), [](const Action& a) { return std::holds_alternative<action::ReadStructure>(a); });
}

// Sealed by all ranks; the kill comes before the manifest.
Id128 SealAndKill(H& h, const H::Writer& w, uint64_t step) {
  const ReserveReply r = h.Reserve(w, step);
  h.kill_after = 1;
  h.TrySeal(w, r.lease);
  EXPECT_TRUE(h.killed);
  return r.attempt;
}

TEST(Restart, AHeaderThatIsTooLargeNowClosesItsAttemptUnread) {  // I-27: an out-of-memory kill must not repeat itself.
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const Id128 attempt = SealAndKill(h, w, 2);
  h.config.header_max = 1000;
  h.Restart();
  EXPECT_FALSE(Reads(h));
  const H::Client again = h.Reconnect(w.client);
  EXPECT_EQ(h.Wait(again, attempt).status, StatusCode::kClosed);
  EXPECT_NE(AsText(h.Wait(again, attempt).body).find("header_max"), std::string_view::npos);
  EXPECT_EQ(h.LatestStep(again), 1u) << "complete steps need their headers no more";
}

TEST(Restart, AStructureThatCannotBeReadOrKeptClosesItsAttempt) {
  for (const bool malformed : {true, false}) {
    H h;
    const H::Writer w = h.Open(h.Connect(1), 1);
    h.Save(w, 1);
    const Id128 attempt = SealAndKill(h, w, 2);
    if (malformed) h.unknown_structures.insert(H::StructureOf(1, 0));
    else h.config.structures_max = 100;
    h.Restart();
    EXPECT_TRUE(Reads(h));
    const H::Client again = h.Reconnect(w.client);
    EXPECT_EQ(h.Wait(again, attempt).status, StatusCode::kClosed) << malformed;
    EXPECT_EQ(h.LatestStep(again), 1u);
  }
}

TEST(Restart, EverythingIsKnownAgainFromASnapshot) {  // I-25
  H h(32);
  Fill(h);
  const std::string before = View(h);
  h.Compact();
  h.Restart();
  EXPECT_EQ(View(h), before);
  const auto once = h.core->Snapshot();
  h.Compact();
  h.Restart();
  EXPECT_EQ(h.core->Snapshot(), once);
}

TEST(Restart, AKillAtEveryLedgerEntryLeavesAWholeState) {  // F13, F14, F17, I-1, I-25
  H whole(32);
  Fill(whole);
  int entries = 0;
  for (const Action& a : whole.actions) entries += std::holds_alternative<action::Append>(a);
  for (int n = 0; n < entries; ++n) {
    H h(32);
    h.kill_after = n;
    ::testing::TestPartResultArray ignored;
    {
      // After the kill nobody answers; the expectations of the script do not hold then, only those below.
      ::testing::ScopedFakeTestPartResultReporter fake(::testing::ScopedFakeTestPartResultReporter::INTERCEPT_ONLY_CURRENT_THREAD, &ignored);
      Fill(h);
    }
    ASSERT_TRUE(h.killed) << n;
    h.Restart({TestId(1), TestId(2), TestId(3), TestId(4), TestId(5)});
    h.Advance(3600 * kNanosPerSecond);
    EXPECT_EQ(h.PoolBytes("leased") + h.PoolBytes("zombie") + h.PoolBytes("idle") + h.PoolBytes("pending"), 0u) << n;
    EXPECT_EQ(h.StatusView()["read_pins"], 0) << n;
    for (uint32_t uid : {1000u, 1001u}) {
      const nlohmann::json status = h.StatusView(uid);
      for (const auto& ns : status["namespaces"]) EXPECT_EQ(ns["open_attempts"], 0) << n << ns.dump();
    }
  }
}

TEST(Restart, ALeaseGoesOnAndItsSealIsAccepted) {  // F13
  H h;
  H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const ReserveReply r = h.Reserve(w, 2);
  h.Restart();
  w.client = h.Reconnect(w.client);
  EXPECT_EQ(h.Reserve(w, 2).lease, r.lease);
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kOk);
  EXPECT_EQ(h.LatestStep(w.client), 2u);
}

TEST(Restart, ALostSealReplyIsAnsweredAgain) {  // I-32
  H h;
  H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  const auto before = H::Body<SealReply>(h.TrySeal(w, r.lease));
  h.Restart();
  w.client = h.Reconnect(w.client);
  EXPECT_EQ(H::Body<SealReply>(h.TrySeal(w, r.lease)).record, before.record);
}

TEST(Restart, AKillBetweenTheLastSealAndTheManifestIsMadeGood) {  // F3
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  h.Save(a, 1);
  const ReserveReply r = h.Reserve(b, 1);
  h.kill_after = 1;  // Sealed is written, Manifest is not.
  h.TrySeal(b, r.lease);
  ASSERT_TRUE(h.killed);
  h.Restart();
  EXPECT_EQ(h.LatestStep(h.Connect(9)), 1u);
}

TEST(Restart, AKillBeforeTheMarkerWasWrittenStillLeavesOne) {  // I-31: the keeper's later loss would have looked like a fresh start
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  h.config.markers.clear();
  h.Restart();
  EXPECT_EQ(h.config.markers, std::vector<Hash256>{MarkerOf(1000, "job")});
}

TEST(Restart, AKillBetweenTombstoneAndLeaseEndLeavesNoSlotThatCanBeSealed) {  // I-28: the shard was sealed into a closed attempt and leaked
  H h;
  H::Writer a = h.Open(h.Connect(1), 1, 2, 0);
  const H::Writer b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 1), rb = h.Reserve(b, 1);
  h.kill_after = 2;  // LeaseEnded of b, Tombstone; a's LeaseEnded is lost.
  h.Abort(b.client, rb.lease);
  ASSERT_TRUE(h.killed);
  h.Restart();
  a.client = h.Reconnect(a.client);
  EXPECT_EQ(h.TrySeal(a, ra.lease).status, StatusCode::kClosed);  // No newer launch, and its time is not over.
  EXPECT_EQ(h.PoolBytes("sealed"), 0u);
  EXPECT_EQ(h.PoolBytes("zombie"), 1u);
}

TEST(Restart, AKillBetweenLeaseEndAndTombstoneClosesTheAttempt) {
  H h;
  H::Writer a = h.Open(h.Connect(1), 1, 2, 0);
  const H::Writer b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 1), rb = h.Reserve(b, 1);
  h.kill_after = 1;
  h.Abort(b.client, rb.lease);
  ASSERT_TRUE(h.killed);
  h.Restart();
  a.client = h.Reconnect(a.client);
  EXPECT_EQ(h.Wait(a.client, ra.attempt).status, StatusCode::kClosed);
}

TEST(Restart, AGoodbyeEndsItsZombiesForTheNextWorkerToo) {  // A stale zombie made Abort look for a slot that was gone
  H h;
  H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  h.Advance(h.config.lease_ns);
  h.Ask(w.client, MessageType::kBye, Empty{});
  h.Die(w.client);
  h.Restart();
  EXPECT_EQ(h.Abort(h.Reconnect(w.client), r.lease).status, StatusCode::kOk);
}

TEST(Restart, FreeMemoryOfASnapshotIsNobodysForEver) {  // Another tenant got NO_SPACE although everything was free
  H h(1, 1);
  const H::Writer a = h.Open(h.Connect(1, 1000), 1);
  h.Reserve(a, 1);
  h.Die(a.client);
  h.Compact();
  h.Restart();
  const H::Writer b = h.Open(h.Connect(2, 1001), 2);
  EXPECT_EQ(h.TryReserve(b, 1).status, StatusCode::kOk);
  EXPECT_EQ(h.PoolBytes("bytes"), 1u);
}

TEST(Restart, ASlotThatWasBeingRebuiltIsNotGivenToAnotherProcess) {  // I-10: its writer lives and has it mapped
  for (const bool compact : {false, true}) {  // A snapshot forgot to whom they were lent.
    H h(2);
    H::Writer a = h.Open(h.Connect(1), 1);
    h.Ask(a.client, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 2});
    h.kill_after = 2;  // Both SlotGone, the new Slot is lost.
    h.TryReserve(a, 1, 0, 2 * 8192);
    ASSERT_TRUE(h.killed);
    h.Restart();
    if (compact) h.Compact();
    if (compact) h.Restart();
    EXPECT_EQ(h.PoolBytes("free"), 2u);
    const H::Writer b = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kLatest, {}, "other");
    EXPECT_EQ(h.TryReserve(b, 1).status, StatusCode::kNoSpace) << compact;
    a.client = h.Reconnect(a.client);
    EXPECT_EQ(h.TryReserve(a, 2).status, StatusCode::kOk) << compact;
  }
}

// A process whose only object had two slots of one extent, all there is, and said goodbye.
H::Client Goodbye(H& h) {
  H::Client c = h.Connect(1);
  h.Ask(c, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 2});
  h.Ask(c, MessageType::kBye, Empty{});
  h.Disconnect(c);
  c.session = TestId(77);  // Of the next.
  return c;
}

TEST(Restart, SlotsOfAnEndedSessionAreStillItsProcesss) {  // Was a spurious NO_SPACE: that it had ended was forgotten
  for (const uint64_t extents : {1, 2}) {
    H h(2, 1);
    const H::Client next = Goodbye(h);
    h.Restart();
    const H::Writer other = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kLatest, {}, "other");
    EXPECT_EQ(h.TryReserve(other, 1).status, StatusCode::kNoSpace);  // I-10
    const H::Writer w = h.Open(h.Reconnect(next), 1);
    EXPECT_EQ(h.Reserve(w, 1, 0, extents * 8192).extents, extents);
  }
}

TEST(Restart, SlotsOfAnEndedSessionThatWereBeingRebuiltAreStillItsProcesss) {
  H h(2, 1);
  const H::Writer w = h.Open(h.Reconnect(Goodbye(h)), 1);
  h.kill_after = 2;  // Both SlotGone, the new Slot is lost.
  h.TryReserve(w, 1, 0, 2 * 8192);
  ASSERT_TRUE(h.killed);
  h.Restart();
  const H::Writer other = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kLatest, {}, "other");
  EXPECT_EQ(h.TryReserve(other, 1).status, StatusCode::kNoSpace);  // I-10
  H::Writer again = w;
  again.client = h.Reconnect(w.client);
  EXPECT_EQ(h.TryReserve(again, 2, 0, 2 * 8192).status, StatusCode::kOk);
}

TEST(Restart, SlotsOfASessionThatIsConnectedAreItsOwn) {
  H h(2, 1);
  H::Client a = h.Connect(1);
  h.Ask(a, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 2});
  h.Restart();
  a = h.Reconnect(a);
  H::Client b = a;
  b.session = TestId(77);
  const H::Writer w = h.Open(h.Reconnect(b), 1);
  EXPECT_EQ(h.TryReserve(w, 1).status, StatusCode::kNoSpace);
  EXPECT_EQ(h.PoolBytes("idle"), 2u);
}

TEST(Restart, AClosedAttemptOfASnapshotIsNotCalledFenced) {  // I-31: the job would have stopped for nothing
  H h;
  H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  h.Abort(w.client, r.lease);
  h.Compact();
  h.Restart();
  w.client = h.Reconnect(w.client);
  EXPECT_EQ(h.Wait(w.client, r.attempt).status, StatusCode::kClosed);
}

TEST(Restart, ASnapshotKeepsTheOrderOfAttempts) {  // The newer, open attempt was closed as overtaken by the older
  H h;
  H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  h.Save(a, 1);
  const ReserveReply second = h.Reserve(a, 2);
  h.Compact();
  h.Restart();
  a.client = h.Reconnect(a.client);
  b.client = h.Reconnect(b.client);
  h.TryOpen(b);
  h.Save(b, 1);
  EXPECT_EQ(h.LatestStep(a.client), 1u);
  EXPECT_EQ(h.TrySeal(a, second.lease).status, StatusCode::kOk);
  h.Save(b, 2);
  EXPECT_EQ(h.LatestStep(a.client), 2u);
}

TEST(Restart, AnAttemptWhoseSealedRankDiedDoesNotWaitForUnknownOnes) {  // I-28
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0);
  h.Save(a, 1);
  h.Restart({a.client.session});
  EXPECT_EQ(h.PoolBytes("sealed"), 0u);
  EXPECT_EQ(h.PoolBytes("free"), 1u);
}

TEST(Restart, ReadersKeepTheirPins) {  // I-17, I-25
  H h(8, 1);
  H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  H::Client reader = h.Connect(2);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(reader));
  h.Restart();
  w.client = h.Reconnect(w.client);
  reader = h.Reconnect(reader);
  h.Save(w, 2);
  EXPECT_EQ(h.Ask(reader, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0}).status, StatusCode::kOk);
  EXPECT_EQ(h.Steps(w.client).size(), 2u);
}

TEST(Restart, UnwatchableExtentsAreGoneWhereverTheKillComes) {  // I-10
  for (int n = 0; n < 6; ++n) {
    H h(2);
    const H::Writer a = h.Open(h.Connect(1), 1);
    h.Step(event::SessionUnwatchable{a.client.session});
    h.Ask(a.client, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 2});
    h.Disconnect(a.client);
    h.kill_after = n;
    h.Advance(h.config.lease_ns);
    if (!h.killed) {
      EXPECT_TRUE(h.extents.empty());
      EXPECT_EQ(n, 2);
      break;
    }
    h.Restart();
    h.Step(event::SessionUnwatchable{a.client.session});
    const std::set<uint32_t> tainted = h.extents;
    const H::Writer b = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kLatest, {}, "other");
    h.TryReserve(b, 1);
    for (const LedgerEntry& e : h.core->Snapshot()) {
      const auto* slot = std::get_if<ledger::Slot>(&e);
      if (!slot || slot->session.session != b.client.session) continue;
      for (uint32_t id : slot->extents) EXPECT_FALSE(tainted.contains(id)) << n;
    }
  }
}

TEST(Restart, AnySubsetOfADamagedLedgerIsBorne) {  // F72, T-11: it always starts, and what is left is consistent
  H h(32);
  Fill(h);
  const std::vector<LedgerEntry> all = h.ledger->Read().entries;
  uint64_t state = 1;
  for (int round = 0; round < 400; ++round) {
    Ledger::Contents contents;
    const uint64_t damage = 2 + static_cast<uint64_t>(round) % 40;
    for (const LedgerEntry& e : all) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      if (state >> 33 < (uint64_t{1} << 31) / damage) ++contents.damaged_entries;
      else contents.entries.push_back(e);
    }
    CoreConfig config = h.config;
    config.incarnation = 2;
    NodeCore core(config);
    core.Restore(h.now, contents, {h.extents.begin(), h.extents.end()});
    ASSERT_TRUE(core.CheckInvariants().ok()) << round << " " << core.CheckInvariants().message();
    for (uint8_t n = 1; n <= 5; ++n) core.Step(h.now, event::SessionDied{TestId(n)});
    core.Step(h.now + 7200 * kNanosPerSecond, event::Tick{});
    ASSERT_TRUE(core.CheckInvariants().ok()) << round << " " << core.CheckInvariants().message();
    core.StatusJson(h.now, 1000, false);
    core.Snapshot();
  }
}

TEST(Restart, UnexplainedExtentsOfADamagedLedgerAreReplaced) {  // I-38
  H h(2);
  Ledger::Contents contents;
  contents.damaged_entries = 1;
  CoreConfig config = h.config;
  config.incarnation = 2;
  NodeCore core(config);
  bool dropped = false;
  for (const Action& a : core.Restore(h.now, contents, {1, 2})) dropped |= std::holds_alternative<action::DropExtents>(a);
  EXPECT_TRUE(dropped);
}

}  // namespace
}  // namespace sp
