#include "os/signals.h"

#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "os/errors.h"

namespace sp {
namespace {

sigset_t SetOf(std::span<const int> signals) {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : signals) sigaddset(&set, signal);
  return set;
}

}  // namespace

Status BlockSignals(std::span<const int> signals) {
  const sigset_t set = SetOf(signals);
  const int err = ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  return err == 0 ? Status() : ErrnoStatus(err, "block signals");
}

Result<SignalFd> SignalFd::Create(std::span<const int> signals) {
  SP_RETURN_IF_ERROR(BlockSignals(signals));
  const sigset_t set = SetOf(signals);
  Fd fd(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd.valid()) return ErrnoError(errno, "signalfd");
  return SignalFd(std::move(fd));
}

Result<std::optional<SignalFd::Received>> SignalFd::Read() const {
  signalfd_siginfo info{};
  const ssize_t got = RetryOnEintr([&] { return ::read(fd_.get(), &info, sizeof info); });
  if (got < 0 && errno == EAGAIN) return std::nullopt;
  if (got != sizeof info) return ErrnoError(errno, "read a signal");
  return Received{.number = static_cast<int>(info.ssi_signo), .sender = static_cast<pid_t>(info.ssi_pid)};
}

}  // namespace sp
