// NodeCore, one message at a time: what it does, what it refuses, what it leaves behind. Restarts: node_core_restart_test.cc.
#include "node/node_core_harness.h"

namespace sp {
namespace {

using H = NodeCoreHarness;

// --- sessions ------------------------------------------------------------------------------------------------------------------------------

TEST(Sessions, HelloTellsWhoIsThere) {
  H h;
  const H::Client c = h.Connect(1);
  const auto reply = H::Body<HelloReply>(h.replies.at(1));
  EXPECT_EQ(reply.node, TestId(0xaa));
  EXPECT_EQ(reply.pool_bytes_max, 8u * 8192);
  EXPECT_EQ(h.StatusView()["connections"], 1);
  h.Disconnect(c);
  EXPECT_EQ(h.StatusView()["sessions"], 0);
}

TEST(Sessions, AnythingBeforeHelloClosesTheConnection) {
  H h;
  h.Step(event::Connected{9, 1000, 50, 7});
  EXPECT_EQ(h.Ask({9, {}, 1000, 50}, MessageType::kLatest, NamespaceRequest{"job", Level::kMemory, 0}).status, StatusCode::kProtocol);
  EXPECT_TRUE(std::holds_alternative<action::Close>(h.actions.back()));
}

TEST(Sessions, AnotherProtocolVersionIsRefused) {  // I-35
  H h;
  h.Step(event::Connected{9, 1000, 50, 7});
  HelloRequest hello;
  hello.session = TestId(1);
  hello.version_min = hello.version_max = 2;
  EXPECT_EQ(h.Ask({9, {}, 1000, 50}, MessageType::kHello, hello).status, StatusCode::kProtocol);
}

TEST(Sessions, ASilentConnectionIsClosedAfterItsHandshakeTime) {  // I-40
  H h;
  h.Step(event::Connected{9, 1000, 50, 7});
  h.Advance(h.config.handshake_ns);
  EXPECT_TRUE(std::holds_alternative<action::Close>(h.actions.back()));
  EXPECT_EQ(h.StatusView()["connections"], 0);
}

TEST(Sessions, ASessionOfAnotherProcessIsDenied) {  // I-38
  H h;
  h.Connect(1);
  for (const auto& [uid, pid] : {std::pair(1000u, 999u), std::pair(1001u, 101u)}) {
    h.Step(event::Connected{77, uid, pid, 7});
    HelloRequest hello;
    hello.session = TestId(1);
    EXPECT_EQ(h.Ask({77, {}, uid, pid}, MessageType::kHello, hello).status, StatusCode::kDenied);
  }
}

TEST(Sessions, AProcessWhoseStartCannotBeReadKeepsItsSession) {  // F51: at one of its connections /proc was unreadable
  H h;
  HelloRequest hello;
  hello.session = TestId(1);
  for (const uint64_t start_time : {uint64_t{0}, uint64_t{7}, uint64_t{0}}) {
    const H::Client c{h.next_connection++, TestId(1), 1000, 101};
    h.Step(event::Connected{c.connection, c.uid, c.pid, start_time});
    EXPECT_EQ(h.Ask(c, MessageType::kHello, hello).status, StatusCode::kOk);
  }
  const H::Client other{h.next_connection++, TestId(1), 1000, 102};
  h.Step(event::Connected{other.connection, other.uid, other.pid, 0});
  EXPECT_EQ(h.Ask(other, MessageType::kHello, hello).status, StatusCode::kDenied);
}

TEST(Sessions, ConnectionsAreLimitedPerIdentity) {  // I-40
  H h;
  h.config.connections_per_uid_max = 2;
  h.core = std::make_unique<NodeCore>(h.config);
  h.core->Restore(h.now, {}, {});
  h.Connect(1);
  h.Connect(2);
  h.Step(event::Connected{50, 1000, 50, 7});
  EXPECT_TRUE(std::holds_alternative<action::Close>(h.actions.back()));
  h.Connect(3, 1001);  // Another identity is not affected.
}

TEST(Sessions, MalformedBodiesAreRefusedAndTheConnectionClosed) {  // I-26, I-40
  H h;
  const H::Client c = h.Connect(1);
  for (int type = 2; type <= static_cast<int>(MessageType::kReportCorrupt); ++type) {
    Frame f{kProtocolVersion, static_cast<MessageType>(type), 1000u + static_cast<uint64_t>(type), StatusCode::kOk, {1, 2, 3}};
    h.Step(event::Received{c.connection, f});
    EXPECT_EQ(h.Reply(f.request_id).status, StatusCode::kProtocol) << type;
    EXPECT_TRUE(std::holds_alternative<action::Close>(h.actions.back())) << type;
  }
}

// --- generations ---------------------------------------------------------------------------------------------------------------------------

TEST(Generations, TheSameNonceIsTheSameGeneration) {  // I-32
  H h;
  const H::Client a = h.Connect(1), b = h.Connect(2);
  EXPECT_EQ(h.Open(a, 1, 2, 0).generation, 1u);
  EXPECT_EQ(h.Open(b, 1, 2, 1).generation, 1u);
  EXPECT_EQ(h.Open(a, 1, 2, 0).generation, 1u);
}

TEST(Generations, RefusalsNameTheReason) {
  H h;
  const H::Client a = h.Connect(1);
  H::Writer w{a, 0, TestId(1), 2, 0};
  const auto open = [&](auto change) {
    H::Writer bad = w;
    change(bad);
    return h.TryOpen(bad).status;
  };
  EXPECT_EQ(open([](H::Writer& x) { x.nonce = {}; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(open([](H::Writer& x) { x.world_size = 0; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(open([](H::Writer& x) { x.rank = 2; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(open([](H::Writer& x) { x.ns = "a/b"; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(open([](H::Writer& x) { x.world_size = kWorldSizeMax + 1; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(h.TryOpen(w).status, StatusCode::kOk);
  EXPECT_EQ(open([](H::Writer& x) { x.world_size = 3; }), StatusCode::kInvalidArgument);  // The launch has two ranks.
  H::Writer other = w;
  EXPECT_EQ(h.TryOpen(other, ParentMode::kFresh).status, StatusCode::kInvalidArgument);
  EXPECT_EQ(h.TryOpen(other, ParentMode::kAttempt, TestId(9)).status, StatusCode::kInvalidArgument);
}

TEST(Generations, OneSessionActsForABoundedNumberOfRanks) {  // I-40: each of them is remembered
  H h;
  H::Writer w = h.Open(h.Connect(1), 1, 1000, 0);
  uint32_t refused = 0;
  for (w.rank = 0; w.rank < 1000 && refused == 0; ++w.rank) {
    const StatusCode code = h.TryOpen(w).status;
    if (code == StatusCode::kLimit) refused = w.rank;
    else ASSERT_EQ(code, StatusCode::kOk);
  }
  EXPECT_EQ(refused, 256u);
  h.Open(h.Connect(2), 1, 1000, 999);  // Another process is not affected.
}

TEST(Generations, OneUserOpensABoundedNumber) {  // I-26: they are in the log of facts for ever, and that is everybody's
  H h;
  h.config.generations_per_uid_max = 20;
  h.core = std::make_unique<NodeCore>(h.config);
  h.core->Restore(h.now, {}, {});
  const H::Client c = h.Connect(1);
  const auto open = [&](uint32_t n, const H::Client& who) {
    H::Writer w{who, 0, TestId(1), 1, 0, "job" + std::to_string(n % 8)};
    std::memcpy(w.nonce.bytes.data(), &n, sizeof n);
    return h.TryOpen(w).status;
  };
  for (uint32_t n = 1; n <= 20; ++n) ASSERT_EQ(open(n, c), StatusCode::kOk) << n;
  EXPECT_EQ(open(21, c), StatusCode::kLimit);
  EXPECT_EQ(open(20, c), StatusCode::kOk);  // A launch that is open already.
  EXPECT_EQ(open(22, h.Connect(2, 1001)), StatusCode::kOk);
}

TEST(Generations, TwoLiveJobsTheOlderIsFenced) {  // F79, I-21
  H h;
  H::Writer old = h.Open(h.Connect(1), 1);
  h.Save(old, 10);
  const ReserveReply open = h.Reserve(old, 20);
  const H::Writer young = h.Open(h.Connect(2), 2);
  EXPECT_EQ(young.generation, 2u);
  EXPECT_EQ(h.TryReserve(old, 30).status, StatusCode::kFenced);
  EXPECT_EQ(h.TrySeal(old, open.lease).status, StatusCode::kFenced);
  EXPECT_EQ(h.Ask(old.client, MessageType::kRenew, LeaseRequest{open.lease, ""}).status, StatusCode::kFenced);
  EXPECT_EQ(h.Wait(old.client, open.attempt).status, StatusCode::kFenced);
  EXPECT_EQ(h.TryOpen(old).status, StatusCode::kFenced);
  EXPECT_EQ(h.LatestStep(young.client), 10u);  // Complete before: the parent.
  h.Save(young, 20);
  EXPECT_EQ(h.LatestStep(young.client), 20u);
}

TEST(Generations, ARollbackIsNotThrownForward) {  // I-6
  H h(12, 3);
  const H::Writer w = h.Open(h.Connect(1), 1);
  const Id128 at100 = h.Save(w, 100);
  h.Save(w, 200);
  const H::Writer back = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kAttempt, at100);
  EXPECT_EQ(h.LatestStep(back.client), 100u);
  h.Save(back, 150);
  EXPECT_EQ(h.LatestStep(back.client), 150u);
  EXPECT_EQ(h.Steps(back.client), (std::vector<uint64_t>{150, 100}));  // 200 was overtaken and is gone.
}

TEST(Generations, AFreshLineageSeesNothingOfTheOldAndKeepsItUntilItHasAStep) {  // I-14
  H h(12);
  h.Save(h.Open(h.Connect(1), 1), 100);
  const H::Writer fresh = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kFresh);
  EXPECT_EQ(h.TryLatest(fresh.client).status, StatusCode::kNotFound);
  EXPECT_EQ(h.Steps(fresh.client), std::vector<uint64_t>{100});  // Still there, for who asks for it.
  h.Save(fresh, 0);
  EXPECT_EQ(h.Steps(fresh.client), std::vector<uint64_t>{0});
}

TEST(Generations, ARelaunchOfAFreshJobThatSavedNothingIsNotLost) {
  H h(12);
  h.Save(h.Open(h.Connect(1), 1), 100);
  h.Open(h.Connect(2), 2, 1, 0, ParentMode::kFresh);
  const H::Writer again = h.Open(h.Connect(3), 3);
  EXPECT_EQ(h.TryLatest(again.client).status, StatusCode::kNotFound);
}

TEST(Generations, AnAttemptThatIsNotCompleteCannotBeAParent) {
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 5);
  H::Writer next{h.Connect(2), 0, TestId(2), 1, 0};
  EXPECT_EQ(h.TryOpen(next, ParentMode::kAttempt, r.attempt).status, StatusCode::kNotFound);
}

// --- saves ---------------------------------------------------------------------------------------------------------------------------------

TEST(Saves, CompleteWhenEveryRankHasSealed) {  // I-1
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 0), rb = h.Reserve(b, 0);  // Step 0 is a step (B13).
  EXPECT_EQ(ra.attempt, rb.attempt);
  EXPECT_FALSE(H::Body<SealReply>(h.TrySeal(a, ra.lease)).complete);
  EXPECT_EQ(h.TryLatest(a.client).status, StatusCode::kNotFound);
  const Frame waiting = h.Wait(a.client, ra.attempt);
  EXPECT_EQ(waiting.status, StatusCode::kInternal);  // No answer yet.
  const uint64_t wait_request = h.last_request;
  EXPECT_TRUE(H::Body<SealReply>(h.TrySeal(b, rb.lease)).complete);
  EXPECT_EQ(H::Body<WaitReply>(h.Reply(wait_request)).level, Level::kMemory);
  EXPECT_EQ(h.LatestStep(a.client), 0u);
}

TEST(Saves, TheLedgerHasASealBeforeItsReply) {  // I-5, I-25
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  size_t sealed = 0, manifest = 0, reply = 0;
  for (size_t i = 0; i < h.actions.size(); ++i) {
    if (const auto* a = std::get_if<action::Append>(&h.actions[i])) {
      if (std::holds_alternative<ledger::Sealed>(a->entry)) sealed = i;
      if (std::holds_alternative<ledger::Manifest>(a->entry)) manifest = i;
    }
    if (const auto* s = std::get_if<action::Send>(&h.actions[i]); s && s->frame.type == MessageType::kSeal) reply = i;
  }
  EXPECT_LT(0u, sealed);
  EXPECT_LT(sealed, manifest);
  EXPECT_LT(manifest, reply);
}

TEST(Saves, TheFirstCompleteStepLeavesAMarker) {  // I-31
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  EXPECT_TRUE(h.config.markers.empty());
  h.Save(w, 1);
  EXPECT_EQ(h.config.markers, std::vector<Hash256>{MarkerOf(1000, "job")});
  h.Save(w, 2);
  EXPECT_EQ(h.config.markers.size(), 1u);
}

TEST(Saves, RepeatedRequestsHaveOneEffectAndOneAnswer) {  // I-32
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply first = h.Reserve(w, 1), again = h.Reserve(w, 1);
  EXPECT_EQ(first.lease, again.lease);
  EXPECT_EQ(first.slot, again.slot);
  const auto sealed = H::Body<SealReply>(h.TrySeal(w, first.lease)), sealed_again = H::Body<SealReply>(h.TrySeal(w, first.lease));
  EXPECT_EQ(sealed.record, sealed_again.record);
  EXPECT_TRUE(sealed_again.complete);
  EXPECT_EQ(h.StatusView()["totals"]["seals"], 1);
  SealRequest other = h.SealOf(w, first.lease);
  other.block_root.bytes[5] ^= 1;
  EXPECT_EQ(h.Ask(w.client, MessageType::kSeal, other).status, StatusCode::kInvalidArgument);  // F82
  EXPECT_EQ(h.TryReserve(w, 1).status, StatusCode::kClosed);
}

TEST(Saves, ARepeatWhileTheSealIsCheckedMustSayTheSame) {  // I-3
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  h.hold_seal_checks = true;
  h.TrySeal(w, r.lease);
  SealRequest other = h.SealOf(w, r.lease);
  other.block_root.bytes[5] ^= 1;
  EXPECT_EQ(h.Ask(w.client, MessageType::kSeal, other).status, StatusCode::kInvalidArgument);
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kInternal);
  const uint64_t repeat = h.last_request;
  h.Step(h.held.at(0));
  EXPECT_EQ(h.Reply(repeat).status, StatusCode::kOk);
}

TEST(Saves, ARepeatedReserveWhileItsExtentsAreMadeGetsOneSlot) {  // I-32
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.hold_extents = true;
  h.TryReserve(w, 1);
  h.TryReserve(w, 1);
  EXPECT_EQ(h.held.size(), 1u);
  h.extents.insert(1);
  h.Step(h.held[0]);
  EXPECT_EQ(h.Reply(h.last_request).status, StatusCode::kOk);
  EXPECT_EQ(h.PoolBytes("leased"), 1u);
}

TEST(Saves, ACorruptListIsRefusedAndThePreviousStepStays) {  // F8, I-2, I-11
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const ReserveReply r = h.Reserve(w, 2);
  h.seal_check = Status(StatusCode::kCorrupt, "the block checksums do not hash to the sealed root");
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kCorrupt);
  EXPECT_EQ(h.LatestStep(w.client), 1u);
  EXPECT_EQ(h.PoolBytes("leased"), 0u);
  EXPECT_EQ(h.TryReserve(w, 2).status, StatusCode::kClosed);
  h.Save(w, 2, 1);
  EXPECT_EQ(h.LatestStep(w.client), 2u);
}

TEST(Saves, AGapInATensorIsNeverComplete) {  // I-1
  H h;
  h.gap = true;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kClosed);
  EXPECT_EQ(h.TryLatest(w.client).status, StatusCode::kNotFound);
  EXPECT_EQ(h.PoolBytes("sealed"), 0u);
}

TEST(Saves, SealsThatDoNotFitTheirLeaseAreRefused) {  // I-40
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  const auto seal = [&](auto change) {
    SealRequest s = h.SealOf(w, r.lease);
    change(s);
    return h.Ask(w.client, MessageType::kSeal, s).status;
  };
  EXPECT_EQ(seal([](SealRequest& s) { s.length_bytes = 0; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(seal([](SealRequest& s) { s.length_bytes = 8192; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(seal([](SealRequest& s) { s.length_bytes = UINT64_MAX; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(seal([](SealRequest& s) { s.header_bytes = 5000; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(seal([](SealRequest& s) { s.static_offset = s.header_bytes; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(seal([](SealRequest& s) { s.lease = 99; }), StatusCode::kClosed);
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kOk);
}

TEST(Saves, ALengthThatItsHeaderDoesNotSayIsCorrupt) {  // I-2, I-8
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  for (uint32_t known = 0; known < 2; ++known) {  // Whether the structure was seen before or not.
    SealRequest s = h.SealOf(w, h.Reserve(w, 1, known).lease);
    s.header_bytes = 64;
    EXPECT_EQ(h.Ask(w.client, MessageType::kSeal, s).status, StatusCode::kCorrupt);
    EXPECT_EQ(h.PoolBytes("sealed"), known);
    h.Save(w, 2, known);
  }
}

TEST(Saves, ReserveRefusals) {
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1, 2, 0);
  const auto reserve = [&](auto change) {
    H::Writer bad = w;
    change(bad);
    return h.TryReserve(bad, 1).status;
  };
  EXPECT_EQ(reserve([](H::Writer& x) { x.world_size = 3; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(reserve([](H::Writer& x) { x.rank = 2; }), StatusCode::kInvalidArgument);
  EXPECT_EQ(reserve([](H::Writer& x) { x.nonce = TestId(9); }), StatusCode::kFenced);
  EXPECT_EQ(reserve([](H::Writer& x) { x.generation = 7; }), StatusCode::kFenced);
  EXPECT_EQ(reserve([](H::Writer& x) { x.ns = "other"; }), StatusCode::kClosed);
  EXPECT_EQ(h.TryReserve(w, kStepMax + 1).status, StatusCode::kInvalidArgument);
  EXPECT_EQ(h.TryReserve(w, 1, 0, 0).status, StatusCode::kInvalidArgument);
  EXPECT_EQ(h.TryReserve(w, 1, 0, kShardBytesMax + 1).status, StatusCode::kInvalidArgument);
  h.Reserve(w, 2);
  H::Writer thief = w;
  thief.client = h.Connect(3);
  EXPECT_EQ(h.TryReserve(thief, 2).status, StatusCode::kInvalidArgument);
}

TEST(Saves, OpenAttemptsAreLimited) {  // I-40
  H h(64);
  const H::Writer w = h.Open(h.Connect(1), 1, 2, 0);
  for (uint64_t step = 0; step < h.config.open_attempts_max; ++step) h.Reserve(w, step);
  EXPECT_EQ(h.TryReserve(w, 99).status, StatusCode::kLimit);
}

// I-30: the refused rank goes on to its next step; the others must not wait for it.
TEST(Saves, AnAttemptThatOneRankWasRefusedIsClosedForTheOthers) {
  H h(64);
  const H::Writer first = h.Open(h.Connect(1), 1, 2, 0), second = h.Open(h.Connect(2), 1, 2, 1);
  for (uint64_t step = 0; step < h.config.open_attempts_max; ++step) h.Reserve(first, step);
  EXPECT_EQ(h.TryReserve(first, 99).status, StatusCode::kLimit);
  EXPECT_EQ(h.TryReserve(second, 99).status, StatusCode::kClosed);
}

TEST(Saves, TwoTriesOfOneStepTheLaterServes) {  // F80
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const Id128 first = h.Save(w, 7), second = h.Save(w, 7, 1);
  const auto latest = H::Body<AttemptInfo>(h.TryLatest(w.client));
  EXPECT_EQ(latest.attempt, second);
  h.Reserve(w, 7, 2);
  h.Die(w.client);
  EXPECT_EQ(H::Body<AttemptInfo>(h.TryLatest(h.Connect(9))).attempt, second);
  EXPECT_NE(first, second);
}

TEST(Saves, ARankHasOneWriterAlsoWhileItsMemoryIsMade) {  // F82: the second one sealed, then the first, with other bytes
  H h;
  const H::Writer first = h.Open(h.Connect(1), 1, 2, 0);
  H::Writer second = h.Open(h.Connect(2), 1, 2, 0);
  h.hold_extents = true;
  h.TryReserve(first, 5);
  EXPECT_EQ(h.TryReserve(second, 5).status, StatusCode::kInvalidArgument);
}

TEST(Saves, WhatWasClosedLongAgoIsNotOpenedAgain) {  // I-16, I-29: a rank far behind opened what the other had been refused, and waited in vain
  H h;
  const H::Writer ahead = h.Open(h.Connect(1), 1, 2, 0), behind = h.Open(h.Connect(2), 1, 2, 1);
  constexpr uint64_t kRefused = Catalog::kTombstonesKept + 300;
  for (uint64_t step = 0; step < kRefused; ++step) EXPECT_EQ(h.TryReserve(ahead, step, 0, 1 << 20).status, StatusCode::kNoSpace);
  for (uint64_t step = 0; step < kRefused; ++step) EXPECT_EQ(h.TryReserve(behind, step).status, StatusCode::kClosed) << step;
  EXPECT_EQ(h.TryReserve(behind, kRefused).status, StatusCode::kOk);
}

TEST(Saves, EveryTransitionIsInTheLogBeforeItsReply) {  // I-42
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 5);
  const Frame read = h.TryRead(w.client);
  h.Ask(w.client, MessageType::kUnpin, PinRequest{H::Body<OpenReadReply>(read).pin});
  const std::map<MessageType, std::string> wanted = {{MessageType::kOpenGeneration, "generation_opened"}, {MessageType::kReserve, "lease_granted"},
                                                     {MessageType::kSeal, "shard_sealed"}, {MessageType::kOpenRead, "read_pinned"},
                                                     {MessageType::kUnpin, "read_unpinned"}};
  std::set<std::string> said;
  size_t replies = 0;
  for (const Action& any : h.actions) {
    if (const auto* log = std::get_if<action::Log>(&any); log && log->evidence) said.insert(log->name);
    const auto* sent = std::get_if<action::Send>(&any);
    if (!sent || !wanted.contains(sent->frame.type)) continue;
    ++replies;
    EXPECT_TRUE(said.contains(wanted.at(sent->frame.type))) << wanted.at(sent->frame.type);
  }
  EXPECT_EQ(replies, wanted.size());
  EXPECT_TRUE(said.contains("attempt_complete"));
}

TEST(Saves, RanksThatDifferInTheirTriesAreToldAtOnce) {  // DESIGN 5
  for (const bool later_first : {false, true}) {
    H h;
    const H::Writer zero = h.Open(h.Connect(1), 1, 2, 0), one = h.Open(h.Connect(2), 1, 2, 1);
    // Rank 0 saves the step for the second time: its first try failed before it asked for anything.
    if (later_first) {
      h.Save(zero, 5, 2);
      const Frame refused = h.TryReserve(one, 5, 1);
      EXPECT_EQ(refused.status, StatusCode::kClosed);
      EXPECT_NE(AsText(refused.body).find("rank 1 for time 1, rank 0 for time 2"), std::string::npos) << AsText(refused.body);
    } else {
      const Id128 first = h.Save(one, 5, 1);
      h.Save(zero, 5, 2);
      const Frame told = h.Wait(one.client, first);
      EXPECT_EQ(told.status, StatusCode::kClosed);
      EXPECT_NE(AsText(told.body).find("rank 1 for time 1, rank 0 for time 2"), std::string::npos) << AsText(told.body);
    }
    EXPECT_TRUE(h.Steps(zero.client).empty());
    h.Save(one, 5, 2);  // Once more there, too.
    EXPECT_EQ(h.Steps(zero.client), std::vector<uint64_t>{5});
  }
}

TEST(Saves, ATryAfterAnotherIsNoDifference) {  // Rank 0 does not wait for the others between its saves of one step.
  H h;
  const H::Writer zero = h.Open(h.Connect(1), 1, 2, 0), one = h.Open(h.Connect(2), 1, 2, 1);
  h.Save(zero, 5, 1);
  h.Save(zero, 5, 2);
  h.Save(one, 5, 1);
  EXPECT_EQ(h.Steps(zero.client), std::vector<uint64_t>{5});
  h.Save(one, 5, 2);
  EXPECT_EQ(h.Steps(zero.client).front(), 5u);
  EXPECT_EQ(h.List(zero.client).front().try_number, 2u);
}

TEST(Saves, StepsOutOfOrderLatestIsTheGreatest) {  // F81
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 200);
  h.Save(w, 150);
  EXPECT_EQ(h.LatestStep(w.client), 200u);
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{200, 150}));
}

TEST(Saves, AnOlderAttemptThatItsRanksPassedIsClosed) {
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply lone = h.Reserve(a, 1);
  h.TrySeal(a, lone.lease);  // Rank 1 never saves step 1.
  h.Save(a, 2);
  h.Save(b, 2);
  EXPECT_EQ(h.Wait(a.client, lone.attempt).status, StatusCode::kClosed);
  EXPECT_EQ(h.LatestStep(a.client), 2u);
}

TEST(Saves, AStructureForgottenWhileItsSealIsCheckedIsReadAgain) {
  // The only attempt that knew it is closed, and trimmed, between the check's start and its end: the step must become complete all the same.
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 1, 0), other = h.Open(h.Connect(3), 3, 1, 0, ParentMode::kLatest, {}, "other");
  h.Save(other, 1);  // Knows the structure of (1 rank, rank 0).
  const ReserveReply r = h.Reserve(a, 1);
  h.hold_seal_checks = true;
  h.TrySeal(a, r.lease);
  ASSERT_EQ(h.held.size(), 1u);
  EXPECT_TRUE(std::get<event::SealChecked>(h.held[0]).structure == nullptr);
  h.hold_seal_checks = false;
  // Now "other" becomes corrupt and is superseded by a step of another structure; nothing refers to the old one any more.
  const auto pin = H::Body<OpenReadReply>(h.TryRead(other.client, {"other", ReadChoice::kLatest, 0, {}, {}, 0}));
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  h.Ask(other.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0});
  h.Ask(other.client, MessageType::kUnpin, PinRequest{pin.pin});
  H::Writer two[2] = {h.Open(h.Connect(4), 4, 2, 0, ParentMode::kLatest, {}, "other"), h.Open(h.Connect(5), 4, 2, 1, ParentMode::kLatest, {}, "other")};
  for (const H::Writer& w : two) h.Save(w, 2);
  h.Step(h.held[0]);
  EXPECT_EQ(h.LatestStep(a.client), 1u);
}

TEST(Saves, AHeaderAboveTheSettingIsRefusedBeforeItIsRead) {  // I-27, I-40
  H h;
  h.config.header_max = 1000;
  h.core = std::make_unique<NodeCore>(h.config);
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  const size_t before = h.actions.size();
  const Frame refused = h.TrySeal(w, r.lease);
  EXPECT_EQ(refused.status, StatusCode::kLimit);
  for (const char* part : {"4092", "1000", "header_max", "fewer tensors"}) EXPECT_NE(AsText(refused.body).find(part), std::string_view::npos) << part;
  for (size_t i = before; i < h.actions.size(); ++i) EXPECT_FALSE(std::holds_alternative<action::CheckSeal>(h.actions[i]));
  EXPECT_EQ(h.Ask(w.client, MessageType::kSeal, h.SealOf(w, r.lease, 1004)).status, StatusCode::kOk) << "the lease is as it was";
  EXPECT_EQ(h.LatestStep(w.client), 1u);
}

TEST(Saves, StructuresOfOpenStepsAreBoundedPerUser) {  // I-27
  H h;
  h.config.structures_max = 700;  // Two of 290 bytes.
  h.core = std::make_unique<NodeCore>(h.config);
  H::Writer w[4];
  for (uint8_t rank = 0; rank < 4; ++rank) w[rank] = h.Open(h.Connect(uint8_t(1 + rank)), 1, 4, rank);
  ReserveReply r[4];
  for (int rank = 0; rank < 4; ++rank) r[rank] = h.Reserve(w[rank], 1);
  EXPECT_EQ(h.TrySeal(w[0], r[0].lease).status, StatusCode::kOk);
  EXPECT_EQ(h.TrySeal(w[1], r[1].lease).status, StatusCode::kOk);
  const Frame refused = h.TrySeal(w[2], r[2].lease);
  EXPECT_EQ(refused.status, StatusCode::kLimit);
  EXPECT_NE(AsText(refused.body).find("header_max"), std::string_view::npos) << AsText(refused.body);
  EXPECT_EQ(h.TryLatest(w[0].client).status, StatusCode::kNotFound);
  // Its attempt is closed, so there is room again; and it was nobody else's.
  const H::Writer other = h.Open(h.Connect(9, 1001), 2);
  h.Save(other, 1);
  H::Writer two[2] = {h.Open(h.Connect(6), 3, 2, 0), h.Open(h.Connect(7), 3, 2, 1)};
  for (const H::Writer& writer : two) h.Save(writer, 1);
  EXPECT_EQ(h.LatestStep(two[0].client), 1u);
}

TEST(Saves, AStructureThatMadeRoomIsReadAgain) {
  // Both shapes of the job are known, only two structures are kept: the third one drops what was checked, and a new set needs it again.
  H h;
  h.config.structures_max = 700;
  h.core = std::make_unique<NodeCore>(h.config);
  const auto read_again = [&] {
    return std::count_if(h.actions.begin(), h.actions.end(), [](const Action& a) { return std::holds_alternative<action::ReadStructure>(a); });
  };
  const H::Writer two[2] = {h.Open(h.Connect(1), 1, 2, 0), h.Open(h.Connect(2), 1, 2, 1)};
  for (const H::Writer& w : two) h.Save(w, 1);
  const H::Writer one = h.Open(h.Connect(3), 2, 1, 0, ParentMode::kLatest, {}, "other");
  h.Save(one, 1);
  for (const H::Writer& w : two) h.Save(w, 2);
  EXPECT_EQ(h.LatestStep(two[0].client), 2u);
  EXPECT_EQ(read_again(), 0) << "the answer for this set is known";
  // Ranks that swapped their structures are another set.
  for (const H::Writer& w : two) {
    SealRequest seal = h.SealOf(w, h.Reserve(w, 3).lease);
    seal.structure = H::StructureOf(2, 1 - w.rank);
    EXPECT_EQ(h.Ask(w.client, MessageType::kSeal, seal).status, StatusCode::kOk);
  }
  EXPECT_GT(read_again(), 0);
  EXPECT_EQ(h.LatestStep(two[0].client), 3u);
}

TEST(Saves, ALengthIsComparedAlthoughTheStructureWasForgotten) {  // I-8
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1), other = h.Open(h.Connect(3), 3, 2, 0, ParentMode::kLatest, {}, "other");
  const ReserveReply lone = h.Reserve(other, 1);
  SealRequest same = h.SealOf(other, lone.lease);
  same.structure = H::StructureOf(1, 0);
  EXPECT_EQ(h.Ask(other.client, MessageType::kSeal, same).status, StatusCode::kOk);
  const ReserveReply r = h.Reserve(a, 1);
  SealRequest seal = h.SealOf(a, r.lease);
  seal.header_bytes -= 8;
  h.hold_seal_checks = true;
  h.Ask(a.client, MessageType::kSeal, seal);
  ASSERT_EQ(h.held.size(), 1u);
  h.hold_seal_checks = false;
  h.Open(h.Connect(5), 5, 2, 0, ParentMode::kLatest, {}, "other");  // Fences the only attempt that knew it.
  h.Step(h.held[0]);
  EXPECT_EQ(h.Reply(h.last_request - 2).status, StatusCode::kCorrupt);
  EXPECT_EQ(h.TryLatest(a.client).status, StatusCode::kNotFound);
}

// --- leases, writers that die or hang ------------------------------------------------------------------------------------------------------

TEST(Leases, AnExpiredLeaseOfALivingWriterBecomesAZombie) {  // F5, I-9, I-10
  H h(2);
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  h.Advance(h.config.lease_ns);
  EXPECT_EQ(h.PoolBytes("zombie"), 1u);
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kFenced);
  EXPECT_NE(h.Reserve(w, 2).slot, r.slot);  // A late store into the old slot harms nobody.
  EXPECT_EQ(h.Abort(w.client, r.lease).status, StatusCode::kOk);
  EXPECT_EQ(h.PoolBytes("zombie"), 0u);
  EXPECT_EQ(h.PoolBytes("idle"), 1u);
}

TEST(Leases, RenewingKeepsALease) {
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1);
  for (int i = 0; i < 5; ++i) {
    h.Advance(h.config.lease_ns - 1);
    EXPECT_EQ(h.Ask(w.client, MessageType::kRenew, LeaseRequest{r.lease, ""}).status, StatusCode::kOk);
  }
  EXPECT_EQ(h.TrySeal(w, r.lease).status, StatusCode::kOk);
}

TEST(Leases, AnAbortClosesTheAttemptForAllRanks) {  // F11
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 1), rb = h.Reserve(b, 1);
  h.TrySeal(a, ra.lease);
  h.Wait(a.client, ra.attempt);
  const uint64_t waiting = h.last_request;
  EXPECT_EQ(h.Abort(b.client, rb.lease).status, StatusCode::kOk);
  EXPECT_EQ(h.Reply(waiting).status, StatusCode::kClosed);
  EXPECT_EQ(h.Abort(b.client, rb.lease).status, StatusCode::kOk);  // Again: it has ended.
  EXPECT_EQ(h.PoolBytes("sealed"), 0u);
  h.Save(a, 2);
  h.Save(b, 2);
  EXPECT_EQ(h.LatestStep(a.client), 2u);  // The next save works without a restart.
}

TEST(Leases, AWriterThatDiesBeforeItsSealClosesTheAttempt) {  // F1, I-28
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  h.Save(a, 1);
  h.Save(b, 1);
  const ReserveReply ra = h.Reserve(a, 2);
  h.Reserve(b, 2);
  h.Die(b.client);
  EXPECT_EQ(h.Wait(a.client, ra.attempt).status, StatusCode::kClosed);
  h.Die(a.client);
  EXPECT_EQ(h.LatestStep(h.Connect(9)), 1u);
  EXPECT_EQ(h.PoolBytes("leased") + h.PoolBytes("zombie") + h.PoolBytes("idle"), 0u);
  EXPECT_EQ(h.PoolBytes("sealed"), 2u);
}

TEST(Leases, AWriterThatDiesAfterItsSealDoesNotStopTheOthers) {  // F2
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 1), rb = h.Reserve(b, 1);
  h.TrySeal(b, rb.lease);
  h.Die(b.client);
  EXPECT_TRUE(H::Body<SealReply>(h.TrySeal(a, ra.lease)).complete);
  EXPECT_EQ(h.LatestStep(a.client), 1u);
}

TEST(Leases, ARankThatDiesBeforeItBeginsClosesWhatWaitsForIt) {  // F1
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 1);
  h.TrySeal(a, ra.lease);
  h.Die(b.client);
  EXPECT_EQ(h.Wait(a.client, ra.attempt).status, StatusCode::kClosed);
}

TEST(Leases, TenThousandWritersThatReserveAndDieLeaveNothing) {  // F9, I-28
  H h;
  const H::Client watcher = h.Connect(200);
  for (uint32_t i = 0; i < 10'000; ++i) {
    H::Client c = h.Connect(static_cast<uint8_t>(1 + i % 150));
    H::Writer w{c, 0, TestId(static_cast<uint8_t>(1 + i % 150)), 2, 0};
    w.nonce.bytes[0] = static_cast<uint8_t>(i >> 8);
    w.nonce.bytes[1] = static_cast<uint8_t>(i);
    if (i % 100 == 0) h.TryOpen(w);
    else w.nonce = TestId(0), w.nonce.bytes[1] = 1;
    if (i % 100 == 0) h.Reserve(w, i);
    h.Die(c);
    h.actions.clear();
    h.replies.clear();
    if (i % 50 == 0) h.Compact();
  }
  EXPECT_EQ(h.PoolBytes("free"), h.PoolBytes("bytes"));
  EXPECT_LE(h.core->Snapshot().size(), 2 * Catalog::kTombstonesKept + 200);  // Memory of the dead is bounded.
  EXPECT_TRUE(h.Steps(watcher).empty());
}

TEST(Leases, EndlessFailedSavesDoNotFillTheCatalog) {  // I-27: nothing ever completes, so nothing was trimmed
  H h(1);
  const H::Writer w = h.Open(h.Connect(1), 1);
  for (uint32_t i = 0; i < 1000; ++i) {
    EXPECT_EQ(h.TryReserve(w, 5, i, 5 * 8192).status, StatusCode::kNoSpace);
    if (i % 100 == 0) h.Compact();
  }
  EXPECT_LE(h.core->Snapshot().size(), Catalog::kTombstonesKept + 10);
}

// --- space ---------------------------------------------------------------------------------------------------------------------------------

TEST(Space, AFullPoolRefusesBeforeAnyByteAndKeepsTheLastStep) {  // F46, F84, I-14, I-27
  H h(1, 1);
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const Frame refused = h.TryReserve(w, 2);
  EXPECT_EQ(refused.status, StatusCode::kNoSpace);
  EXPECT_EQ(h.LatestStep(w.client), 1u);
  EXPECT_EQ(h.Steps(w.client), std::vector<uint64_t>{1});
}

TEST(Space, AStateLargerThanThePoolIsRefusedWithTheNumbers) {
  H h(4);
  const H::Writer w = h.Open(h.Connect(1), 1);
  const Frame refused = h.TryReserve(w, 1, 0, 5 * 8192);
  EXPECT_EQ(refused.status, StatusCode::kNoSpace);
  EXPECT_NE(refused.ToStatus().message().find("pool"), std::string::npos);
}

TEST(Space, OneRankWithoutSpaceTellsTheOthersAtOnce) {
  H h(1);
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 1);
  EXPECT_EQ(h.TryReserve(b, 1).status, StatusCode::kNoSpace);
  EXPECT_EQ(h.Wait(a.client, ra.attempt).status, StatusCode::kClosed);
}

TEST(Space, ExtentsThatCannotBeMadeLaterTellTheOthersToo) {  // F50
  H h;
  const H::Writer a = h.Open(h.Connect(1), 1, 2, 0), b = h.Open(h.Connect(2), 1, 2, 1);
  const ReserveReply ra = h.Reserve(a, 1);
  h.hold_extents = true;
  h.TryReserve(b, 1);
  const uint64_t asked = h.last_request;
  h.Step(event::ExtentFailed{std::get<event::ExtentCreated>(h.held.at(0)).extent, Status(StatusCode::kNoSpace, "ENOMEM")});
  EXPECT_EQ(h.Reply(asked).status, StatusCode::kNoSpace);
  EXPECT_EQ(h.Wait(a.client, ra.attempt).status, StatusCode::kClosed);
}

TEST(Space, ExtentsThatAreLateAreADeadline) {  // I-29
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.hold_extents = true;
  h.TryReserve(w, 1);
  const uint64_t asked = h.last_request;
  h.Advance(kNanosPerSecond);
  EXPECT_EQ(h.Reply(asked).status, StatusCode::kDeadline);
}

TEST(Space, PreparedSlotsAreUsedBySaves) {
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const auto prepared = H::Body<PrepareSlotsReply>(h.Ask(w.client, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 3}));
  EXPECT_EQ(prepared.slots.size(), 3u);
  EXPECT_EQ(h.PoolBytes("idle"), 3u);
  const ReserveReply r = h.Reserve(w, 1);
  EXPECT_TRUE(std::any_of(prepared.slots.begin(), prepared.slots.end(), [&](const SlotInfo& s) { return s.slot == r.slot; }));
  const auto some = H::Body<PrepareSlotsReply>(h.Ask(w.client, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 60}));
  EXPECT_EQ(some.slots.size(), 7u);  // As many as there is room for.
}

TEST(Space, AGrowingStateDissolvesItsIdleSlots) {
  H h(4);
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Ask(w.client, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 3});
  const ReserveReply r = h.Reserve(w, 1, 0, 4 * 8192);
  EXPECT_EQ(r.gone_slots.size(), 3u);
  EXPECT_EQ(r.extents, 4u);
}

// --- retirement, pins ----------------------------------------------------------------------------------------------------------------------

TEST(Retirement, TheNewestStayAndSlotsComeBackToTheirWriter) {  // I-14, I-16
  H h(8, 2);
  const H::Writer w = h.Open(h.Connect(1), 1);
  std::set<uint64_t> slots;
  for (uint64_t step = 1; step <= 10; ++step) {
    const ReserveReply r = h.Reserve(w, step);
    slots.insert(r.slot);
    h.TrySeal(w, r.lease);
  }
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{10, 9}));
  EXPECT_EQ(slots.size(), 3u);  // Retained + 1.
  EXPECT_EQ(h.PoolBytes("bytes"), 3u);
}

TEST(Retirement, APinnedStepStaysUntilItsReaderIsDone) {  // F83, I-17
  H h(8, 1);
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const H::Client reader = h.Connect(2);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(reader));
  h.Save(w, 2);
  h.Save(w, 3);
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{3, 1}));
  EXPECT_EQ(h.Ask(reader, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0}).status, StatusCode::kOk);
  EXPECT_EQ(h.Ask(reader, MessageType::kUnpin, PinRequest{pin.pin}).status, StatusCode::kOk);
  EXPECT_EQ(h.Steps(w.client), std::vector<uint64_t>{3});
  EXPECT_EQ(h.Ask(reader, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0}).status, StatusCode::kClosed);
}

TEST(Retirement, PinsExpireAndDieWithTheirReader) {  // I-17, I-28
  H h(8, 1);
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const H::Client reader = h.Connect(2), other = h.Connect(3);
  h.TryRead(reader);
  h.TryRead(other);
  h.Save(w, 2);
  h.Die(reader);
  EXPECT_EQ(h.Steps(w.client).size(), 2u);
  h.Advance(h.config.pin_ns);
  EXPECT_EQ(h.Steps(w.client).size(), 1u);
  EXPECT_EQ(h.StatusView()["read_pins"], 0);
}

TEST(Retirement, AnOperatorsPinHasNoExpiryAndCanBeTakenFromACorruptStep) {
  H h(8, 1);
  const H::Writer w = h.Open(h.Connect(1), 1);
  const Id128 one = h.Save(w, 1);
  EXPECT_EQ(h.Ask(w.client, MessageType::kPinStep, PinStepRequest{"job", one, true}).status, StatusCode::kOk);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client));
  h.Save(w, 2);
  h.Advance(3600 * kNanosPerSecond);
  EXPECT_EQ(h.Steps(w.client), (std::vector<uint64_t>{2, 1}));
  const auto again = H::Body<OpenReadReply>(h.TryRead(w.client, {"job", ReadChoice::kStep, 1, {}, {}, 0}));
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{again.pin, 0, 0});
  h.Ask(w.client, MessageType::kUnpin, PinRequest{again.pin});
  EXPECT_EQ(h.List(w.client).size(), 2u);
  EXPECT_EQ(h.Ask(w.client, MessageType::kPinStep, PinStepRequest{"job", one, false}).status, StatusCode::kOk);
  EXPECT_EQ(h.List(w.client).size(), 1u);
  EXPECT_EQ(h.Ask(w.client, MessageType::kPinStep, PinStepRequest{"job", one, true}).status, StatusCode::kNotFound);
  EXPECT_NE(pin.pin, again.pin);
}

