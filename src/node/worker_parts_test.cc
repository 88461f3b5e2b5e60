// The parts of the worker that can be looked at one by one. The whole worker is tested as a process (tests/process).
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <future>
#include <nlohmann/json.hpp>

#include "base/crc32c.h"
#include "base/sha256.h"
#include "node/client_connection.h"
#include "node/executor.h"
#include "node/ledger_keeping.h"
#include "node/logging.h"
#include "node/metrics.h"
#include "node/shard_checks.h"
#include "node/state_dir.h"
#include "os/memfd.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr uint64_t kExtentBytes = 1u << 20;

// --- log lines

TEST(Logging, I40_LineBudgetBoundsWhatOneUserCauses) {
  LineBudget budget(10);
  Nanos now = kNanosPerSecond;
  uint64_t granted = 0;
  for (int i = 0; i < 1000; ++i) granted += budget.Take(now);
  EXPECT_EQ(granted, 100u);
  EXPECT_EQ(budget.TakeRefused(), 900u);
  EXPECT_EQ(budget.TakeRefused(), 0u);
  now += kNanosPerSecond;
  for (int i = 0; i < 1000; ++i) granted += budget.Take(now);
  EXPECT_EQ(granted, 110u);
}

TEST(Logging, LinesAreOneJsonObjectWhateverTheValues) {
  const std::string line = JsonLine("t", LogSeverity::kWarning, "event", {{"why", "a\"b\\c\n{\x01\xff\xfe"}});
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["level"], "warn");
  EXPECT_EQ(json["event"], "event");
  EXPECT_TRUE(json["why"].get<std::string>().starts_with("a\"b\\c\n{"));
}

// --- executor

TEST(Executor, RunsJobsElsewhereAndCompletionsHere) {
  auto executor = Executor::Create(2, 64).value();
  const auto here = std::this_thread::get_id();
  int done = 0;
  for (int i = 0; i < 64; ++i) {
    ASSERT_TRUE(executor->Submit([&, here] {
      EXPECT_NE(std::this_thread::get_id(), here);
      return Executor::Completion([&, here] {
        EXPECT_EQ(std::this_thread::get_id(), here);
        ++done;
      });
    }));
  }
  while (done < 64) {
    ASSERT_TRUE(WaitReadable(executor->fd(), 10 * kNanosPerSecond).value());
    executor->RunCompletions();
  }
}

TEST(Executor, I40_QueueIsBoundedAndStopRunsNoCompletion) {
  std::promise<void> go, running;
  bool completed = false;
  auto executor = Executor::Create(1, 1).value();
  ASSERT_TRUE(executor->Submit([&] {
    running.set_value();
    go.get_future().wait();
    return Executor::Completion([&] { completed = true; });
  }));
  running.get_future().wait();  // From here on, the thread is busy and the queue empty.
  ASSERT_TRUE(executor->Submit([&] { return Executor::Completion([&] { completed = true; }); }));
  EXPECT_FALSE(executor->Submit([] { return Executor::Completion([] {}); }));
  go.set_value();
  executor.reset();  // Joins; would hang if the thread did not see the stop.
  EXPECT_FALSE(completed);
}

TEST(Executor, I27_OneLargeJobRunsAtATimeAndOthersPassIt) {
  std::atomic<int> running = 0, most = 0;
  int done = 0;
  std::promise<void> go;
  std::shared_future<void> gone = go.get_future();
  auto executor = Executor::Create(3, 64).value();
  for (int i = 0; i < 8; ++i) {
    ASSERT_TRUE(executor->Submit(
        [&, gone, i] {
          most = std::max(most.load(), ++running);
          if (i == 0) gone.wait();
          --running;
          return Executor::Completion([&] { ++done; });
        },
        true));
  }
  int small = 0;
  for (int i = 0; i < 8; ++i) ASSERT_TRUE(executor->Submit([&] { return Executor::Completion([&] { ++small; }); }));
  const auto run_until = [&](const int& count) {
    while (count < 8) {
      ASSERT_TRUE(WaitReadable(executor->fd(), 10 * kNanosPerSecond).value());
      executor->RunCompletions();
    }
  };
  run_until(small);  // Although a large one runs, and others wait.
  EXPECT_EQ(done, 0);
  go.set_value();
  run_until(done);
  EXPECT_EQ(most, 1);
}

// --- what is read of a shard

