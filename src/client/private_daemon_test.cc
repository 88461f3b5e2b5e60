#include "client/private_daemon.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "client/client_test_util.h"
#include "os/file_lock.h"
#include "os/files.h"
#include "os/pidfd.h"
#include "os/process.h"

namespace sp {
namespace {

constexpr const char* kServe = "--serve-socket=";

class PrivateDaemonTest : public testing::Test {
 protected:
  // This test program itself, as a daemon: it serves the socket and writes its pid to the log.
  StartOptions Options() const {
    return {.daemon_path = "/proc/self/exe",
            .arguments = {kServe + socket_},
            .lock_path = directory_.File("lock"),
            .log_path = directory_.File("log")};
  }
  std::vector<pid_t> Started() const {
    std::vector<pid_t> pids;
    const auto log = ReadFile(directory_.File("log"), 1 << 16);
    for (size_t at = 0; log && (at = log->find("pid ", at)) != std::string::npos; ++at) {
      pids.push_back(static_cast<pid_t>(std::stol(log->substr(at + 4))));
    }
    return pids;
  }
  void TearDown() override {
    for (pid_t pid : Started()) EXPECT_TRUE(SendSignal(pid, SIGKILL).ok());
  }

  TemporaryDirectory directory_;
  const std::string socket_ = directory_.File("s");
};

Nanos Soon() { return MonotonicNow() + 20 * kNanosPerSecond; }

TEST_F(PrivateDaemonTest, OneOfManyStartersStartsIt) {
  std::atomic<int> started = 0, failed = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&] {
      const auto ensured = EnsureDaemon(Options(), socket_, Soon());
      if (!ensured) ADD_FAILURE() << ensured.error().ToString();
      started += ensured && *ensured;
      failed += !ensured;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(started, 1);
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(Started().size(), 1u);
  EXPECT_NE(::getsid(Started()[0]), ::getsid(0));  // Own session.
  // The client uses it, and does not start another.
  SP_ASSERT_OK_AND_ASSIGN(auto client, Client::Connect({.socket_path = socket_, .start = Options()}));
  EXPECT_FALSE(client->started_daemon());
}

TEST_F(PrivateDaemonTest, AClientStartsIt) {
  SP_ASSERT_OK_AND_ASSIGN(auto client, Client::Connect({.socket_path = socket_, .start = Options()}));
  EXPECT_TRUE(client->started_daemon());
  EXPECT_EQ(client->daemon().daemon_version, "fake");
}

TEST_F(PrivateDaemonTest, OneThatFailsIsUnavailableWithTheEndOfItsLog) {
  StartOptions options = Options();
  options.daemon_path = "/bin/sh";
  options.arguments = {"-c", "echo the pool does not fit >&2; exit 78"};
  const auto ensured = EnsureDaemon(options, socket_, Soon());
  SP_EXPECT_CODE(kUnavailable, ensured);
  EXPECT_NE(ensured.error().message().find("the pool does not fit"), std::string::npos) << ensured.error().message();
  options.daemon_path = "/nonexistent";
  SP_EXPECT_CODE(kUnavailable, EnsureDaemon(options, socket_, Soon()));
}

TEST_F(PrivateDaemonTest, AStarterThatDoesNotFinishIsNamed) {
  SP_ASSERT_OK_AND_ASSIGN(const FileLock lock, FileLock::TryAcquire(directory_.File("lock")));
  const auto ensured = EnsureDaemon(Options(), socket_, MonotonicNow() + 50 * kNanosPerMilli);
  SP_EXPECT_CODE(kUnavailable, ensured);
  EXPECT_NE(ensured.error().message().find(std::to_string(::getpid())), std::string::npos);
}

}  // namespace

int ServeForEver(const std::string& socket) {
  FakeDaemon daemon(socket);
  std::fprintf(stderr, "pid %d\n", ::getpid());
  daemon.Start();
  for (;;) ::pause();
}

}  // namespace sp

int main(int argc, char** argv) {
  const std::string prefix = sp::kServe;
  if (argc == 2 && std::string(argv[1]).starts_with(prefix)) return sp::ServeForEver(std::string(argv[1]).substr(prefix.size()));
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
