// Child processes: start with chosen descriptors, learn how they ended.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "os/fd.h"

namespace sp {

struct SpawnOptions {
  struct InheritedFd {
    int source;  // A descriptor of ours; stays ours.
    int target;  // Its number in the child.
  };

  std::string executable;              // A path, not searched for. "/proc/self/exe": our own binary.
  std::vector<std::string> argv;       // With argv[0]; not empty.
  std::vector<std::string> extra_env;  // "NAME=value", instead of an inherited variable of that name.
  std::vector<InheritedFd> fds;        // The child gets these, its 0, 1, 2, and no other descriptor.
  // Sent to the child when the *thread* that called Spawn ends; 0: none. So call Spawn from a thread that lives as long
  // as the process.
  int parent_death_signal = 0;
  // Own session, and a child of init instead of ours: no terminal, nothing to reap. Excludes parent_death_signal.
  bool detached = false;
};

struct ChildProcess {
  pid_t pid = 0;
  Fd pidfd;  // Invalid when detached, or when the kernel has no pidfds.
};

// Returns when the new program runs. Signal mask and dispositions are the defaults. A failed exec is an error here,
// e.g. kNotFound. Thread-safe; safe in a process with threads.
Result<ChildProcess> Spawn(const SpawnOptions& options);

struct ExitStatus {
  int code = 0;    // Meaningful when signal is 0.
  int signal = 0;  // That ended it; 0 for a normal exit.

  bool exited_with(int wanted) const { return signal == 0 && code == wanted; }
  std::string ToString() const;  // "exit code 1", "signal SIGKILL"
};

ExitStatus DecodeExit(int wait_status);
// Reaps child `pid` if it has ended; nothing while it runs. kNotFound: not our child.
Result<std::optional<ExitStatus>> TryWaitChild(pid_t pid);
Result<ExitStatus> WaitChild(pid_t pid);  // Blocks.
// kNotFound when it has ended and was reaped.
Status SendSignal(pid_t pid, int signal);

}  // namespace sp
