// Slots, leases, transfers: the path of a save.
#include <atomic>
#include <future>
#include <latch>

#include "base/crc32c.h"
#include "client/client_test_util.h"
#include "os/memfd.h"

namespace sp {
namespace {

using Answer = FakeDaemon::Answer;
constexpr uint64_t kLength = 3 * kBlockBytes + 12345;

Nanos Soon() { return MonotonicNow() + 20 * kNanosPerSecond; }

// I-11: the checksums that are sealed are those of the source bytes, and lie behind them.
TEST_F(ClientTest, SealedBytesListAndRootAreThoseOfTheSource) {
  daemon_.Start();
  auto client = Connect();
  for (const bool in_place : {false, true}) {
    const TestShard shard(kLength);
    SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
    EXPECT_GE(lease->capacity(), LeaseBytes(kLength));
    std::memset(lease->data(), 0xee, lease->capacity());  // What an earlier save left.
    auto segments = shard.segments();
    if (in_place) {
      std::memcpy(lease->data() + segments[0].offset, segments[0].source, segments[0].size);
      segments.erase(segments.begin());
    }
    SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, in_place ? lease->StartInPlace(shard.header(), segments, shard.seal)
                                                              : lease->Start(shard.header(), segments, shard.seal));
    SP_ASSERT_OK(transfer.WaitCopied(Soon()));
    SP_ASSERT_OK_AND_ASSIGN(const SealReply reply, transfer.WaitSealed(Soon()));
    EXPECT_TRUE(reply.complete);
    EXPECT_TRUE(transfer.copied() && transfer.sealed());
    EXPECT_GT(transfer.copy_seconds(), 0);

    const uint64_t list = ChecksumListOffset(kLength);
    const auto bytes = daemon_.SlotBytes(lease->slot(), 0, LeaseBytes(kLength));
    EXPECT_TRUE(std::equal(shard.bytes.begin(), shard.bytes.end(), bytes.begin()));
    EXPECT_TRUE(layout::AllZero(ByteSpan(bytes).subspan(kLength, list - kLength)));
    std::vector<uint32_t> crcs;
    for (uint64_t block = 0; block < BlockCount(kLength); ++block) {
      const uint64_t begin = block * kBlockBytes;
      crcs.push_back(Crc32c(0, ByteSpan(shard.bytes).subspan(begin, std::min(kBlockBytes, kLength - begin))));
      EXPECT_EQ(layout::Get<uint32_t>(bytes, list + 4 * block), crcs.back()) << block;
    }
    SP_ASSERT_OK_AND_ASSIGN(const auto seal, Decode<SealRequest>(daemon_.Seen(MessageType::kSeal).back().body));
    EXPECT_EQ(seal.block_root, BlockRoot(crcs));
    EXPECT_EQ(seal.whole_crc, Crc32c(0, shard.bytes));
    EXPECT_EQ(seal.length_bytes, kLength);
    EXPECT_EQ(seal.header_bytes, TestShard::kHeaderBytes);
    EXPECT_EQ(seal.static_offset, TestShard::kStaticOffset);
    EXPECT_EQ(seal.structure, shard.seal.structure);
  }
}

TEST_F(ClientTest, ASlotIsMappedOnceAndPreparedSlotsNeedNoMapping) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  EXPECT_EQ(client->PrepareSlots("job", kLength, 2, kDefaultTimeout), 2u);
  EXPECT_EQ(client->mapped_slots(), 2u);
  const size_t fetches = daemon_.SeenCount(MessageType::kFetchExtents);
  for (int i = 0; i < 2; ++i) {
    SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength, i), kDefaultTimeout));
    SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
    SP_ASSERT_OK(transfer.WaitSealed(Soon()));
  }
  EXPECT_EQ(daemon_.SeenCount(MessageType::kFetchExtents), fetches);
  EXPECT_EQ(client->mapped_slots(), 2u);
}

TEST_F(ClientTest, DescriptorsComeInBatchesAndAreClosedAfterMapping) {
  daemon_.Start();
  auto client = Connect();
  const int before = CountOpenFds();
  const uint64_t length = 300 * kBlockBytes - 5000;  // 300 extents with its checksum list.
  SP_ASSERT_OK(client->PrepareSlots("job", length, 1, kDefaultTimeout));
  EXPECT_EQ(daemon_.SeenCount(MessageType::kFetchExtents), 3u);
  EXPECT_EQ(CountOpenFds() - 300, before);  // Those 300 are the fake daemon's.
}

TEST_F(ClientTest, ADissolvedSlotIsUnmappedButNotUnderItsTransfer) {
  daemon_.Start();
  auto client = Connect();
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
  daemon_.gone_slots = {lease->slot()};
  SP_ASSERT_OK_AND_ASSIGN(auto other, client->Reserve(Shard(kLength, 2), kDefaultTimeout));
  EXPECT_EQ(client->mapped_slots(), 1u);
  lease->data()[0] = 1;  // Still mapped for the lease that has it.
}

