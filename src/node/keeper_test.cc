// The keeper with a real worker process, which is this program again (keeper_fake_worker.h).
#include "node/keeper.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>

#include "node/keeper_fake_worker.h"
#include "node/keeper_protocol.h"
#include "os/files.h"
#include "os/pidfd.h"
#include "os/process.h"
#include "os/test_util.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

constexpr Nanos kPatience = 30 * kNanosPerSecond;
Nanos Later() { return MonotonicNow() + kPatience; }

class KeeperTest : public testing::Test {
 protected:
  KeeperTest() {
    config_.socket_path = directory_.File("s");
    config_.extent_bytes = 64 * 1024;
    config_.extents_at_start = 3;
    config_.extents_max = 400;
    config_.ledger_bytes = 64 * 1024;
    config_.backoff_first = std::chrono::milliseconds(1);
    config_.backoff_max = std::chrono::milliseconds(4);
    Mode("serve");
  }
  ~KeeperTest() override {
    if (keeper_ == 0) return;
    ::kill(keeper_, SIGKILL);
    ::waitpid(keeper_, nullptr, 0);
  }

  void Mode(const std::string& mode) { config_.worker_argv = {"fake-worker", "--fake-worker", mode}; }

  // Runs in the child, before the keeper.
  void Start(void (*prepare)() = [] {}) {
    const pid_t parent = ::getpid();
    keeper_ = ::fork();
    ASSERT_GE(keeper_, 0);
    if (keeper_ > 0) return;
    if (::freopen(directory_.File("log").c_str(), "a", stderr) == nullptr) ::_exit(99);
    ::setvbuf(stderr, nullptr, _IONBF, 0);
    prepare();
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(99);
    ::_exit(RunKeeper(config_));
  }

  // The keeper's exit code; -1 when a signal ended it, -2 when nothing did.
  int WaitForEnd() {
    const Result<Fd> pidfd = OpenPidfd(keeper_);
    if (!pidfd || !WaitReadable(pidfd->get(), kPatience).value()) return -2;
    const Result<ExitStatus> ended = WaitChild(keeper_);
    keeper_ = 0;
    return ended && ended->signal == 0 ? ended->code : -1;
  }

  int Stop() {
    ::kill(keeper_, SIGTERM);
    return WaitForEnd();
  }

  // Connects when the keeper is listening, asks, waits for the worker's answer; "gone" when the worker ended instead.
  std::string Ask(const std::string& question) {
    Result<Fd> connection = Connect();
    return connection ? AskOn(connection->get(), question) : connection.error().ToString();
  }

  Result<Fd> Connect() {
    for (;;) {
      Result<Fd> connection = ConnectUnix(config_.socket_path, Later());
      const bool starting = !connection && (connection.error().code() == StatusCode::kNotFound ||
                                            connection.error().code() == StatusCode::kUnavailable);
      siginfo_t ended{};
      ::waitid(P_PID, static_cast<id_t>(keeper_), &ended, WEXITED | WNOHANG | WNOWAIT);
      if (!starting || ended.si_pid != 0) return connection;
      ::usleep(1000);  // The keeper's start has no other sign than its socket.
    }
  }

  static std::string AskOn(int fd, const std::string& question) {
    std::array<uint8_t, 8192> buffer;
    if (const Status sent = SendMessage(fd, AsBytes(question)); !sent.ok()) return sent.ToString();
    const Result<ReceivedMessage> answer = ReceiveMessageBy(fd, buffer, 0, Later());
    if (!answer) return answer.error().code() == StatusCode::kClosed ? "gone" : answer.error().ToString();
    return std::string(AsText(ByteSpan(buffer).first(answer->size_bytes)));
  }

  std::string Field(const std::string& name) {
    const std::string info = Ask("info");
    const size_t at = info.find(name + "=");
    if (at == std::string::npos) return info;
    const size_t begin = at + name.size() + 1;
    return info.substr(begin, info.find(' ', begin) - begin);
  }

  pid_t WorkerPid() { return static_cast<pid_t>(std::stol(Field("pid"))); }

  std::string Log() const { return ReadFile(directory_.File("log"), 1 << 20).value_or(""); }
  bool Logged(const std::string& text) const { return Log().find(text) != std::string::npos; }