// --- restores --------------------------------------------------------------------------------------------------------------------------------

TEST(Restores, EmptyLostAndUnknownAreApart) {  // I-31, B14
  H h(8, 1);
  const H::Client c = h.Connect(1);
  EXPECT_EQ(h.TryLatest(c).status, StatusCode::kNotFound);
  EXPECT_EQ(h.TryRead(c).status, StatusCode::kNotFound);
  h.Save(h.Open(c, 1), 1);
  EXPECT_EQ(h.TryRead(c, {"job", ReadChoice::kStep, 5, {}, {}, 0}).status, StatusCode::kNotFound);
  EXPECT_EQ(h.TryLatest(c, "job", Level::kReplicated).status, StatusCode::kNotFound);  // Not LOST: the step is there, its level is not.

  H lost;  // The keeper is another one; only the marker is left.
  lost.config.markers = {MarkerOf(1000, "job")};
  lost.core = std::make_unique<NodeCore>(lost.config);
  lost.core->Restore(lost.now, {}, {});
  const H::Client d = lost.Connect(1);
  EXPECT_EQ(lost.TryLatest(d).status, StatusCode::kLost);
  EXPECT_EQ(lost.TryRead(d).status, StatusCode::kLost);
  EXPECT_EQ(lost.TryRead(d, {"job", ReadChoice::kStep, 5, {}, {}, 0}).status, StatusCode::kLost);
  EXPECT_EQ(lost.TryLatest(d, "other").status, StatusCode::kNotFound);

  H blind;  // The state directory cannot be read.
  blind.config.markers_known = false;
  blind.core = std::make_unique<NodeCore>(blind.config);
  blind.core->Restore(blind.now, {}, {});
  EXPECT_EQ(blind.TryLatest(blind.Connect(1)).status, StatusCode::kUnavailable);
}