class ShardChecksTest : public testing::Test {
 protected:
  // A shard over two extents, with its checksum list behind it.
  void SetUp() override {
    for (int i = 0; i < 2; ++i) fds_.push_back(std::make_shared<const Fd>(CreateMemfd("test", kExtentBytes).value()));
    bytes_.resize(kExtentBytes + 300'000);
    for (size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<uint8_t>(i * 31 + i / 977);
    Write(0, bytes_);
    for (uint64_t at = 0; at < bytes_.size(); at += kBlockBytes) {
      list_.push_back(Crc32c(0, ByteSpan(bytes_).subspan(at, std::min<uint64_t>(kBlockBytes, bytes_.size() - at))));
    }
    Write(ChecksumListOffset(bytes_.size()), {reinterpret_cast<const uint8_t*>(list_.data()), list_.size() * 4});
    check_.lease = 7;
    check_.length_bytes = bytes_.size();
    check_.block_root = BlockRoot(list_);
    check_.whole_crc = Crc32c(0, bytes_);
    check_.static_offset = 10;
    check_.header_bytes = 100;
    check_.structure = Sha256(ByteSpan(bytes_).subspan(10, 90));
  }
  void Write(uint64_t offset, ByteSpan data) {
    while (!data.empty()) {
      const uint64_t within = offset % kExtentBytes;
      const size_t count = std::min<size_t>(data.size(), kExtentBytes - within);
      ASSERT_TRUE(PWriteExact(fds_[offset / kExtentBytes]->get(), data.first(count), within).ok());
      data = data.subspan(count);
      offset += count;
    }
  }
  ExtentSet Lease() const { return ExtentSet(fds_, kExtentBytes); }
  StatusCode BlockCode(uint64_t block) const {
    return RunCheckBlock({1, {}, bytes_.size(), block, BlockRoot(list_)}, Lease()).status.code();
  }

  std::vector<SharedFd> fds_;
  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> list_;
  action::CheckSeal check_;
};

TEST_F(ShardChecksTest, AcceptsWhatIsRight) {
  const auto result = RunCheckSeal(check_, Lease());
  EXPECT_TRUE(result.status.ok()) << result.status.message();
  EXPECT_EQ(result.lease, 7u);
  EXPECT_EQ(BlockCode(0), StatusCode::kOk);
  EXPECT_EQ(BlockCode(1), StatusCode::kOk);
}

TEST_F(ShardChecksTest, I11_WrongRootOrWholeChecksumIsCorrupt) {
  auto wrong = check_;
  wrong.whole_crc ^= 1;
  EXPECT_EQ(RunCheckSeal(wrong, Lease()).status.code(), StatusCode::kCorrupt);
  wrong = check_;
  wrong.block_root.bytes[3] ^= 1;
  EXPECT_EQ(RunCheckSeal(wrong, Lease()).status.code(), StatusCode::kCorrupt);
  wrong = check_;
  wrong.length_bytes -= 1;  // The list is elsewhere or says something else.
  EXPECT_EQ(RunCheckSeal(wrong, Lease()).status.code(), StatusCode::kCorrupt);
}

TEST_F(ShardChecksTest, I26_NumbersThatLieAreRefusedNotFollowed) {
  for (const uint64_t length : {uint64_t{2} * kExtentBytes, uint64_t{1} << 40, ~uint64_t{0}}) {
    auto wrong = check_;
    wrong.length_bytes = length;
    EXPECT_EQ(RunCheckSeal(wrong, Lease()).status.code(), StatusCode::kProtocol) << length;
  }
  auto wrong = check_;
  wrong.want_structure = true;
  wrong.header_bytes = ~uint64_t{0};
  EXPECT_EQ(RunCheckSeal(wrong, Lease()).status.code(), StatusCode::kProtocol);
  wrong.header_bytes = 100;
  wrong.static_offset = 101;
  EXPECT_EQ(RunCheckSeal(wrong, Lease()).status.code(), StatusCode::kProtocol);
  wrong.static_offset = 10;
  wrong.header_bytes = 200u << 20;  // More than the extents hold.
  EXPECT_EQ(RunCheckSeal(wrong, Lease()).status.code(), StatusCode::kProtocol);
  EXPECT_EQ(BlockCode(2), StatusCode::kInvalidArgument);
}

TEST_F(ShardChecksTest, StructureIsAlwaysHashedAndParsedWhenWanted) {
  auto check = check_;
  check.want_structure = true;
  EXPECT_EQ(RunCheckSeal(check, Lease()).status.code(), StatusCode::kProtocol);  // The hash is right, the text is no index.
  for (const bool want : {false, true}) {
    check.want_structure = want;
    check.structure.bytes[0] ^= 1;
    EXPECT_EQ(RunCheckSeal(check, Lease()).status.code(), StatusCode::kCorrupt) << want;
    check.structure.bytes[0] ^= 1;
  }
}

TEST_F(ShardChecksTest, I12_EveryFlippedBitIsFoundAndOnlyThere) {
  const uint8_t flipped = bytes_[kExtentBytes + 5] ^ 0x10;
  Write(kExtentBytes + 5, {&flipped, 1});
  EXPECT_EQ(BlockCode(0), StatusCode::kOk);
  EXPECT_EQ(BlockCode(1), StatusCode::kCorrupt);
}

TEST_F(ShardChecksTest, I26_TruncatedMemoryIsAnErrorNotASignal) {
  ASSERT_EQ(ftruncate(fds_[1]->get(), 4096), 0);  // A client cannot: extents are size-sealed. If it could, we would survive it.
  EXPECT_FALSE(RunCheckSeal(check_, Lease()).status.ok());
}

// --- a client's connection

TEST(ClientConnection, F87_ClientThatReadsNothingIsBounded) {
  auto ends = UnixSocketPair().value();
  ClientConnection connection(std::move(ends.first), PeerIdentity{});
  const std::vector<uint8_t> frame(kFrameBytesMax, 7);
  Status status;
  int sent = 0;
  while (status.ok() && sent < 10'000) {
    status = connection.Send({frame, {}, false});
    sent += status.ok();
  }
  EXPECT_EQ(status.code(), StatusCode::kLimit);
  // All that was accepted arrives, in order, once the client reads.
  std::vector<uint8_t> buffer(kFrameBytesMax);
  for (int i = 0; i < sent; ++i) {
    ASSERT_TRUE(connection.Flush().ok());
    ASSERT_TRUE(ReceiveMessage(ends.second.get(), buffer, 0)) << i << " of " << sent;
  }
  EXPECT_FALSE(connection.has_queued());
}

TEST(ClientConnection, DescriptorsThatWaitAreCounted) {  // I-27: a frame of 36 bytes can hold 128 of them
  auto ends = UnixSocketPair().value();
  ClientConnection connection(std::move(ends.first), PeerIdentity{});
  const std::vector<SharedFd> extents(128, std::make_shared<const Fd>(CreateMemfd("test", kExtentBytes).value()));
  Status status;
  int queued = 0;
  for (; status.ok() && queued < 10'000; ++queued) status = connection.Send({{1}, extents, false});
  EXPECT_EQ(status.code(), StatusCode::kLimit);
  EXPECT_LT(queued, 200);
}

TEST(ClientConnection, LendsReadOnlyWhenAskedTo) {
  auto ends = UnixSocketPair().value();
  ClientConnection connection(std::move(ends.first), PeerIdentity{});
  const SharedFd extent = std::make_shared<const Fd>(CreateMemfd("test", kExtentBytes).value());
  ASSERT_TRUE(connection.Send({{1}, {extent}, true}).ok());
  // The second has to wait until the first has arrived: descriptors that nobody takes are everybody's, whom this user serves (I-26).
  ASSERT_TRUE(connection.Send({{2}, {extent}, false}).ok());
  ASSERT_TRUE(connection.Flush().ok());
  EXPECT_TRUE(connection.has_queued() && connection.must_retry());
  std::array<uint8_t, 8> buffer;
  const auto first = ReceiveMessage(ends.second.get(), buffer, 1);
  ASSERT_TRUE(first && first->fds.size() == 1);
  EXPECT_FALSE(PWriteExact(first->fds[0].get(), AsBytes("x"), 0).ok());
  EXPECT_FALSE(ReceiveMessage(ends.second.get(), buffer, 1).has_value());
  ASSERT_TRUE(connection.Flush().ok());
  EXPECT_FALSE(connection.has_queued() || connection.must_retry());
  const auto second = ReceiveMessage(ends.second.get(), buffer, 1);
  ASSERT_TRUE(second && second->fds.size() == 1);
  EXPECT_TRUE(PWriteExact(second->fds[0].get(), AsBytes("x"), 0).ok());
}

// --- the ledger

class LedgerKeepingTest : public testing::Test {
 protected:
  static constexpr uint64_t kBytes = 64u << 10;
  LedgerKeepingTest() : fd_(CreateMemfd("ledger", kBytes).value()) {
    EXPECT_TRUE(SealSize(fd_.get()).ok());
    keeping_ = LedgerKeeping::Open(fd_.get(), kBytes).value();
  }
  static LedgerEntry Entry(uint64_t slot, size_t extents) { return ledger::Slot{slot, {}, std::vector<uint32_t>(extents, 1)}; }

  Fd fd_;
  std::optional<LedgerKeeping> keeping_;
};

TEST_F(LedgerKeepingTest, CompactsWhenFullAndSkipsTheRestOfTheStep) {
  std::vector<LedgerEntry> state;
  int snapshots = 0;
  const auto snapshot = [&] {
    ++snapshots;
    return state;
  };
  // Each step replaces the one fact there is; its two entries are both part of the snapshot.
  for (uint64_t i = 1; i <= 2000; ++i) {
    state = {Entry(i, 100)};
    keeping_->BeginStep();
    ASSERT_TRUE(keeping_->Append(ledger::SlotGone{i - 1}, snapshot).ok());
    ASSERT_TRUE(keeping_->Append(state[0], snapshot).ok());
  }
  EXPECT_GT(snapshots, 5);
  EXPECT_EQ(keeping_->compactions(), static_cast<uint64_t>(snapshots));
  // Replayed: exactly the last fact is alive.
  std::set<uint64_t> alive;
  for (const LedgerEntry& entry : keeping_->Read().entries) {
    if (const auto* slot = std::get_if<ledger::Slot>(&entry)) alive.insert(slot->slot);
    if (const auto* gone = std::get_if<ledger::SlotGone>(&entry)) alive.erase(gone->slot);
  }
  EXPECT_EQ(alive, std::set<uint64_t>{2000});
}

TEST_F(LedgerKeepingTest, I27_RefusesNewWorkBeforeItCannotFinishOld) {
  std::vector<LedgerEntry> state;
  const auto snapshot = [&] { return state; };
  Nanos now = 10 * kNanosPerSecond;
  uint64_t admitted = 0;
  while (keeping_->Admit(MessageType::kReserve, now, snapshot).ok() && admitted < 10'000) {
    state.push_back(Entry(++admitted, 10));
    keeping_->BeginStep();
    ASSERT_TRUE(keeping_->Append(state.back(), snapshot).ok());
    now += 2 * kNanosPerSecond;
  }
  EXPECT_EQ(keeping_->Admit(MessageType::kReserve, now, snapshot).code(), StatusCode::kNoSpace);
  EXPECT_TRUE(keeping_->Admit(MessageType::kSeal, now, snapshot).ok());      // What was begun can be finished,
  EXPECT_TRUE(keeping_->Admit(MessageType::kOpenRead, now, snapshot).ok());  // and what is held can be read.
  keeping_->BeginStep();
  EXPECT_TRUE(keeping_->Append(ledger::SlotGone{1}, snapshot).ok());
  state.resize(state.size() / 2);  // Facts went; the next request finds room, though nobody appended.
  EXPECT_TRUE(keeping_->Admit(MessageType::kReserve, now + 2 * kNanosPerSecond, snapshot).ok());
}

// Found by ten thousand reservations of a raw client: a small log filled up within the second in which it was not compacted again.
TEST_F(LedgerKeepingTest, I27_BurstThatEndsWhatItBeginsIsNeverRefused) {
  const auto snapshot = [] { return std::vector<LedgerEntry>{}; };
  for (uint64_t i = 1; i <= 20'000; ++i) {
    ASSERT_TRUE(keeping_->Admit(MessageType::kReserve, kNanosPerSecond, snapshot).ok()) << i;
    keeping_->BeginStep();
    ASSERT_TRUE(keeping_->Append(Entry(i, 10), snapshot).ok());
    ASSERT_TRUE(keeping_->Append(ledger::SlotGone{i}, snapshot).ok());
  }
}

TEST_F(LedgerKeepingTest, I35_UnknownVersionIsRefusedAndLeftUntouched) {
  keeping_.reset();
  const uint32_t newer = Ledger::kVersion + 1;
  for (uint64_t offset = 8; offset < 16; offset += 4) {  // Wherever in the second word the version is.
    ASSERT_TRUE(PWriteExact(fd_.get(), {reinterpret_cast<const uint8_t*>(&newer), 4}, offset).ok());
  }
  std::vector<uint8_t> before(kBytes), after(kBytes);
  ASSERT_TRUE(PReadExact(fd_.get(), before, 0).ok());
  const auto opened = LedgerKeeping::Open(fd_.get(), kBytes);
  ASSERT_FALSE(opened);
  EXPECT_EQ(opened.error().code(), StatusCode::kProtocol);
  ASSERT_TRUE(PReadExact(fd_.get(), after, 0).ok());
  EXPECT_EQ(before, after);
}

// --- the state directory

class StateDirTest : public testing::Test {
 protected:
  StateDirTest() : path_(testing::TempDir() + "state_dir_test_" + std::to_string(getpid())) { std::filesystem::remove_all(path_); }
  ~StateDirTest() override { std::filesystem::remove_all(path_); }
  std::string path_;
};

TEST_F(StateDirTest, NodeIdStays) {
  const auto first = LoadOrMakeNodeId(path_);
  ASSERT_TRUE(first) << first.error().message();
  EXPECT_FALSE(first->is_zero());
  EXPECT_EQ(LoadOrMakeNodeId(path_).value(), *first);
  ASSERT_EQ(truncate((path_ + "/node_id").c_str(), 3), 0);
  EXPECT_EQ(LoadOrMakeNodeId(path_).error().code(), StatusCode::kCorrupt);  // Not silently another node.
}

TEST_F(StateDirTest, MarkersStay) {
  EXPECT_TRUE(LoadMarkers(path_).value().empty());
  const Hash256 marker = Sha256(AsBytes("a"));
  ASSERT_TRUE(WriteMarkerFile(path_, marker).ok());
  ASSERT_TRUE(WriteMarkerFile(path_, marker).ok());
  EXPECT_EQ(LoadMarkers(path_).value(), std::vector<Hash256>{marker});
}

TEST_F(StateDirTest, F53_UnusableDirectoryIsAnErrorNotAnEmptyList) {
  std::filesystem::create_directories(path_);
  { std::ofstream(path_ + "/markers") << "a file where the directory should be"; }
  EXPECT_FALSE(LoadMarkers(path_));
  EXPECT_FALSE(WriteMarkerFile(path_, Hash256{}).ok());
}

// --- pages

TEST(StatusBoard, HealthFollowsTheLoop) {
  ManualClock clock;
  StatusBoard board(clock);
  board.Beat();
  EXPECT_EQ(board.HealthPage().status, 200u);
  EXPECT_EQ(board.MetricsPage().status, 503u);  // Nothing published yet.
  clock.Advance(StatusBoard::kHealthyWithin + 1);
  EXPECT_EQ(board.HealthPage().status, 503u);
  board.Beat();
  EXPECT_EQ(board.HealthPage().status, 200u);
}

TEST(Metrics, EachFamilyIsDeclaredOnceAndNumbersComeFromTheCore) {
  const std::string text = RenderMetrics(
      R"({"version":"9","pool":{"extent_bytes":4,"bytes_max":40,"leased":8},"connections":3,"totals":{"seals":5},"attempts":{"complete":2}})",
      {.incarnation = 2, .extents_held = 6});
  for (const char* line : {"safepoint_pool_bytes{state=\"leased\"} 8\n", "safepoint_pool_bytes_max 40\n", "safepoint_pool_held_bytes 24\n",
                           "safepoint_connections 3\n", "safepoint_seals_total 5\n", "safepoint_attempts{state=\"complete\",level=\"memory\"} 2\n",
                           "safepoint_worker_incarnation 2\n", "safepoint_build_info{version=\"9\"} 1\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "\n" << text;
  }
  std::istringstream lines(text);
  std::set<std::string> families;
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with("# TYPE ")) {
      EXPECT_TRUE(families.insert(line.substr(7, line.find(' ', 7) - 7)).second) << line;
    } else if (!line.starts_with("#")) {
      EXPECT_TRUE(families.contains(line.substr(0, line.find_first_of(" {")))) << line;
    }
  }
}

}  // namespace
}  // namespace sp
