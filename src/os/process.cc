#include "os/process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "os/errors.h"
#include "os/pidfd.h"

namespace sp {
namespace {

constexpr int kExecFailed = 127;
constexpr unsigned kCloseRangeCloexec = 1U << 2;

// What the child tells the parent over a pipe that closes by itself at exec: its pid, then the errno if anything fails.
struct Report {
  int32_t pid;
  int32_t err;
};

// Everything the child needs, made before fork: between fork and exec only async-signal-safe calls are allowed, because
// another thread may have held any lock (malloc's, for one) at the moment of the fork.
struct Plan {
  const char* executable;
  std::vector<char*> argv;
  std::vector<char*> env;
  std::vector<Fd> high;                              // Copies of the sources, above every target.
  std::vector<int> targets;                          // targets[i] gets high[i].
  std::vector<std::pair<unsigned, unsigned>> close;  // Ranges of descriptors that the child does not get.
  Fd report;
  pid_t parent;
  int parent_death_signal;
  bool detached;
};

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& s : strings) pointers.push_back(s.data());
  pointers.push_back(nullptr);
  return pointers;
}

std::vector<std::string> Environment(const std::vector<std::string>& extra) {
  std::vector<std::string> env = extra;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const std::string name = text.substr(0, text.find('=') + 1);
    if (std::ranges::none_of(extra, [&](const std::string& e) { return e.starts_with(name); })) env.push_back(text);
  }
  return env;
}

Result<Fd> CopyAbove(int fd, int lowest) {
  const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, lowest);
  if (copy < 0) return ErrnoError(errno, "copy descriptor " + std::to_string(fd) + " for a child");
  return Fd(copy);
}

[[noreturn]] void Fail(int report, int err) {
  const Report message{.pid = ::getpid(), .err = err};
  // Nothing is left to do if this fails too; the parent then sees an exit code of 127.
  [[maybe_unused]] const ssize_t put = ::write(report, &message, sizeof message);
  ::_exit(kExecFailed);
}

// Runs in the child. Async-signal-safe calls only, no allocation, no destructors.
[[noreturn]] void RunChild(const Plan& plan) {
  const int report = plan.report.get();
  if (plan.detached) {
    if (::setsid() < 0) Fail(report, errno);
    const pid_t pid = ::fork();  // The grandchild becomes a child of init.
    if (pid < 0) Fail(report, errno);
    if (pid > 0) ::_exit(0);
  }
  if (plan.parent_death_signal != 0) {
    if (::prctl(PR_SET_PDEATHSIG, plan.parent_death_signal) != 0) Fail(report, errno);
    if (::getppid() != plan.parent) ::_exit(kExecFailed);  // It died before the call above, so no signal will come.
  }
  for (int signal = 1; signal < NSIG; ++signal) ::signal(signal, SIG_DFL);
  sigset_t none;
  sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);
  for (size_t i = 0; i < plan.targets.size(); ++i) {
    if (RetryOnEintr([&] { return ::dup2(plan.high[i].get(), plan.targets[i]); }) < 0) Fail(report, errno);
  }
  // Ours are close-on-exec anyway; those of libraries beside us may not be. Kernels before 5.11 lack it.
  for (const auto& [first, last] : plan.close) ::syscall(SYS_close_range, first, last, kCloseRangeCloexec);
  const Report message{.pid = ::getpid(), .err = 0};
  if (::write(report, &message, sizeof message) != sizeof message) ::_exit(kExecFailed);
  ::execve(plan.executable, plan.argv.data(), plan.env.data());
  Fail(report, errno);
}

Result<Plan> MakePlan(const SpawnOptions& options, Fd report, std::vector<std::string>& argv,
                      std::vector<std::string>& env) {
  Plan plan{};
  plan.executable = options.executable.c_str();
  plan.argv = Pointers(argv);
  plan.env = Pointers(env);
  plan.parent = ::getpid();
  plan.parent_death_signal = options.parent_death_signal;
  plan.detached = options.detached;
  int lowest = STDERR_FILENO + 1;
  for (const auto& fd : options.fds) lowest = std::max(lowest, fd.target + 1);
  for (const auto& fd : options.fds) {
    SP_ASSIGN_OR_RETURN(Fd copy, CopyAbove(fd.source, lowest));
    plan.high.push_back(std::move(copy));
    plan.targets.push_back(fd.target);
  }
  SP_ASSIGN_OR_RETURN(plan.report, CopyAbove(report.get(), lowest));
  unsigned from = STDERR_FILENO + 1;
  std::vector<int> sorted = plan.targets;
  std::ranges::sort(sorted);
  for (int target : sorted) {
    if (static_cast<unsigned>(target) < from) continue;
    if (static_cast<unsigned>(target) > from) plan.close.emplace_back(from, target - 1);
    from = static_cast<unsigned>(target) + 1;
  }
  plan.close.emplace_back(from, ~0U);
  return plan;
}