TEST(Restores, AllRanksOfOneLaunchGetTheSameStep) {  // I-7
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const auto read = [&](uint8_t client, uint32_t sequence) {
    return H::Body<OpenReadReply>(h.TryRead(h.Connect(client), {"job", ReadChoice::kLatest, 0, {}, TestId(50), sequence})).info.step;
  };
  EXPECT_EQ(read(2, 0), 1u);
  h.Save(w, 2);
  EXPECT_EQ(read(3, 0), 1u);
  EXPECT_EQ(read(4, 1), 2u);  // Another restore.
  EXPECT_EQ(h.TryRead(h.Connect(5), {"job", ReadChoice::kStep, 2, {}, TestId(50), 0}).status, StatusCode::kInvalidArgument);
}

TEST(Restores, WhatALaunchResumedFromGoesWhenItHasSavedItself) {  // The agreement kept a step longer than anybody needed it
  H h(8, 1);
  h.Save(h.Open(h.Connect(1), 1), 1);
  const H::Client c = h.Connect(2);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(c, {"job", ReadChoice::kLatest, 0, {}, TestId(2), 0}));
  h.Ask(c, MessageType::kUnpin, PinRequest{pin.pin});
  const H::Writer w = h.Open(c, 2);
  EXPECT_EQ(h.Steps(c), std::vector<uint64_t>{1});
  h.Save(w, 2);
  EXPECT_EQ(h.Steps(c), std::vector<uint64_t>{2});
}

