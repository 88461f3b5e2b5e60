#include "os/fd.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <unistd.h>

#include "base/check.h"
#include "os/errors.h"

namespace sp {

void Fd::Reset(int fd) {
  // close() is not repeated after EINTR: Linux has released the number by then, and another thread may own it already.
  // EBADF means that somebody else closed it, which would be our own bug.
  if (fd_ >= 0 && ::close(fd_) != 0) SP_CHECK(errno != EBADF);
  fd_ = fd;
}

Result<Fd> Fd::Duplicate() const {
  const int copy = ::fcntl(fd_, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return ErrnoError(errno, "duplicate descriptor " + std::to_string(fd_));
  return Fd(copy);
}

Result<Pipe> Pipe::Create() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) return ErrnoError(errno, "pipe2");
  return Pipe{Fd(ends[0]), Fd(ends[1])};
}

Result<EventFd> EventFd::Create() {
  Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd.valid()) return ErrnoError(errno, "eventfd");
  return EventFd(std::move(fd));
}

void EventFd::Notify() const {
  const uint64_t one = 1;
  // EAGAIN means that the counter is full, so the reader is due to wake up anyway.
  const auto written = RetryOnEintr([&] { return ::write(fd_.get(), &one, sizeof one); });
  SP_CHECK(written == sizeof one || errno == EAGAIN);
}

uint64_t EventFd::Drain() const {
  uint64_t count = 0;
  const auto got = RetryOnEintr([&] { return ::read(fd_.get(), &count, sizeof count); });
  SP_CHECK(got == sizeof count || errno == EAGAIN);
  return got == sizeof count ? count : 0;
}

Status EnsureFdLimit(uint64_t needed) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return ErrnoStatus(errno, "getrlimit RLIMIT_NOFILE");
  if (limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) return ErrnoStatus(errno, "setrlimit RLIMIT_NOFILE");
  }
  if (limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < needed) {
    return Status(StatusCode::kLimit, "RLIMIT_NOFILE is " + std::to_string(limit.rlim_cur) + ", " +
                                          std::to_string(needed) + " descriptors are needed");
  }
  return {};
}

}  // namespace sp
