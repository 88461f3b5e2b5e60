#include "os/files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "os/errors.h"
#include "os/fd.h"
#include "os/system.h"

namespace sp {
namespace {

constexpr size_t kReadChunkBytes = 4096;

std::string ParentOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

Status WriteAll(int fd, ByteSpan content) {
  while (!content.empty()) {
    const ssize_t put = RetryOnEintr([&] { return ::write(fd, content.data(), content.size()); });
    if (put < 0) return ErrnoStatus(errno, "write");
    content = content.subspan(static_cast<size_t>(put));
  }
  return {};
}

Status SyncDirectory(const std::string& path) {
  Fd fd(RetryOnEintr([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  if (!fd.valid()) return ErrnoStatus(errno, "open " + path);
  if (RetryOnEintr([&] { return ::fsync(fd.get()); }) != 0) return ErrnoStatus(errno, "fsync " + path);
  return {};
}

Status WriteAndSync(int fd, ByteSpan content, mode_t mode) {
  // The umask took part in open(); this gives the permissions that were asked for.
  if (::fchmod(fd, mode) != 0) return ErrnoStatus(errno, "fchmod");
  SP_RETURN_IF_ERROR(WriteAll(fd, content));
  if (RetryOnEintr([&] { return ::fsync(fd); }) != 0) return ErrnoStatus(errno, "fsync");
  return {};
}

}  // namespace

Result<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  Fd fd(RetryOnEintr([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); }));
  if (!fd.valid()) return ErrnoError(errno, "open " + path);
  std::string content;
  for (;;) {
    const size_t before = content.size();
    content.resize(before + kReadChunkBytes);
    const ssize_t got = RetryOnEintr([&] { return ::read(fd.get(), content.data() + before, kReadChunkBytes); });
    if (got < 0) return ErrnoError(errno, "read " + path);
    content.resize(before + static_cast<size_t>(got));
    if (content.size() > max_bytes) {
      return Error(StatusCode::kLimit, path + " is longer than " + std::to_string(max_bytes) + " bytes");
    }
    if (got == 0) return content;
  }
}

Status WriteFileAtomic(const std::string& path, ByteSpan content, mode_t mode) {
  const std::string temporary = path + ".tmp-" + RandomId128().ToHex().substr(0, 12);
  Fd fd(RetryOnEintr([&] { return ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600); }));
  if (!fd.valid()) return ErrnoStatus(errno, "create " + temporary);
  Status written = WriteAndSync(fd.get(), content, mode);
  if (written.ok() && ::rename(temporary.c_str(), path.c_str()) != 0) written = ErrnoStatus(errno, "rename");
  if (!written.ok()) {
    ::unlink(temporary.c_str());
    return Status(written.code(), "replace " + path + ": " + written.message());
  }
  return SyncDirectory(ParentOf(path));
}

Status MakeEmptyFile(const std::string& path, mode_t mode) {
  Fd fd(RetryOnEintr([&] { return ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, mode); }));
  if (!fd.valid()) return ErrnoStatus(errno, "create " + path);
  const Status synced = WriteAndSync(fd.get(), {}, mode);
  if (!synced.ok()) return Status(synced.code(), "create " + path + ": " + synced.message());
  return SyncDirectory(ParentOf(path));
}

Status RemoveFile(const std::string& path) {
  if (::unlink(path.c_str()) == 0 || errno == ENOENT) return {};
  return ErrnoStatus(errno, "remove " + path);
}

Status MakePrivateDirectories(const std::string& path) {
  if (path.empty()) return Status(StatusCode::kInvalidArgument, "empty directory name");
  for (size_t end = path.find('/', 1); ; end = path.find('/', end + 1)) {
    const std::string prefix = path.substr(0, end);
    if (::mkdir(prefix.c_str(), 0700) != 0 && errno != EEXIST) {
      // A read-only or foreign parent may refuse mkdir although the directory is there.
      const int err = errno;
      struct stat info {};
      if (::stat(prefix.c_str(), &info) != 0) return ErrnoStatus(err, "mkdir " + prefix);
    }
    if (end == std::string::npos) break;
  }
  Fd fd(RetryOnEintr([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC); }));
  if (!fd.valid()) return Status(StatusCode::kDenied, ErrnoStatus(errno, "open directory " + path).message());
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return ErrnoStatus(errno, "stat " + path);
  if (info.st_uid != ::geteuid() || (info.st_mode & 022) != 0) {
    return Status(StatusCode::kDenied, path + " belongs to user " + std::to_string(info.st_uid) +
                                           " or can be written by others; it must be private to user " +
                                           std::to_string(::geteuid()));
  }
  return {};
}

}  // namespace sp