TEST(Restores, ARankThatNamesAnotherAttemptThanItsGroupIsRefused) {  // I-7
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const Id128 two = h.Save(w, 2);
  h.TryRead(h.Connect(2), {"job", ReadChoice::kStep, 1, {}, TestId(50), 0});
  EXPECT_EQ(h.TryRead(h.Connect(3), {"job", ReadChoice::kAttempt, 0, two, TestId(50), 0}).status, StatusCode::kInvalidArgument);
}

TEST(Restores, ACorruptShardIsQuarantinedAndLatestMovesBack) {  // I-12
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  h.Save(w, 2);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client));
  h.block_check = {};
  EXPECT_FALSE(H::Body<ReportCorruptReply>(h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0})).confirmed);
  EXPECT_EQ(h.LatestStep(w.client), 2u);  // Nobody is believed but our own eyes.
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  EXPECT_TRUE(H::Body<ReportCorruptReply>(h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0})).confirmed);
  EXPECT_EQ(h.LatestStep(w.client), 1u);
  EXPECT_EQ(h.Ask(w.client, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0}).status, StatusCode::kCorrupt);
  EXPECT_EQ(h.TryRead(w.client, {"job", ReadChoice::kStep, 2, {}, {}, 0}).status, StatusCode::kCorrupt);
  EXPECT_EQ(h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 9}).status, StatusCode::kOk);  // Known already.
  h.Restart();
  EXPECT_EQ(h.LatestStep(h.Reconnect(w.client)), 1u);
}