TEST_F(ClientTest, MemoryThatCouldShrinkIsNotMapped) {
  daemon_.Start();
  auto client = Connect();
  SP_ASSERT_OK_AND_ASSIGN(const Fd unsealed, CreateMemfd("bad", kBlockBytes));
  daemon_.SetHook(MessageType::kFetchExtents, [&](const Frame& f) -> std::optional<Answer> {
    return Answer{.frame = MakeFrame(f.type, f.request_id, FetchExtentsReply{0, 1, 1}), .fds = {unsealed.get()}};
  });
  SP_EXPECT_CODE(kProtocol, client->Reserve(Shard(10000), kDefaultTimeout));
  EXPECT_EQ(daemon_.SeenCount(MessageType::kAbort), 1u);  // The lease is given back.
  EXPECT_EQ(client->mapped_slots(), 0u);
}

TEST_F(ClientTest, FewerDescriptorsThanAnnouncedAreRefused) {
  daemon_.Start();
  auto client = Connect();
  SP_ASSERT_OK_AND_ASSIGN(const Fd fd, CreateMemfd("ok", kBlockBytes));
  SP_ASSERT_OK(SealSize(fd.get()));
  const std::vector<FetchExtentsReply> bad = {{0, 2, 1}, {0, 1, 7}, {1, 1, 1}};
  for (const FetchExtentsReply& reply : bad) {
    daemon_.SetHook(MessageType::kFetchExtents, [&](const Frame& f) -> std::optional<Answer> {
      return Answer{.frame = MakeFrame(f.type, f.request_id, reply), .fds = {fd.get()}};
    });
    SP_EXPECT_CODE(kProtocol, client->Reserve(Shard(10000), kDefaultTimeout));
  }
}

TEST_F(ClientTest, SegmentsThatDoNotTileAreRefusedAndTheLeaseStaysUsable) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
  auto segments = shard.segments();
  segments[1].size -= 1;
  SP_EXPECT_CODE(kInvalidArgument, lease->Start(shard.header(), segments, shard.seal));
  segments[1].size += 2;
  SP_EXPECT_CODE(kInvalidArgument, lease->Start(shard.header(), segments, shard.seal));
  SP_EXPECT_CODE(kInvalidArgument, lease->StartInPlace(shard.header(), segments, shard.seal));
  SP_EXPECT_CODE(kInvalidArgument, lease->Start({}, shard.segments(), shard.seal));
  SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_EXPECT_CODE(kInvalidArgument, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(transfer.WaitSealed(Soon()));
}

// I-5: a lost answer to the seal does not lose the step.
TEST_F(ClientTest, ASealWhoseAnswerIsLostIsRepeated) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  std::atomic<int> calls = 0;
  daemon_.SetHook(MessageType::kSeal, [&](const Frame&) -> std::optional<Answer> {
    if (calls++ == 0) return Answer{.close = true};
    return std::nullopt;
  });
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(transfer.WaitSealed(Soon()));
  const auto seals = daemon_.Seen(MessageType::kSeal);
  ASSERT_EQ(seals.size(), 2u);
  EXPECT_EQ(seals[0].body, seals[1].body);
}

TEST_F(ClientTest, ARefusedSealFailsTheTransferAndGivesTheLeaseBack) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  daemon_.SetHook(MessageType::kSeal, [](const Frame& f) -> std::optional<Answer> {
    return Answer{.frame = Frame::Error(f.type, f.request_id, Status(StatusCode::kFenced, "superseded"))};
  });
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(transfer.WaitCopied(Soon()));
  SP_EXPECT_CODE(kFenced, transfer.WaitSealed(Soon()));
  EXPECT_EQ(daemon_.SeenCount(MessageType::kAbort), 1u);
}

TEST_F(ClientTest, ADroppedHandleDoesNotStopTheSave) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  {
    SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
    SP_ASSERT_OK(lease->Start(shard.header(), shard.segments(), shard.seal));
  }
  client->Close();  // Waits for it.
  EXPECT_EQ(daemon_.SeenCount(MessageType::kSeal), 1u);
  EXPECT_EQ(daemon_.SeenCount(MessageType::kAbort), 0u);
}

TEST_F(ClientTest, AnUnusedLeaseIsAbortedOnce) {
  daemon_.Start();
  auto client = Connect();
  {
    SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
    SP_ASSERT_OK(lease->Abort(std::string(1000, 'x')));
    SP_ASSERT_OK(lease->Abort("again"));
  }
  { SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength, 2), kDefaultTimeout)); }
  client->Close();
  EXPECT_EQ(daemon_.SeenCount(MessageType::kAbort), 2u);
}

