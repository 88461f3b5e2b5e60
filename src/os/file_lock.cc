#include "os/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>

#include "base/check.h"
#include "os/errors.h"
#include "os/files.h"
#include "os/memfd.h"

namespace sp {

Result<FileLock> FileLock::TryAcquire(const std::string& path) {
  constexpr int kFlags = O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK;
  Fd fd(RetryOnEintr([&] { return ::open(path.c_str(), kFlags, 0600); }));
  if (!fd.valid()) return ErrnoError(errno, "open lock file " + path);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return ErrnoError(errno, "stat lock file " + path);
  if (!S_ISREG(info.st_mode) || info.st_uid != ::geteuid()) {
    return Error(StatusCode::kDenied, "lock file " + path + " is not a plain file of this user");
  }
  if (RetryOnEintr([&] { return ::flock(fd.get(), LOCK_EX | LOCK_NB); }) != 0) {
    if (errno != EWOULDBLOCK) return ErrnoError(errno, "lock " + path);
    return Error(StatusCode::kUnavailable, path + " is locked by process " + std::to_string(FileLockOwner(path)));
  }
  FileLock lock(std::move(fd), ::getpid());
  const std::string pid = std::to_string(lock.owner_) + "\n";
  if (::ftruncate(lock.fd_.get(), 0) != 0) return ErrnoError(errno, "truncate lock file " + path);
  SP_RETURN_IF_ERROR(PWriteExact(lock.fd_.get(), AsBytes(pid), 0));
  return lock;
}

FileLock& FileLock::operator=(FileLock&& other) noexcept {
  if (this != &other) {
    Release();
    fd_ = std::move(other.fd_);
    owner_ = other.owner_;
  }
  return *this;
}

FileLock::~FileLock() { Release(); }

void FileLock::Release() {
  // Closing alone would leave the lock with children that were forked meanwhile: they share the open file. Where unlocking fails (ENOLCK),
  // closing is what is left; whoever wants the lock waits for those children.
  if (fd_.valid() && owner_ == ::getpid()) SP_CHECK(RetryOnEintr([&] { return ::flock(fd_.get(), LOCK_UN); }) == 0 || errno == ENOLCK);
  fd_.Reset();
}

pid_t FileLockOwner(const std::string& path) {
  const Result<std::string> content = ReadFile(path, 64);
  pid_t pid = 0;
  if (content) std::from_chars(content->data(), content->data() + content->size(), pid);
  return pid;
}

}  // namespace sp