TEST(Restores, TheLastStepCorruptIsLostNotEmpty) {  // I-12, I-31
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(w.client));
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  h.Ask(w.client, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0});
  EXPECT_EQ(h.TryLatest(w.client).status, StatusCode::kLost);
}

TEST(Restores, PinsOfOthersCannotBeUsed) {  // I-38
  H h;
  h.Save(h.Open(h.Connect(1), 1), 1);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(h.Connect(2)));
  const H::Client thief = h.Connect(3);
  EXPECT_EQ(h.Ask(thief, MessageType::kShardInfo, ShardRequest{pin.pin, 0, 0}).status, StatusCode::kClosed);
  EXPECT_EQ(h.Ask(thief, MessageType::kFetchExtents, FetchExtentsRequest{true, 0, pin.pin, 0, 0}).status, StatusCode::kClosed);
  h.Ask(thief, MessageType::kUnpin, PinRequest{pin.pin});
  EXPECT_EQ(h.StatusView()["read_pins"], 1);
}

TEST(Restores, ReadersGetReadOnlyDescriptors) {  // I-9
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  const ReserveReply r = h.Reserve(w, 1, 0, 3 * 8192);
  EXPECT_EQ(H::Body<FetchExtentsReply>(h.Ask(w.client, MessageType::kFetchExtents, FetchExtentsRequest{false, r.slot, 0, 0, 1})).count, 2u);
  EXPECT_FALSE(std::get<action::Send>(h.actions.back()).read_only);
  h.TrySeal(w, r.lease);
  const H::Client reader = h.Connect(2);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(reader));
  h.Ask(reader, MessageType::kFetchExtents, FetchExtentsRequest{true, 0, pin.pin, 0, 0});
  EXPECT_TRUE(std::get<action::Send>(h.actions.back()).read_only);
  EXPECT_EQ(h.Ask(reader, MessageType::kFetchExtents, FetchExtentsRequest{false, r.slot, 0, 0, 0}).status, StatusCode::kDenied);
  EXPECT_EQ(h.Ask(reader, MessageType::kFetchExtents, FetchExtentsRequest{true, 0, pin.pin, 0, 3}).status, StatusCode::kInvalidArgument);
  EXPECT_EQ(h.Ask(reader, MessageType::kFetchExtents, FetchExtentsRequest{true, 0, pin.pin, 1, 0}).status, StatusCode::kNotFound);
}