  // Waits until the start's extents are all there.
  void AwaitIds(const std::string& ids) {
    for (const Nanos deadline = Later(); MonotonicNow() < deadline && Field("ids") != ids;) {
    }
    ASSERT_EQ(Field("ids"), ids);
  }

  TemporaryDirectory directory_;
  KeeperConfig config_;
  pid_t keeper_ = 0;
};

// I-25: kill the worker at any time; descriptors, contents and ids come back.
TEST_F(KeeperTest, TwentyKillsOfTheWorkerLoseNothing) {
  Start();
  AwaitIds("0,1,2");
  EXPECT_EQ(Ask("create 100 2"), "created:100 created:101 ");
  EXPECT_EQ(Ask("create 7 1"), "created:7 ");
  const std::vector<int> ids = {0, 1, 2, 7, 100, 101};
  for (int id : ids) ASSERT_EQ(Ask("put " + std::to_string(id) + " content" + std::to_string(id)), "OK");
  ASSERT_EQ(Ask("put-ledger ledger0"), "OK");
  pid_t before = 0;
  for (int round = 0; round < 20; ++round) {
    const pid_t worker = WorkerPid();
    EXPECT_NE(worker, before);
    before = worker;
    ASSERT_EQ(::kill(worker, SIGKILL), 0);
    const std::string info = Ask("info");
    EXPECT_NE(info.find(" incarnation=" + std::to_string(round + 2) + " sealed=1 fds=5 "), std::string::npos) << info;
    EXPECT_NE(info.find(" ids=0,1,2,7,100,101"), std::string::npos) << info;
    for (int id : ids) ASSERT_EQ(Ask("get " + std::to_string(id)), "content" + std::to_string(id));
    ASSERT_EQ(Ask("get-ledger"), "ledger" + std::to_string(round));
    ASSERT_EQ(Ask("put-ledger ledger" + std::to_string(round + 1)), "OK");
  }
  EXPECT_EQ(Stop(), 0);
  EXPECT_TRUE(Logged("\"how\":\"signal SIGKILL\""));
}

TEST_F(KeeperTest, ManyExtentsWithGapsComeBack) {
  config_.extent_bytes = 4096;
  config_.extents_at_start = 300;
  Start();
  std::string ids;
  for (int id = 0; id < 300; ++id) ids += (id == 0 ? "" : ",") + std::to_string(id);
  AwaitIds(ids);
  ids.clear();
  for (int id = 0; id < 300; ++id) {
    if (id % 2 == 1 && id < 200) {
      ASSERT_EQ(Ask("drop " + std::to_string(id)), "OK");
    } else {
      ids += (ids.empty() ? "" : ",") + std::to_string(id);
      ASSERT_EQ(Ask("put " + std::to_string(id) + " c" + std::to_string(id)), "OK");
    }
  }
  EXPECT_EQ(Ask("drop 1"), "NOT_FOUND");
  ASSERT_EQ(::kill(WorkerPid(), SIGKILL), 0);
  EXPECT_EQ(Field("ids"), ids);
  for (int id : {0, 2, 198, 200, 201, 299}) EXPECT_EQ(Ask("get " + std::to_string(id)), "c" + std::to_string(id));
  EXPECT_EQ(Ask("create 1 1"), "created:1 ");
  EXPECT_EQ(Ask("get 1"), "-");  // A dropped id that is made again is new memory.
}

TEST_F(KeeperTest, CommandsBeyondTheSocketsRoomAllGetTheirAnswer) {
  Start();
  EXPECT_EQ(Ask("flood-drops 5000"), "OK");
  EXPECT_EQ(Field("incarnation"), "1");
}

// I-40 towards the worker: what it asks for is checked, and refused as a whole.
TEST_F(KeeperTest, RefusesDuplicatesAndMoreThanItsMaximum) {
  config_.extents_max = 10;
  Start();
  AwaitIds("0,1,2");
  EXPECT_EQ(Ask("create 10 8"), "failed:10+8:LIMIT ");
  EXPECT_EQ(Ask("create 0 4000000000"), "failed:0+4000000000:LIMIT ");
  EXPECT_EQ(Ask("create 2 2"), "failed:2+2:INVALID_ARGUMENT ");
  EXPECT_EQ(Ask("create 4294967295 2"), "failed:4294967295+2:INVALID_ARGUMENT ");
  EXPECT_EQ(Ask("create 5 0"), "failed:5+0:INVALID_ARGUMENT ");
  EXPECT_EQ(Field("ids"), "0,1,2");
  EXPECT_EQ(Ask("create 4294967290 6").substr(0, 19), "created:4294967290 ");
  EXPECT_EQ(Ask("create 3 1"), "created:3 ");
  EXPECT_EQ(Ask("create 4 1"), "failed:4+1:LIMIT ");
  EXPECT_EQ(Ask("drop 0"), "OK");
  EXPECT_EQ(Ask("create 4 1"), "created:4 ");
  EXPECT_EQ(Field("incarnation"), "1");
}

