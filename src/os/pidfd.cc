#include "os/pidfd.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <charconv>
#include <string>

#include "base/check.h"
#include "os/errors.h"
#include "os/files.h"

namespace sp {
namespace {

constexpr size_t kStatBytesMax = 4096;
constexpr int kStartTimeField = 22;

}  // namespace

Result<Fd> OpenPidfd(pid_t pid) {
  const long fd = ::syscall(SYS_pidfd_open, pid, 0);
  if (fd >= 0) return Fd(static_cast<int>(fd));
  if (errno == ENOSYS) return Error(StatusCode::kUnavailable, "this kernel has no pidfds");
  return ErrnoError(errno, "pidfd_open " + std::to_string(pid));
}

bool IsAlive(const Fd& pidfd) {
  pollfd entry{.fd = pidfd.get(), .events = POLLIN, .revents = 0};
  const int ready = RetryOnEintr([&] { return ::poll(&entry, 1, 0); });
  if (ready <= 0) return true;
  SP_CHECK((entry.revents & POLLNVAL) == 0);
  return false;
}

uint64_t ProcessStartTime(pid_t pid) {
  const Result<std::string> stat = ReadFile("/proc/" + std::to_string(pid) + "/stat", kStatBytesMax);
  if (!stat) return 0;
  // Field 2 is the program's name in parentheses and may itself contain spaces and parentheses; the last ')' ends it.
  size_t at = stat->rfind(')');
  if (at == std::string::npos) return 0;
  for (int field = 2; field < kStartTimeField; ++field) {
    at = stat->find(' ', at + 1);
    if (at == std::string::npos) return 0;
  }
  uint64_t ticks = 0;
  const char* end = stat->data() + stat->size();
  return std::from_chars(stat->data() + at + 1, end, ticks).ec == std::errc() ? ticks : 0;
}

SameProcess StillSameProcess(pid_t pid, uint64_t start_time) {
  if (pid <= 0) return SameProcess::kUnknown;
  // ESRCH is certain, unlike a missing /proc entry, which hidepid can cause.
  if (::kill(pid, 0) != 0 && errno == ESRCH) return SameProcess::kNo;
  const uint64_t now = ProcessStartTime(pid);
  if (now == 0 || start_time == 0) return SameProcess::kUnknown;
  return now == start_time ? SameProcess::kYes : SameProcess::kNo;
}

}  // namespace sp
