#include "client/private_daemon.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "os/errors.h"
#include "os/file_lock.h"
#include "os/memfd.h"
#include "os/pidfd.h"
#include "os/process.h"
#include "os/unix_socket.h"

namespace sp {
namespace {

// No event tells that a socket begins to listen or a file lock becomes free. This is the start of a process, so 10 ms do not matter.
constexpr Nanos kPollPeriod = 10 * kNanosPerMilli;

void Pause() { std::this_thread::sleep_for(std::chrono::nanoseconds(kPollPeriod)); }

bool IsServed(const std::string& socket_path, Nanos deadline) { return ConnectUnix(socket_path, deadline).has_value(); }

uint64_t FileSize(const std::string& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  return error ? 0 : size;
}

// The last lines of what was written to the log since it was `from` bytes long.
std::string LogTail(int log, const std::string& path, uint64_t from) {
  constexpr uint64_t kTailBytes = 2000;
  const uint64_t end = FileSize(path);
  std::string tail(std::min(kTailBytes, end > from ? end - from : 0), '\0');
  const Status read = PReadExact(log, {reinterpret_cast<uint8_t*>(tail.data()), tail.size()}, end - tail.size());
  if (!read.ok()) return "its log " + path + " cannot be read (" + read.message() + ")";
  if (tail.empty()) return "its log " + path + " is empty";
  return "the end of its log " + path + ":\n" + tail;
}

Status Unreachable(const std::string& what, const std::string& why) { return {StatusCode::kUnavailable, what + "; " + why}; }

Status StartAndWait(const StartOptions& options, const std::string& socket_path, Nanos deadline) {
  const int flags = O_RDWR | O_CREAT | O_APPEND | O_NOFOLLOW | O_CLOEXEC;
  const Fd log(RetryOnEintr([&] { return ::open(options.log_path.c_str(), flags, 0600); }));
  if (!log.valid()) return ErrnoStatus(errno, "open the log " + options.log_path);
  const Fd null(RetryOnEintr([] { return ::open("/dev/null", O_RDWR | O_CLOEXEC); }));
  if (!null.valid()) return ErrnoStatus(errno, "open /dev/null");
  const uint64_t log_start = FileSize(options.log_path);

  SpawnOptions spawn;
  spawn.executable = options.daemon_path;
  spawn.argv = options.arguments;
  spawn.argv.insert(spawn.argv.begin(), options.daemon_path);
  spawn.fds = {{null.get(), STDIN_FILENO}, {log.get(), STDOUT_FILENO}, {log.get(), STDERR_FILENO}};
  spawn.detached = true;
  Result<ChildProcess> child = Spawn(spawn);
  if (!child) return Unreachable("the private daemon could not be started", child.error().ToString());

  const std::string name = "the private daemon (process " + std::to_string(child->pid) + ")";
  const Result<Fd> pidfd = OpenPidfd(child->pid);
  bool ended = !pidfd && pidfd.error().code() == StatusCode::kNotFound;
  for (;;) {
    if (IsServed(socket_path, deadline)) return {};
    if (ended) return Unreachable(name + " ended before it served " + socket_path, LogTail(log.get(), options.log_path, log_start));
    if (MonotonicNow() >= deadline) {
      return Unreachable(name + " does not serve " + socket_path + " yet", LogTail(log.get(), options.log_path, log_start));
    }
    if (pidfd) {
      SP_ASSIGN_OR_RETURN(ended, WaitReadable(pidfd->get(), kPollPeriod));
    } else {
      Pause();
    }
  }
}

}  // namespace

Result<bool> EnsureDaemon(const StartOptions& options, const std::string& socket_path, Nanos deadline) {
  for (;;) {
    if (IsServed(socket_path, deadline)) return false;
    Result<FileLock> lock = FileLock::TryAcquire(options.lock_path);
    if (lock) {
      // The owner before us may have started it since we looked.
      if (IsServed(socket_path, deadline)) return false;
      SP_RETURN_IF_ERROR(StartAndWait(options, socket_path, deadline));
      return true;
    }
    if (lock.error().code() != StatusCode::kUnavailable) return std::unexpected(lock.error());
    if (MonotonicNow() >= deadline) return Error(StatusCode::kUnavailable, "nobody serves " + socket_path + "; " + lock.error().message());
    Pause();
  }
}

}  // namespace sp