TEST_F(KeeperTest, BadCommandsCostTheWorkerItsLifeAndNothingElse) {
  Start();
  AwaitIds("0,1,2");
  ASSERT_EQ(Ask("put 1 kept"), "OK");
  int incarnation = 1;
  for (const char* kind : {"magic", "version", "command", "keeper-command", "attach", "reserved", "status", "short",
                           "long", "descriptor"}) {
    SP_ASSERT_OK_AND_ASSIGN(const Fd pidfd, OpenPidfd(WorkerPid()));
    Ask(std::string("raw ") + kind);
    ASSERT_TRUE(WaitReadable(pidfd.get(), kPatience).value()) << kind;
    EXPECT_EQ(Field("incarnation"), std::to_string(++incarnation)) << kind;
    EXPECT_EQ(Ask("get 1"), "kept") << kind;
  }
  size_t logged = 0;
  const std::string log = Log();
  for (size_t at = 0; (at = log.find("bad command", at)) != std::string::npos; ++at) ++logged;
  EXPECT_EQ(logged, 10u);
}

TEST_F(KeeperTest, WorkerThatClosedItsControlIsReplaced) {
  Start();
  ASSERT_EQ(Ask("close-control"), "OK");
  SP_ASSERT_OK_AND_ASSIGN(const Fd pidfd, OpenPidfd(WorkerPid()));
  ASSERT_TRUE(WaitReadable(pidfd.get(), kPatience).value());
  EXPECT_EQ(Field("incarnation"), "2");
}

// F18
TEST_F(KeeperTest, KilledKeeperTakesItsWorkerAlong) {
  Start();
  const pid_t worker = WorkerPid();
  SP_ASSERT_OK_AND_ASSIGN(const Fd pidfd, OpenPidfd(worker));
  ASSERT_EQ(::kill(worker, SIGSTOP), 0);  // It cannot end by itself when it finds the keeper gone.
  ASSERT_EQ(::kill(keeper_, SIGKILL), 0);
  EXPECT_TRUE(WaitReadable(pidfd.get(), kPatience).value());
  EXPECT_EQ(WaitForEnd(), -1);
  Start();  // The stale socket and lock file do not hinder the next keeper.
  EXPECT_EQ(Field("incarnation"), "1");
}

TEST_F(KeeperTest, TerminationIsOrderly) {
  Start();
  ASSERT_EQ(Field("incarnation"), "1");
  EXPECT_EQ(Stop(), 0);
  EXPECT_TRUE(Logged("\"how\":\"exit code 0\""));
  EXPECT_FALSE(Logged("worker_killed"));
  EXPECT_FALSE(std::filesystem::exists(config_.socket_path));
}

TEST_F(KeeperTest, StuckWorkerIsKilledAfterItsGrace) {
  config_.grace = std::chrono::milliseconds(50);
  Start();
  ASSERT_EQ(Ask("ignore-term"), "OK");
  const Nanos before = MonotonicNow();
  EXPECT_EQ(Stop(), 0);
  EXPECT_GE(MonotonicNow() - before, 50 * kNanosPerMilli);
  EXPECT_TRUE(Logged("\"how\":\"signal SIGKILL\""));
}

TEST_F(KeeperTest, WishOfTheWorkerEndsEverything) {
  Start();
  EXPECT_EQ(Ask("shutdown"), "OK");
  EXPECT_EQ(WaitForEnd(), 0);
  EXPECT_TRUE(Logged("wish of the worker"));
}

TEST_F(KeeperTest, WorkersOwnExitIsNoEnd) {
  Start();
  EXPECT_EQ(Ask("exit 0"), "gone");
  EXPECT_EQ(Field("incarnation"), "2");
  EXPECT_EQ(Ask("exit 1"), "gone");
  EXPECT_EQ(Field("incarnation"), "3");
}