// Forks with every signal blocked, so that no handler of the parent runs in the child.
pid_t ForkChild(const Plan& plan) {
  sigset_t all, before;
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  const pid_t pid = ::fork();
  if (pid == 0) RunChild(plan);
  const int err = errno;
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  errno = err;
  return pid;
}

// A process that ignores SIGCHLD has its children reaped by the kernel.
Status Reap(pid_t pid) {
  const Result<ExitStatus> ended = WaitChild(pid);
  return ended || ended.error().code() == StatusCode::kNotFound ? Status() : ended.error();
}

}  // namespace

Result<ChildProcess> Spawn(const SpawnOptions& options) {
  if (options.argv.empty() || (options.detached && options.parent_death_signal != 0)) {
    return Error(StatusCode::kInvalidArgument, "contradictory options to start " + options.executable);
  }
  SP_ASSIGN_OR_RETURN(Pipe pipe, Pipe::Create());
  std::vector<std::string> argv = options.argv;
  std::vector<std::string> env = Environment(options.extra_env);
  SP_ASSIGN_OR_RETURN(Plan plan, MakePlan(options, std::move(pipe.write_end), argv, env));

  ChildProcess child;
  const pid_t forked = ForkChild(plan);
  if (forked < 0) return ErrnoError(errno, "fork for " + options.executable);
  plan.report.Reset();
  if (options.detached) {
    SP_RETURN_IF_ERROR(Reap(forked));
  } else {
    child.pid = forked;
    // Not reaped yet, so the number still means this child.
    try {
      if (Result<Fd> pidfd = OpenPidfd(forked)) child.pidfd = std::move(*pidfd);
    } catch (const std::bad_alloc&) {
      // As on a kernel without pidfds. A child that runs, and of which the caller hears only an exception, would be nobody's.
    }
  }

  Report report{};
  int err = 0;
  for (;;) {
    const ssize_t got = RetryOnEintr([&] { return ::read(pipe.read_end.get(), &report, sizeof report); });
    if (got != sizeof report) break;  // Closed: exec worked, or the child is dead.
    if (options.detached) child.pid = report.pid;
    err = report.err;
  }
  if (err == 0 && report.pid != 0) return child;
  if (!options.detached) {
    // A child whose report could not be read may be running.
    if (err == 0) ::kill(forked, SIGKILL);
    SP_RETURN_IF_ERROR(Reap(forked));
  }
  if (err == 0) return Error(StatusCode::kInternal, "start " + options.executable + ": the child ended before exec");
  return ErrnoError(err, "start " + options.executable);
}

std::string ExitStatus::ToString() const {
  if (signal == 0) return "exit code " + std::to_string(code);
  const char* name = ::sigabbrev_np(signal);
  return name != nullptr ? "signal SIG" + std::string(name) : "signal " + std::to_string(signal);
}

ExitStatus DecodeExit(int wait_status) {
  if (WIFSIGNALED(wait_status)) return {.code = 0, .signal = WTERMSIG(wait_status)};
  return {.code = WEXITSTATUS(wait_status), .signal = 0};
}

Result<std::optional<ExitStatus>> TryWaitChild(pid_t pid) {
  int wait_status = 0;
  const pid_t got = RetryOnEintr([&] { return ::waitpid(pid, &wait_status, WNOHANG); });
  if (got == 0) return std::nullopt;
  if (got < 0 && errno == ECHILD) return Error(StatusCode::kNotFound, std::to_string(pid) + " is no child of ours");
  if (got < 0) return ErrnoError(errno, "wait for process " + std::to_string(pid));
  return DecodeExit(wait_status);
}

Result<ExitStatus> WaitChild(pid_t pid) {
  int wait_status = 0;
  const pid_t got = RetryOnEintr([&] { return ::waitpid(pid, &wait_status, 0); });
  if (got < 0 && errno == ECHILD) return Error(StatusCode::kNotFound, std::to_string(pid) + " is no child of ours");
  if (got < 0) return ErrnoError(errno, "wait for process " + std::to_string(pid));
  return DecodeExit(wait_status);
}

Status SendSignal(pid_t pid, int signal) {
  if (::kill(pid, signal) == 0) return {};
  return ErrnoStatus(errno, "send signal " + std::to_string(signal) + " to process " + std::to_string(pid));
}

}  // namespace sp