// --- tenants ---------------------------------------------------------------------------------------------------------------------------------

TEST(Tenants, AnIdentitySeesAndTouchesOnlyItsOwn) {  // I-38
  H h;
  const H::Writer a = h.Open(h.Connect(1, 1000), 1);
  const Id128 attempt = h.Save(a, 1);
  const ReserveReply open = h.Reserve(a, 2);
  const H::Client b = h.Connect(2, 1001);
  EXPECT_EQ(h.TryLatest(b).status, StatusCode::kNotFound);
  EXPECT_TRUE(h.List(b).empty());
  EXPECT_EQ(H::Body<ListNamespacesReply>(h.Ask(b, MessageType::kListNamespaces, NamespaceRequest{"", Level::kMemory, 0})).total, 0u);
  EXPECT_EQ(h.TryRead(b, {"job", ReadChoice::kAttempt, 0, attempt, {}, 0}).status, StatusCode::kNotFound);
  EXPECT_EQ(h.Ask(b, MessageType::kPinStep, PinStepRequest{"job", attempt, true}).status, StatusCode::kNotFound);
  EXPECT_EQ(h.Wait(b, attempt).status, StatusCode::kNotFound);
  EXPECT_EQ(h.Abort(b, open.lease).status, StatusCode::kDenied);
  EXPECT_EQ(h.Ask(b, MessageType::kRenew, LeaseRequest{open.lease, ""}).status, StatusCode::kDenied);
  EXPECT_EQ(h.Ask(b, MessageType::kFetchExtents, FetchExtentsRequest{false, open.slot, 0, 0, 0}).status, StatusCode::kDenied);
  H::Writer thief = a;
  thief.client = b;
  EXPECT_EQ(h.TrySeal(thief, open.lease).status, StatusCode::kDenied);
  EXPECT_EQ(h.TryReserve(thief, 2).status, StatusCode::kClosed);  // As for a namespace that does not exist.
  EXPECT_TRUE(h.StatusView(1001)["leases"].empty());
  EXPECT_TRUE(h.StatusView(1001)["namespaces"].empty());
  // The same name is another namespace.
  EXPECT_EQ(h.Open(b, 9).generation, 1u);
  EXPECT_EQ(h.LatestStep(a.client), 1u);
}

