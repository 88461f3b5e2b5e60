#include "os/process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "os/pidfd.h"
#include "os/signals.h"
#include "os/test_util.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

SpawnOptions Shell(const std::string& script) {
  return {.executable = "/bin/sh", .argv = {"sh", "-c", script}, .extra_env = {}, .fds = {}};
}

std::string ReadAll(int fd) {
  std::string all;
  char buffer[256];
  for (ssize_t got; (got = ::read(fd, buffer, sizeof buffer)) > 0;) all.append(buffer, static_cast<size_t>(got));
  return all;
}

bool WaitForEnd(const Fd& pidfd) { return WaitReadable(pidfd.get(), 30 * kNanosPerSecond).value(); }

TEST(Spawn, ReportsHowTheChildEnded) {
  SP_ASSERT_OK_AND_ASSIGN(const ChildProcess seven, Spawn(Shell("exit 7")));
  SP_ASSERT_OK_AND_ASSIGN(const ExitStatus exited, WaitChild(seven.pid));
  EXPECT_TRUE(exited.exited_with(7));
  EXPECT_EQ(exited.ToString(), "exit code 7");

  SP_ASSERT_OK_AND_ASSIGN(const ChildProcess victim, Spawn(Shell("kill -KILL $$; sleep 60")));
  SP_ASSERT_OK_AND_ASSIGN(const ExitStatus killed, WaitChild(victim.pid));
  EXPECT_FALSE(killed.exited_with(0));
  EXPECT_EQ(killed.ToString(), "signal SIGKILL");
  SP_EXPECT_CODE(kNotFound, TryWaitChild(victim.pid));
}

TEST(Spawn, TryWaitDoesNotBlockAndSignalsReach) {
  SP_ASSERT_OK_AND_ASSIGN(const ChildProcess child, Spawn(Shell("exec sleep 60")));
  SP_ASSERT_OK_AND_ASSIGN(const auto running, TryWaitChild(child.pid));
  EXPECT_FALSE(running.has_value());
  SP_ASSERT_OK(SendSignal(child.pid, SIGTERM));
  ASSERT_TRUE(WaitForEnd(child.pidfd));
  SP_ASSERT_OK_AND_ASSIGN(const auto ended, TryWaitChild(child.pid));
  ASSERT_TRUE(ended.has_value());
  EXPECT_EQ(ended->signal, SIGTERM);
}

TEST(Spawn, FailedExecIsAnErrorHereAndLeavesNoZombie) {
  const int before = CountOpenFds();
  SP_EXPECT_CODE(kNotFound, Spawn({.executable = "/no/such/program", .argv = {"x"}, .extra_env = {}, .fds = {}}));
  SP_EXPECT_CODE(kDenied, Spawn({.executable = "/etc/passwd", .argv = {"x"}, .extra_env = {}, .fds = {}}));
  SpawnOptions detached{.executable = "/no/such/program", .argv = {"x"}, .extra_env = {}, .fds = {}};
  detached.detached = true;
  SP_EXPECT_CODE(kNotFound, Spawn(detached));
  EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1);
  EXPECT_EQ(errno, ECHILD);
  EXPECT_EQ(CountOpenFds(), before);
}

TEST(Spawn, GivesExactlyTheListedDescriptors) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe out, Pipe::Create());
  SP_ASSERT_OK_AND_ASSIGN(Pipe a, Pipe::Create());
  SP_ASSERT_OK_AND_ASSIGN(Pipe b, Pipe::Create());
  const int leaky = ::dup(0);  // Not close-on-exec, as libraries beside us do it.
  SpawnOptions options = Shell("ls /proc/$$/fd; cat <&3; cat <&7");
  // Sources that are each other's targets would destroy one another if copied one by one.
  ASSERT_EQ(::write(a.write_end.get(), "A", 1), 1);
  ASSERT_EQ(::write(b.write_end.get(), "B", 1), 1);
  a.write_end.Reset();
  b.write_end.Reset();
  options.fds = {{out.write_end.get(), 1}, {a.read_end.get(), 3}, {b.read_end.get(), 7}};
  SP_ASSERT_OK_AND_ASSIGN(const ChildProcess child, Spawn(options));
  out.write_end.Reset();
  EXPECT_EQ(ReadAll(out.read_end.get()), "0\n1\n2\n3\n7\nAB");
  SP_ASSERT_OK(WaitChild(child.pid));
  ::close(leaky);
}