// I-21: a fenced writer stops. Its transfers wait for a thread here, so that the lease ends before the copy begins.
TEST_F(ClientTest, AnEndedLeaseCancelsTheCopy) {
  daemon_.lease_ns = 30 * kNanosPerMilli;
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  std::latch go_on(1);
  daemon_.SetHook(MessageType::kSeal, [&](const Frame&) -> std::optional<Answer> {
    go_on.wait();
    return std::nullopt;
  });
  std::vector<std::unique_ptr<Lease>> leases;
  std::vector<Transfer> transfers;
  for (uint64_t step = 0; step <= kTransferThreads; ++step) {
    SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength, step), kDefaultTimeout));
    SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
    leases.push_back(std::move(lease));
    transfers.push_back(transfer);
  }
  daemon_.AwaitSeen(MessageType::kSeal, kTransferThreads);
  const uint64_t fenced = leases.back()->slot() + 1;  // The fake daemon numbers a lease after its slot.
  std::latch answered(1);                             // Renewals go one after the other: another one came after the refusal.
  std::atomic<int> after = 0;
  daemon_.SetHook(MessageType::kRenew, [&](const Frame& f) -> std::optional<Answer> {
    if (Decode<LeaseRequest>(f.body)->lease != fenced) {
      if (after > 0 && after.fetch_add(1) == 1) answered.count_down();
      return std::nullopt;
    }
    after = 1;
    return Answer{.frame = Frame::Error(f.type, f.request_id, Status(StatusCode::kFenced, "superseded"))};
  });
  answered.wait();
  go_on.count_down();
  SP_EXPECT_CODE(kFenced, transfers.back().WaitCopied(Soon()));
  SP_EXPECT_CODE(kFenced, transfers.back().WaitSealed(Soon()));
}

// What is held is copied, so that its sources may change, and counts only when it is released.
TEST_F(ClientTest, AHeldSaveIsSealedAfterItsReleaseAndNeverAfterAnAbort) {
  daemon_.Start();
  auto client = Connect();
  TestShard shard(kLength);
  shard.seal.hold = true;
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(transfer.WaitCopied(Soon()));
  SP_EXPECT_CODE(kDeadline, transfer.WaitSealed(MonotonicNow()));
  EXPECT_EQ(daemon_.SeenCount(MessageType::kSeal), 0u);
  SP_ASSERT_OK(transfer.Release());
  SP_ASSERT_OK(transfer.WaitSealed(Soon()));

  SP_ASSERT_OK_AND_ASSIGN(auto refused, client->Reserve(Shard(kLength, 2), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(Transfer other, refused->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(other.WaitCopied(Soon()));
  SP_ASSERT_OK(refused->Abort("another planner"));
  SP_ASSERT_OK(other.Release());  // Too late.
  SP_EXPECT_CODE(kClosed, other.WaitSealed(Soon()));
  EXPECT_EQ(daemon_.SeenCount(MessageType::kSeal), 1u);
  EXPECT_EQ(daemon_.SeenCount(MessageType::kAbort), 1u);

  SP_ASSERT_OK_AND_ASSIGN(auto left, client->Reserve(Shard(kLength, 3), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(const Transfer never, left->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(never.WaitCopied(Soon()));
  client->Close(0);
  SP_EXPECT_CODE(kClosed, never.WaitSealed(MonotonicNow()));
}

TEST_F(ClientTest, CloseCancelsWhatDoesNotFinish) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  daemon_.SetHook(MessageType::kSeal, [](const Frame&) { return Answer{}; });  // Never answers.
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
  SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(transfer.WaitCopied(Soon()));
  SP_EXPECT_CODE(kDeadline, transfer.WaitSealed(MonotonicNow()));
  client->Close(0);
  SP_EXPECT_CODE(kClosed, transfer.WaitSealed(MonotonicNow()));
}

// The keeper died: its ids mean nothing to the next one, which uses the same numbers again.
TEST_F(ClientTest, ReplacedMemoryFailsOpenLeasesAndDropsMappings) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  SP_ASSERT_OK_AND_ASSIGN(auto old, client->Reserve(Shard(kLength), kDefaultTimeout));
  daemon_.ReplaceMemory();
  SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, old->Start(shard.header(), shard.segments(), shard.seal));
  SP_EXPECT_CODE(kClosed, transfer.WaitSealed(Soon()));
  EXPECT_EQ(daemon_.SeenCount(MessageType::kSeal), 0u);
  SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength), kDefaultTimeout));
  EXPECT_EQ(lease->slot(), old->slot());
  EXPECT_NE(lease->data(), old->data());
  EXPECT_EQ(client->mapped_slots(), 1u);
  SP_ASSERT_OK_AND_ASSIGN(const Transfer again, lease->Start(shard.header(), shard.segments(), shard.seal));
  SP_ASSERT_OK(again.WaitSealed(Soon()));
}

TEST_F(ClientTest, SeveralSavesAtOnce) {
  daemon_.Start();
  auto client = Connect();
  const TestShard shard(kLength);
  std::vector<Transfer> transfers;
  for (uint64_t step = 0; step < 8; ++step) {
    SP_ASSERT_OK_AND_ASSIGN(auto lease, client->Reserve(Shard(kLength, step), kDefaultTimeout));
    SP_ASSERT_OK_AND_ASSIGN(const Transfer transfer, lease->Start(shard.header(), shard.segments(), shard.seal));
    transfers.push_back(transfer);
  }
  for (const Transfer& transfer : transfers) SP_ASSERT_OK(transfer.WaitSealed(Soon()));
}

}  // namespace
}  // namespace sp