TEST(Tenants, MemoryOnceLentIsNeverAnotherIdentitys) {  // I-10, I-38: its writer is dead, but a child of it may have the mapping
  H h(1, 1);
  const H::Writer a = h.Open(h.Connect(1, 1000), 1);
  const ReserveReply r = h.Reserve(a, 1);
  const H::Writer b = h.Open(h.Connect(2, 1001), 2);
  EXPECT_EQ(h.TryReserve(b, 1).status, StatusCode::kNoSpace);  // Its writer lives.
  h.Abort(a.client, r.lease);
  EXPECT_EQ(h.TryReserve(b, 1, 1).status, StatusCode::kNoSpace);
  h.Die(a.client);
  const std::set<uint32_t> lent = h.extents;
  EXPECT_EQ(h.TryReserve(b, 1, 2).status, StatusCode::kOk);
  EXPECT_EQ(h.extents.size(), 1u);
  EXPECT_NE(h.extents, lent);
}

TEST(Tenants, MemoryThatAReaderStillHoldsStaysWithItsIdentity) {  // I-38
  H h(1, 1);
  const H::Writer a = h.Open(h.Connect(1, 1000), 1);
  h.Save(a, 1);
  const H::Client reader = h.Connect(3, 1000);
  const auto pin = H::Body<OpenReadReply>(h.TryRead(reader));
  h.Ask(reader, MessageType::kFetchExtents, FetchExtentsRequest{true, 0, pin.pin, 0, 0});
  h.block_check = Status(StatusCode::kCorrupt, "flipped");
  h.Ask(reader, MessageType::kReportCorrupt, ShardRequest{pin.pin, 0, 0});
  h.Ask(reader, MessageType::kUnpin, PinRequest{pin.pin});
  h.Die(a.client);
  const H::Writer next = h.Open(h.Connect(4, 1000), 4, 1, 0, ParentMode::kFresh);
  EXPECT_EQ(h.TryReserve(next, 2).status, StatusCode::kNoSpace);  // One extent, and it is a corrupt step's, which only a newer step replaces.
  const H::Writer b = h.Open(h.Connect(2, 1001), 2);
  EXPECT_EQ(h.TryReserve(b, 1).status, StatusCode::kNoSpace);
}

TEST(Tenants, OneTenantsRestoresDoNotUseUpAnothersLimit) {  // I-26, I-38
  H h;
  h.config.pins_max = 4;
  h.core = std::make_unique<NodeCore>(h.config);
  h.core->Restore(h.now, {}, {});
  const H::Client a = h.Connect(1, 1000), b = h.Connect(2, 1001);
  h.Save(h.Open(a, 1), 1);
  h.Save(h.Open(b, 2), 1);
  for (uint8_t i = 1; i <= 4; ++i) {
    const auto pin = H::Body<OpenReadReply>(h.TryRead(a, {"job", ReadChoice::kLatest, 0, {}, TestId(i), 0}));
    h.Ask(a, MessageType::kUnpin, PinRequest{pin.pin});  // The group remains.
  }
  EXPECT_EQ(h.TryRead(a, {"job", ReadChoice::kLatest, 0, {}, TestId(9), 0}).status, StatusCode::kLimit);
  EXPECT_EQ(h.TryRead(b, {"job", ReadChoice::kLatest, 0, {}, TestId(9), 0}).status, StatusCode::kOk);
}

TEST(Tenants, OneTenantsWaitsDoNotUseUpAnothersLimit) {  // I-26, I-38
  H h;
  h.config.connections_per_uid_max = 2;
  h.core = std::make_unique<NodeCore>(h.config);
  h.core->Restore(h.now, {}, {});
  const H::Writer a = h.Open(h.Connect(1, 1000), 1, 2, 0), b = h.Open(h.Connect(2, 1001), 2, 2, 0);
  const Id128 ida = h.Reserve(a, 1).attempt, idb = h.Reserve(b, 1).attempt;
  for (int i = 0; i < 8; ++i) EXPECT_EQ(h.Wait(a.client, ida).status, StatusCode::kInternal);
  EXPECT_EQ(h.Wait(a.client, ida).status, StatusCode::kLimit);
  EXPECT_EQ(h.Wait(b.client, idb).status, StatusCode::kInternal);
}