TEST(Spawn, CrossedDescriptorNumbersStayApart) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe out, Pipe::Create());
  SP_ASSERT_OK_AND_ASSIGN(Pipe a, Pipe::Create());
  SP_ASSERT_OK_AND_ASSIGN(Pipe b, Pipe::Create());
  ASSERT_EQ(::write(a.write_end.get(), "A", 1), 1);
  ASSERT_EQ(::write(b.write_end.get(), "B", 1), 1);
  a.write_end.Reset();
  b.write_end.Reset();
  const int x = a.read_end.get(), y = b.read_end.get();
  // The child's number x shows what is y here, and the other way round.
  SpawnOptions options = Shell("cat <&" + std::to_string(x) + "; cat <&" + std::to_string(y));
  options.fds = {{out.write_end.get(), 1}, {x, y}, {y, x}};
  if (x > 9 || y > 9) GTEST_SKIP() << "the shell knows one-digit descriptors only";
  SP_ASSERT_OK_AND_ASSIGN(const ChildProcess child, Spawn(options));
  out.write_end.Reset();
  EXPECT_EQ(ReadAll(out.read_end.get()), "BA");
  SP_ASSERT_OK(WaitChild(child.pid));
}

TEST(Spawn, ChildHasDefaultSignalsAndTheExtraEnvironment) {
  const int blocked[] = {SIGTERM};
  SP_ASSERT_OK(BlockSignals(blocked));
  SP_ASSERT_OK_AND_ASSIGN(Pipe out, Pipe::Create());
  ::setenv("SP_TEST_VARIABLE", "old", 1);
  SpawnOptions options = Shell("grep SigBlk /proc/self/status; echo $SP_TEST_VARIABLE; echo ${HOME:+home}");
  options.extra_env = {"SP_TEST_VARIABLE=new"};
  options.fds = {{out.write_end.get(), 1}};
  SP_ASSERT_OK_AND_ASSIGN(const ChildProcess child, Spawn(options));
  out.write_end.Reset();
  EXPECT_EQ(ReadAll(out.read_end.get()), "SigBlk:\t0000000000000000\nnew\nhome\n");
  SP_ASSERT_OK(WaitChild(child.pid));
}

// F18: a child with a parent-death signal does not survive us, however we end.
TEST(Spawn, ParentDeathTakesTheChildAlong) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe out, Pipe::Create());
  const pid_t parent = ::fork();
  if (parent == 0) {
    SpawnOptions options = Shell("exec sleep 60");
    options.parent_death_signal = SIGKILL;
    const Result<ChildProcess> child = Spawn(options);
    const pid_t pid = child ? child->pid : 0;
    if (::write(out.write_end.get(), &pid, sizeof pid) != sizeof pid) ::_exit(1);
    ::pause();
  }
  pid_t pid = 0;
  ASSERT_EQ(::read(out.read_end.get(), &pid, sizeof pid), static_cast<ssize_t>(sizeof pid));
  ASSERT_GT(pid, 0);
  SP_ASSERT_OK_AND_ASSIGN(const Fd pidfd, OpenPidfd(pid));
  EXPECT_TRUE(IsAlive(pidfd));
  ASSERT_EQ(::kill(parent, SIGKILL), 0);
  EXPECT_TRUE(WaitForEnd(pidfd));
  ASSERT_EQ(::waitpid(parent, nullptr, 0), parent);
}

TEST(Spawn, DetachedHasItsOwnSessionAndIsNotOurChild) {
  SP_ASSERT_OK_AND_ASSIGN(Pipe out, Pipe::Create());
  SP_ASSERT_OK_AND_ASSIGN(Pipe hold, Pipe::Create());
  SpawnOptions options = Shell("echo $$; cat <&3");
  options.fds = {{out.write_end.get(), 1}, {hold.read_end.get(), 3}};
  options.detached = true;
  SP_ASSERT_OK_AND_ASSIGN(const ChildProcess child, Spawn(options));
  out.write_end.Reset();
  EXPECT_EQ(::waitpid(-1, nullptr, WNOHANG), -1);
  EXPECT_NE(::getsid(child.pid), ::getsid(0));
  EXPECT_NE(::getsid(child.pid), -1);
  hold.write_end.Reset();
  EXPECT_EQ(ReadAll(out.read_end.get()), std::to_string(child.pid) + "\n");

  options.parent_death_signal = SIGKILL;
  SP_EXPECT_CODE(kInvalidArgument, Spawn(options));
}

}  // namespace
}  // namespace sp