TEST_F(KeeperTest, RefusedSettingsEndTheKeeperWithTheWorkersCode) {
  Mode("refuse");
  Start();
  EXPECT_EQ(WaitForEnd(), kExitConfig);
  EXPECT_FALSE(Logged("\"incarnation\":2"));
}

TEST_F(KeeperTest, ConnectionsQueueWhileNoWorkerRuns) {
  Mode("wait-for:" + directory_.File("go"));
  Start();
  SP_ASSERT_OK_AND_ASSIGN(const Fd first, Connect());
  SP_ASSERT_OK_AND_ASSIGN(const Fd second, Connect());
  SP_ASSERT_OK(WriteFileAtomic(directory_.File("go"), AsBytes("x"), 0600));
  EXPECT_NE(AskOn(first.get(), "info").find("pid="), std::string::npos);
  EXPECT_NE(AskOn(second.get(), "info").find("pid="), std::string::npos);
}

TEST_F(KeeperTest, BacksOffFromAWorkerThatKeepsDying) {
  Mode("fail");
  config_.backoff_first = std::chrono::milliseconds(20);
  config_.backoff_max = std::chrono::milliseconds(40);
  const Nanos before = MonotonicNow();
  Start();
  while (!Logged("\"incarnation\":6") && MonotonicNow() - before < kPatience) ::usleep(1000);
  EXPECT_GE(MonotonicNow() - before, (0 + 20 + 40 + 40 + 40) * kNanosPerMilli);
  EXPECT_TRUE(Logged("\"incarnation\":6"));
}

TEST_F(KeeperTest, TerminationBetweenTwoWorkers) {
  Mode("fail");
  config_.backoff_first = config_.backoff_max = std::chrono::hours(1);
  Start();
  const Nanos before = MonotonicNow();
  // The second worker starts at once, the third in an hour.
  while (!Logged("\"incarnation\":2,\"how\"") && MonotonicNow() - before < kPatience) ::usleep(1000);
  EXPECT_EQ(Stop(), 0);
}

TEST_F(KeeperTest, DeadWorkersWishesAreForgotten) {
  config_.extent_bytes = 1 << 20;
  Start();
  AwaitIds("0,1,2");
  const pid_t worker = WorkerPid();
  Ask("create-nowait 10 300");
  ASSERT_EQ(::kill(worker, SIGKILL), 0);
  const std::string ids = Field("ids");
  ASSERT_EQ(Field("incarnation"), "2");
  ASSERT_EQ(ids.find("309"), std::string::npos) << "the test came too late to see anything";
  EXPECT_EQ(Ask("create 309 1"), "created:309 ");  // Not "still pending".
}

TEST_F(KeeperTest, HangupReachesTheWorker) {
  Start();
  ASSERT_EQ(Field("hups"), "0");
  ASSERT_EQ(::kill(keeper_, SIGHUP), 0);
  for (const Nanos deadline = Later(); Field("hups") != "1" && MonotonicNow() < deadline;) {
  }
  EXPECT_EQ(Field("hups"), "1");
  EXPECT_EQ(Field("incarnation"), "1");
}

TEST_F(KeeperTest, SecondKeeperForOneSocketIsRefused) {
  Start();
  ASSERT_EQ(Field("incarnation"), "1");
  const pid_t first = std::exchange(keeper_, 0);
  Start();
  EXPECT_EQ(WaitForEnd(), kExitAlreadyRunning);
  keeper_ = first;
  EXPECT_EQ(Field("incarnation"), "1");
}

// I-36: refused at start, and named.
TEST_F(KeeperTest, RefusesContradictorySettings) {
  const KeeperConfig good = config_;
  EXPECT_TRUE(ValidateKeeperConfig(good).ok());
  const auto message = [&](auto change) {
    KeeperConfig bad = good;
    change(bad);
    return ValidateKeeperConfig(bad).ToString();
  };
  EXPECT_EQ(message([](KeeperConfig& c) { c.extent_bytes = 5000; }),
            "INVALID_ARGUMENT: extent_bytes is 5000, not a multiple of the page size 4096");
  EXPECT_EQ(message([](KeeperConfig& c) { c.extents_max = 4097; }),
            "INVALID_ARGUMENT: extents_max is 4097, allowed are 1 to 4096");
  EXPECT_EQ(message([](KeeperConfig& c) { c.extents_at_start = 401; }),
            "INVALID_ARGUMENT: extents_at_start is 401, allowed are 0 to 400");
  EXPECT_NE(message([](KeeperConfig& c) { c.ledger_bytes = 0; }), "OK");
  EXPECT_NE(message([](KeeperConfig& c) { c.socket_path = ""; }), "OK");
  EXPECT_NE(message([](KeeperConfig& c) { c.worker_argv.clear(); }), "OK");
  EXPECT_NE(message([](KeeperConfig& c) { c.grace = std::chrono::milliseconds(-1); }), "OK");
}