TEST(Tenants, NamespacesAreLimitedPerIdentity) {  // I-40
  H h;
  h.config.namespaces_per_uid_max = 2;
  h.core = std::make_unique<NodeCore>(h.config);
  h.core->Restore(h.now, {}, {});
  const H::Client a = h.Connect(1);
  h.Open(a, 1, 1, 0, ParentMode::kLatest, {}, "x");
  h.Open(a, 2, 1, 0, ParentMode::kLatest, {}, "y");
  H::Writer w{a, 0, TestId(3), 1, 0, "z"};
  EXPECT_EQ(h.TryOpen(w).status, StatusCode::kLimit);
  h.Open(h.Connect(2, 1001), 4, 1, 0, ParentMode::kLatest, {}, "z");
}

// --- processes that cannot be watched, goodbyes ----------------------------------------------------------------------------------------------

TEST(Unwatchable, TheirExtentsAreDroppedNotReused) {  // I-10
  H h(2, 1);
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Step(event::SessionUnwatchable{w.client.session});
  h.Save(w, 1);
  const ReserveReply r = h.Reserve(w, 2);
  h.Disconnect(w.client);
  h.Advance(h.config.lease_ns - 1);
  EXPECT_EQ(h.extents.size(), 2u);
  h.Advance(1);  // The lease ends.
  h.Advance(h.config.lease_ns);
  EXPECT_EQ(h.extents.size(), 1u);  // The sealed one stays.
  const H::Writer next = h.Open(h.Connect(2), 2);
  const ReserveReply fresh = h.Reserve(next, 2);
  EXPECT_EQ(h.LatestStep(next.client), 1u);
  EXPECT_NE(fresh.slot, r.slot);
  h.TrySeal(next, fresh.lease);  // Retires step 1, whose extent is dropped, too.
  EXPECT_EQ(h.PoolBytes("free"), 0u);
  EXPECT_EQ(h.extents.size(), 1u);
}

TEST(Unwatchable, ALivingOneIsGivenTimeToReconnect) {
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Step(event::SessionUnwatchable{w.client.session});
  h.Save(w, 1);
  h.Ask(w.client, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 1});
  h.Disconnect(w.client);
  h.Step(event::Tick{});
  EXPECT_EQ(h.PoolBytes("idle"), 1u);
  h.Reconnect(w.client);
  h.Advance(10 * h.config.lease_ns);
  EXPECT_EQ(h.PoolBytes("idle"), 1u);
}

TEST(Goodbyes, TheNextObjectOfTheProcessInheritsItsSlots) {
  H h(2, 1);
  H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  h.Reserve(w, 2);
  h.Ask(w.client, MessageType::kBye, Empty{});
  h.Disconnect(w.client);
  EXPECT_EQ(h.PoolBytes("idle"), 1u);
  H::Client again = w.client;
  again.session = TestId(77);
  H::Writer v = h.Open(h.Reconnect(again), 1);
  h.Save(v, 2, 1);
  EXPECT_EQ(h.LatestStep(v.client), 2u);
  EXPECT_EQ(h.PoolBytes("bytes"), 2u);
}

// A process whose first object had two slots of one extent, all there is, and whose next has said Hello.
H::Writer NextObject(H& h) {
  H::Client c = h.Connect(1);
  h.Ask(c, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 2});
  h.Ask(c, MessageType::kBye, Empty{});
  h.Disconnect(c);
  c.session = TestId(77);
  return h.Open(h.Reconnect(c), 1);
}

TEST(Goodbyes, ALargerNextObjectGetsTheExtentsOfTheSmallerSlots) {  // Was a spurious NO_SPACE
  H h(2, 1);
  const H::Writer w = NextObject(h);
  EXPECT_EQ(h.PoolBytes("idle"), 2u);
  const H::Writer other = h.Open(h.Connect(2), 2, 1, 0, ParentMode::kLatest, {}, "other");
  EXPECT_EQ(h.TryReserve(other, 1).status, StatusCode::kNoSpace);  // I-10: only within the process.
  EXPECT_EQ(h.Reserve(w, 1, 0, 2 * 8192).extents, 2u);
  EXPECT_EQ(h.PoolBytes("leased"), 2u);
}

TEST(Goodbyes, SlotsAreInheritedByAPreparationToo) {
  H h(2, 1);
  const H::Writer w = NextObject(h);
  const Frame f = h.Ask(w.client, MessageType::kPrepareSlots, PrepareSlotsRequest{"job", 8192, 1, 2});
  EXPECT_EQ(H::Body<PrepareSlotsReply>(f).slots.size(), 2u);
}

TEST(Goodbyes, AProcessThatDiesWhileItsOldSlotsAreRebuiltLeavesNothing) {  // I-28
  H h(3, 1);
  const H::Writer w = NextObject(h);
  h.hold_extents = true;
  h.TryReserve(w, 1, 0, 3 * 8192);
  EXPECT_EQ(h.PoolBytes("pending"), 2u);
  h.Step(event::SessionDied{TestId(1)});
  h.Die(w.client);
  EXPECT_EQ(h.PoolBytes("free"), 2u);
}

TEST(Goodbyes, AShutdownAnswersWhoWaits) {  // F12, I-29
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1, 2, 0);
  const Id128 attempt = h.Reserve(w, 1).attempt;
  h.Wait(w.client, attempt);
  const uint64_t waiting = h.last_request;
  h.Step(event::Shutdown{});
  EXPECT_EQ(h.Reply(waiting).status, StatusCode::kUnavailable);
  EXPECT_TRUE(std::holds_alternative<action::ExitDaemon>(h.actions.back()));
  EXPECT_EQ(h.TryReserve(w, 2).status, StatusCode::kUnavailable);
}

TEST(Goodbyes, APrivateDaemonLeavesWhenIdleButStaysLongerWhileItHoldsSteps) {
  H h;
  h.config.idle_exit_ns = 300 * kNanosPerSecond;
  h.config.idle_exit_holding_ns = 3600 * kNanosPerSecond;
  h.core = std::make_unique<NodeCore>(h.config);
  h.core->Restore(h.now, {}, {});
  const H::Writer w = h.Open(h.Connect(1), 1);
  h.Save(w, 1);
  h.Die(w.client);
  const auto exited = [&] { return std::any_of(h.actions.begin(), h.actions.end(), [](const Action& a) { return std::holds_alternative<action::ExitDaemon>(a); }); };
  h.Advance(300 * kNanosPerSecond);
  EXPECT_FALSE(exited());
  h.Advance(3300 * kNanosPerSecond);
  EXPECT_TRUE(exited());
}

TEST(Goodbyes, AnIdleDaemonThatEndsPromisesNothingMore) {  // I-5: what it acknowledged now would be gone in a moment
  H h;
  h.config.idle_exit_ns = kNanosPerSecond;
  h.core = std::make_unique<NodeCore>(h.config);
  h.core->Restore(h.now, {}, {});
  h.Advance(2 * kNanosPerSecond);
  ASSERT_TRUE(std::holds_alternative<action::ExitDaemon>(h.actions.back()));
  h.Step(event::Connected{70, 1000, 70, 7});
  HelloRequest hello;
  hello.session = TestId(7);
  EXPECT_EQ(h.Ask({70, TestId(7), 1000, 70}, MessageType::kHello, hello).status, StatusCode::kUnavailable);
}

TEST(Waits, EndAtTheirDeadlineAndSayHowFarItCame) {  // I-29
  H h;
  const H::Writer w = h.Open(h.Connect(1), 1, 2, 0);
  const ReserveReply r = h.Reserve(w, 1);
  h.TrySeal(w, r.lease);
  h.Wait(w.client, r.attempt);
  const uint64_t waiting = h.last_request;
  h.Advance(kNanosPerSecond);
  EXPECT_EQ(h.Reply(waiting).status, StatusCode::kDeadline);
  EXPECT_NE(h.Reply(waiting).ToStatus().message().find("1 of 2"), std::string::npos);
  EXPECT_EQ(h.Ask(w.client, MessageType::kWait, WaitRequest{"job", r.attempt, Level::kDurable, 1}).status, StatusCode::kInvalidArgument);
  EXPECT_EQ(h.Wait(w.client, TestId(9)).status, StatusCode::kNotFound);
}

TEST(Waits, ARetiredStepWasComplete) {
  H h(8, 1);
  const H::Writer w = h.Open(h.Connect(1), 1);
  const Id128 one = h.Save(w, 1);
  h.Save(w, 2);
  EXPECT_EQ(H::Body<WaitReply>(h.Wait(w.client, one)).level, Level::kNone);
}

}  // namespace
}  // namespace sp