// I-27: a pool that does not fit is refused before any of it is taken.
TEST_F(KeeperTest, RefusesAPoolThatDoesNotFit) {
  config_.extent_bytes = 1ULL << 40;
  config_.extents_at_start = 4;
  Start();
  EXPECT_EQ(WaitForEnd(), kExitConfig);
  EXPECT_TRUE(Logged("are available"));
  SP_EXPECT_CODE(kNoSpace, MakeKeptMemory("test", 1ULL << 45));
}

TEST_F(KeeperTest, LockedMemoryIsRequiredOrWarnedAbout) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizers replace mlock by nothing";
#endif
  const auto without_locking = [] {
    const rlimit none{.rlim_cur = 0, .rlim_max = 0};
    ::setrlimit(RLIMIT_MEMLOCK, &none);
    if (::geteuid() == 0 && ::setresuid(65534, 65534, 65534) != 0) ::_exit(99);  // Root may lock without limit.
  };
  std::filesystem::permissions(directory_.path(), std::filesystem::perms::all);
  config_.lock = LockMemory::kRequired;
  Start(without_locking);
  EXPECT_EQ(WaitForEnd(), kExitConfig);
  EXPECT_TRUE(Logged("the settings require locked memory")) << Log();
  EXPECT_FALSE(Logged("memory_not_locked"));

  config_.lock = LockMemory::kBestEffort;
  Start(without_locking);
  AwaitIds("0,1,2");
  const std::string log = Log();
  const size_t warned = log.find("memory_not_locked");
  ASSERT_NE(warned, std::string::npos);
  EXPECT_EQ(log.find("memory_not_locked", warned + 1), std::string::npos);
}

TEST_F(KeeperTest, LocksMemoryWhenItMay) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the sanitizers replace mlock by nothing";
#endif
  if (::geteuid() != 0) GTEST_SKIP() << "may not lock without limit";
  config_.lock = LockMemory::kRequired;
  Start();
  AwaitIds("0,1,2");
  const std::string status = ReadFile("/proc/" + std::to_string(keeper_) + "/status", 1 << 16).value();
  EXPECT_NE(status.find("VmLck:\t     192 kB"), std::string::npos) << status;
}

TEST(KeeperProtocol, LayoutIsFixed) {
  const auto bytes = EncodeKeeperFrame({.command = KeeperCommand::kCreateFailed,
                                        .request_id = 0x0102030405060708,
                                        .arg0 = 0x11,
                                        .arg1 = 0x22,
                                        .arg2 = 0x33,
                                        .arg3 = 0x44,
                                        .status_code = 7});
  const std::array<uint8_t, 64> golden = {
      0x53, 0x6b, 0x65, 0x70, 1, 0, 104, 0, 8, 7, 6, 5, 4, 3, 2, 1,
      0x11, 0, 0, 0, 0, 0, 0, 0, 0x22, 0, 0, 0, 0, 0, 0, 0,
      0x33, 0, 0, 0, 0, 0, 0, 0, 0x44, 0, 0, 0, 0, 0, 0, 0,
      7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  EXPECT_EQ(bytes, golden);
  SP_ASSERT_OK_AND_ASSIGN(const KeeperFrame frame, DecodeKeeperFrame(bytes));
  EXPECT_EQ(EncodeKeeperFrame(frame), golden);
  SP_EXPECT_CODE(kProtocol, DecodeKeeperFrame(ByteSpan(bytes).first(63)));
}

}  // namespace
}  // namespace sp

int main(int argc, char** argv) {
  if (argc == 3 && std::string_view(argv[1]) == "--fake-worker") return sp::FakeWorkerMain(argv[2]);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
