#include "os/file_tree.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>

#include "base/aligned_buffer.h"
#include "base/check.h"
#include "os/errors.h"

namespace sp {
namespace {

constexpr uint64_t kWriteBehindBytes = 8u << 20;
constexpr uint64_t kDirectFrom = 1u << 20;  // Smaller files are not worth the wait for the disk.

bool IsAligned(ByteSpan piece, uint64_t offset) {
  return (reinterpret_cast<uintptr_t>(piece.data()) | piece.size() | offset) % kDirectAlignment == 0;
}

bool SetDirect(int fd, bool on) {
  const int flags = ::fcntl(fd, F_GETFL);
  return flags >= 0 && ::fcntl(fd, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
}

bool IsName(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == name.npos && name.find('\0') == name.npos;
}

FileKind KindOf(mode_t mode) {
  if (S_ISREG(mode)) return FileKind::kFile;
  if (S_ISDIR(mode)) return FileKind::kDirectory;
  return S_ISLNK(mode) ? FileKind::kLink : FileKind::kOther;
}

FileFacts FactsOf(const struct stat& info) { return {KindOf(info.st_mode), static_cast<uint64_t>(info.st_size), info.st_mtim.tv_sec}; }

Status IsLink(const std::string& name) { return {StatusCode::kDenied, name + " is a symbolic link, which are not followed here: remove it"}; }

// The next component of `path`, which loses it.
std::string_view TakeName(std::string_view* path) {
  const size_t slash = path->find('/');
  const std::string_view name = path->substr(0, slash);
  *path = slash == path->npos ? std::string_view() : path->substr(slash + 1);
  SP_CHECK(IsName(name));
  return name;
}

// With O_NOFOLLOW the kernel says ENOTDIR for a link as for a file; which it is, is asked afterwards, for the message only.
Result<Fd> OpenChild(int parent, const std::string& name, StatusCode file_in_the_way) {
  Fd fd(RetryOnEintr([&] { return ::openat(parent, name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC); }));
  if (fd.valid()) return fd;
  const int err = errno;
  if (err != ENOTDIR && err != ELOOP) return std::unexpected(FileStatus(err, "open directory " + name));
  const auto facts = StatAt(parent, name);
  if (facts && facts->kind == FileKind::kLink) return std::unexpected(IsLink(name));
  return Error(file_in_the_way, name + " is a file, so nothing can lie below it");
}

Status SyncFile(int fd, const char* what) {
  if (RetryOnEintr([&] { return ::fsync(fd); }) != 0) return FileStatus(errno, what);
  return {};
}

// 0, or the errno of the failure. Kernels and file systems that do not know the call are forgiven: it only makes Sync shorter.
int WriteOut(int fd, uint64_t offset, uint64_t length, unsigned flags) {
  if (length == 0 || ::sync_file_range(fd, static_cast<off_t>(offset), static_cast<off_t>(length), flags) == 0) return 0;
  const bool unknown = errno == ENOSYS || errno == EINVAL || errno == ESPIPE || errno == EOPNOTSUPP || errno == EPERM || errno == EINTR;
  return unknown ? 0 : errno;
}

// 0, or the errno of the failure. ENOLCK and the like: a file system without locks.
int Lock(int fd, int operation) { return RetryOnEintr([&] { return ::flock(fd, operation); }) == 0 ? 0 : errno; }

}  // namespace

Status FileStatus(int err, const std::string& what) {
  const Status plain = ErrnoStatus(err, what);
  const auto with = [&](StatusCode code, const char* cure) { return Status(code, plain.message() + cure); };
  switch (err) {
    case ENOSPC:
      return with(StatusCode::kNoSpace, "; make room on that disk");
    case EDQUOT:
      return with(StatusCode::kNoSpace, "; raise this user's quota there or remove something");
    case EROFS:
      return with(StatusCode::kDenied, "; mount it writable");
    case EACCES:
    case EPERM:
      return Status(StatusCode::kDenied, plain.message() + "; give user " + std::to_string(::geteuid()) + " access there");
    case EFBIG:
      return with(StatusCode::kLimit, "; that file system or this process (ulimit -f) does not take files of this size");
    case EIO:
    case EBUSY:
    case ESTALE:
    case ENODEV:
    case ENXIO:
    case EREMOTEIO:
    case ESHUTDOWN:
      return with(StatusCode::kUnavailable, "; the disk or its server has a problem, see the kernel's log");
    default:
      return plain;
  }
}

Result<Fd> OpenDirectory(const std::string& path) {
  Fd fd(RetryOnEintr([&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  if (!fd.valid()) return std::unexpected(FileStatus(errno, "open directory " + path));
  return fd;
}

Status MakeDirectory(const std::string& path, unsigned mode) {
  if (::mkdir(path.c_str(), static_cast<mode_t>(mode)) != 0) {
    if (errno == EEXIST) return {};
    return FileStatus(errno, "make directory " + path);
  }
  SP_ASSIGN_OR_RETURN(const Fd parent, OpenDirectory(path.substr(0, path.rfind('/')) + "/"));
  return SyncDirectory(parent.get());
}

Result<Fd> OpenDirectoryBelow(int base, std::string_view relative) {
  SP_ASSIGN_OR_RETURN(Fd at, [&]() -> Result<Fd> {
    Fd fd(RetryOnEintr([&] { return ::openat(base, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
    if (!fd.valid()) return std::unexpected(FileStatus(errno, "open the base directory"));
    return fd;
  }());
  while (!relative.empty()) {
    const std::string name(TakeName(&relative));
    SP_ASSIGN_OR_RETURN(at, OpenChild(at.get(), name, StatusCode::kNotFound));
  }
  return at;
}

Result<std::vector<Fd>> MakeDirectoriesBelow(int base, std::string_view relative) {
  std::vector<Fd> chain;
  SP_ASSIGN_OR_RETURN(Fd at, OpenDirectoryBelow(base, ""));
  chain.push_back(std::move(at));
  while (!relative.empty()) {
    const std::string name(TakeName(&relative));
    const int parent = chain.back().get();
    if (::mkdirat(parent, name.c_str(), 0777) != 0 && errno != EEXIST) {
      // A read-only or foreign parent may refuse although the directory is there.
      const int err = errno;
      if (!StatAt(parent, name)) return std::unexpected(FileStatus(err, "make directory " + name));
    }
    SP_ASSIGN_OR_RETURN(Fd child, OpenChild(parent, name, StatusCode::kInvalidArgument));
    chain.push_back(std::move(child));
  }
  return chain;
}

Status SyncDirectories(const std::vector<Fd>& directories) {
  for (const Fd& directory : directories) SP_RETURN_IF_ERROR(SyncDirectory(directory.get()));
  return {};
}

void RemoveEmptyDirectoriesBelow(int base, std::string_view relative) {
  while (!relative.empty()) {
    const size_t slash = relative.rfind('/');
    const std::string_view parent_path = slash == relative.npos ? std::string_view() : relative.substr(0, slash);
    const auto parent = OpenDirectoryBelow(base, parent_path);
    if (!parent) return;
    const std::string name(slash == relative.npos ? relative : relative.substr(slash + 1));
    if (::unlinkat(parent->get(), name.c_str(), AT_REMOVEDIR) != 0 && errno != ENOENT) return;
    relative = parent_path;
  }
}

bool IsRemoved(int directory) {
  struct stat info {};
  return ::fstat(directory, &info) != 0 || info.st_nlink == 0;
}

Result<std::vector<DirectoryEntry>> ReadDirectory(int directory) {
  // A descriptor of its own: readdir moves the position, which a duplicate would share.
  const int fd = RetryOnEintr([&] { return ::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  if (fd < 0) return std::unexpected(FileStatus(errno, "open directory"));
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(::fdopendir(fd), ::closedir);
  if (stream == nullptr) {
    const int err = errno;
    ::close(fd);
    return std::unexpected(FileStatus(err, "read directory"));
  }
  std::vector<DirectoryEntry> entries;
  for (;;) {
    errno = 0;
    const dirent* entry = ::readdir(stream.get());
    if (entry == nullptr) break;
    std::string name = entry->d_name;
    if (name == "." || name == "..") continue;
    FileKind kind = FileKind::kOther;
    if (entry->d_type == DT_REG) kind = FileKind::kFile;
    else if (entry->d_type == DT_DIR) kind = FileKind::kDirectory;
    else if (entry->d_type == DT_LNK) kind = FileKind::kLink;
    else if (entry->d_type == DT_UNKNOWN) {
      if (const auto facts = StatAt(directory, name)) kind = facts->kind;
    }
    entries.push_back({std::move(name), kind});
  }
  if (errno != 0) return std::unexpected(FileStatus(errno, "read directory"));
  return entries;
}

Result<FileFacts> StatAt(int directory, const std::string& name) {
  SP_CHECK(IsName(name));
  struct stat info {};
  if (::fstatat(directory, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0) return std::unexpected(FileStatus(errno, "stat " + name));
  return FactsOf(info);
}

Result<Fd> OpenFileAt(int directory, const std::string& name) {
  SP_CHECK(IsName(name));
  // O_NONBLOCK: a fifo must not hold us up.
  Fd fd(RetryOnEintr([&] { return ::openat(directory, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC); }));
  if (!fd.valid()) {
    if (errno == ELOOP) return std::unexpected(IsLink(name));
    if (errno == ENXIO) return Error(StatusCode::kNotFound, name + " is no plain file");
    return std::unexpected(FileStatus(errno, "open " + name));
  }
  SP_ASSIGN_OR_RETURN(const FileFacts facts, StatOpen(fd.get()));
  if (facts.kind != FileKind::kFile) return Error(StatusCode::kNotFound, name + " is no plain file");
  return fd;
}

Result<FileFacts> StatOpen(int fd) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return std::unexpected(FileStatus(errno, "stat"));
  return FactsOf(info);
}

Status ReadFileExact(int fd, MutableByteSpan out, uint64_t offset) {
  while (!out.empty()) {
    const ssize_t got = RetryOnEintr([&] { return ::pread(fd, out.data(), out.size(), static_cast<off_t>(offset)); });
    if (got < 0) return FileStatus(errno, "read");
    if (got == 0) return {StatusCode::kCorrupt, "the file ends at byte " + std::to_string(offset)};
    out = out.subspan(static_cast<size_t>(got));
    offset += static_cast<uint64_t>(got);
  }
  return {};
}

bool GoPastPageCache(int fd) { return SetDirect(fd, true); }
void UsePageCache(int fd) { SetDirect(fd, false); }

Result<bool> RemoveFileAt(int directory, const std::string& name) {
  SP_CHECK(IsName(name));
  if (::unlinkat(directory, name.c_str(), 0) != 0) {
    if (errno == ENOENT || errno == EISDIR) return false;
    return std::unexpected(FileStatus(errno, "remove " + name));
  }
  SP_RETURN_IF_ERROR(SyncDirectory(directory));
  return true;
}

Status SyncDirectory(int directory) { return SyncFile(directory, "fsync directory"); }

namespace {

struct Locked {
  Fd fd;  // Valid: we have the lock, or the file system has none.
  Writer writer = Writer::kUnknown;
};

Result<Locked> LockAbandoned(int directory, const std::string& name) {
  SP_CHECK(IsName(name));
  // Writable, because network file systems give an exclusive lock to nobody else.
  Fd fd(RetryOnEintr([&] { return ::openat(directory, name.c_str(), O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY | O_CLOEXEC); }));
  if (!fd.valid()) {
    if (errno == ENOENT) return std::unexpected(FileStatus(errno, "open " + name));
    return Locked{Fd(), Writer::kUnknown};
  }
  const int err = Lock(fd.get(), LOCK_EX | LOCK_NB);
  if (err == EWOULDBLOCK) return Locked{Fd(), Writer::kAlive};
  return Locked{std::move(fd), err == 0 ? Writer::kGone : Writer::kUnknown};
}

}  // namespace

Result<Writer> WriterOf(int directory, const std::string& name) {
  SP_ASSIGN_OR_RETURN(const Locked locked, LockAbandoned(directory, name));
  return locked.writer;
}

Status RemoveAbandonedFile(int directory, const std::string& name) {
  const auto locked = LockAbandoned(directory, name);  // Held over the removal: nobody begins to write it meanwhile.
  if (!locked) return locked.error().code() == StatusCode::kNotFound ? Status() : locked.error();
  if (locked->writer == Writer::kAlive) return {StatusCode::kUnavailable, name + " is being written by a living process"};
  const auto removed = RemoveFileAt(directory, name);
  return removed ? Status() : removed.error();
}

Result<NewFile> NewFile::Create(int directory, std::string temporary_name, uint64_t size_bytes) {
  SP_CHECK(IsName(temporary_name));
  const int flags = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  Fd fd(RetryOnEintr([&] { return ::openat(directory, temporary_name.c_str(), flags, 0666); }));
  if (!fd.valid()) return std::unexpected(FileStatus(errno, "create " + temporary_name));
  NewFile file(directory, std::move(temporary_name), std::move(fd));
  // Waits only for a sweep that looks at the file this moment. One that removed it is noticed here rather than after all the bytes.
  Lock(file.fd_.get(), LOCK_EX);
  struct stat info {};
  if (::fstat(file.fd_.get(), &info) != 0) return std::unexpected(FileStatus(errno, "stat"));
  if (info.st_nlink == 0) return Error(StatusCode::kUnavailable, "the temporary file was removed by somebody; try again");
  if (size_bytes != 0 && RetryOnEintr([&] { return ::fallocate(file.fd_.get(), 0, 0, static_cast<off_t>(size_bytes)); }) != 0) {
    if (errno == ENOSPC || errno == EDQUOT || errno == EFBIG) {
      return std::unexpected(FileStatus(errno, "take room for " + std::to_string(size_bytes) + " bytes"));
    }
    // Others: this file system cannot promise room; it will say so while it is written.
  }
  file.direct_ = size_bytes >= kDirectFrom && GoPastPageCache(file.fd_.get());
  return file;
}

NewFile::NewFile(NewFile&& other) noexcept
    : directory_(other.directory_), name_(std::exchange(other.name_, {})), fd_(std::move(other.fd_)), direct_(other.direct_),
      size_bytes_(other.size_bytes_), started_bytes_(other.started_bytes_), written_bytes_(other.written_bytes_) {}

NewFile::~NewFile() {
  if (!name_.empty()) ::unlinkat(directory_, name_.c_str(), 0);  // Not synced: a temporary file that a crash brings back is swept.
}

Status NewFile::Write(ByteSpan piece) {
  while (!piece.empty()) {
    if (direct_ && !IsAligned(piece, size_bytes_)) {  // The end of the file, or of what a full disk took.
      UsePageCache(fd_.get());
      direct_ = false;
    }
    const ssize_t put = RetryOnEintr([&] { return ::pwrite(fd_.get(), piece.data(), piece.size(), static_cast<off_t>(size_bytes_)); });
    if (put < 0 && errno == EINVAL && direct_) {  // It wants another alignment.
      UsePageCache(fd_.get());
      direct_ = false;
      continue;
    }
    if (put < 0) return FileStatus(errno, "write");
    size_bytes_ += static_cast<uint64_t>(put);
    if (direct_) started_bytes_ = written_bytes_ = size_bytes_;
    piece = piece.subspan(static_cast<size_t>(put));
  }
  return {};
}

Status NewFile::Append(ByteSpan piece) {
  const size_t aligned = direct_ ? piece.size() / kDirectAlignment * kDirectAlignment : 0;
  SP_RETURN_IF_ERROR(Write(piece.first(aligned)));
  SP_RETURN_IF_ERROR(Write(piece.subspan(aligned)));
  return size_bytes_ - started_bytes_ >= kWriteBehindBytes ? StartWriting() : Status();
}

Status NewFile::StartWriting() {
  // An error is reported once, here or by fsync: none may be dropped.
  int err = WriteOut(fd_.get(), started_bytes_, size_bytes_ - started_bytes_, SYNC_FILE_RANGE_WRITE);
  if (err != 0) return FileStatus(err, "write to disk");
  started_bytes_ = size_bytes_;
  if (started_bytes_ - written_bytes_ <= kUnwrittenBytesMax) return {};
  const uint64_t length = started_bytes_ - kUnwrittenBytesMax - written_bytes_;
  err = WriteOut(fd_.get(), written_bytes_, length, SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  if (err != 0) return FileStatus(err, "write to disk");
  ::posix_fadvise(fd_.get(), static_cast<off_t>(written_bytes_), static_cast<off_t>(length), POSIX_FADV_DONTNEED);
  written_bytes_ += length;
  return {};
}

Status NewFile::Sync() {
  SP_RETURN_IF_ERROR(SyncFile(fd_.get(), "fsync"));
  ::posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_DONTNEED);
  return {};
}

bool NewFile::IsOurs(const std::string& name) const {
  struct stat ours {}, there {};
  return ::fstat(fd_.get(), &ours) == 0 && ::fstatat(directory_, name.c_str(), &there, AT_SYMLINK_NOFOLLOW) == 0 && ours.st_dev == there.st_dev &&
         ours.st_ino == there.st_ino;
}

// Gives the file its final name; the temporary one may be there afterwards.
Result<bool> NewFile::GiveName(const std::string& name) {
  const auto failed = [&](int err) -> Result<bool> {
    if (err == EEXIST) return IsOurs(name);  // A network file system may have lost the answer to the first request and sent another.
    if (err == ENOENT) return Error(StatusCode::kUnavailable, "the temporary file was removed by somebody while it was written; write it again");
    return std::unexpected(FileStatus(err, "link " + name));
  };
  if (::linkat(directory_, name_.c_str(), directory_, name.c_str(), 0) == 0) return true;
  if (errno != EPERM && errno != EOPNOTSUPP && errno != EMLINK && errno != ENOSYS) return failed(errno);
  if (::renameat2(directory_, name_.c_str(), directory_, name.c_str(), RENAME_NOREPLACE) == 0) {
    name_.clear();
    return true;
  }
  if (errno == EINVAL || errno == ENOSYS || errno == EOPNOTSUPP) {
    return Error(StatusCode::kInvalidArgument,
                 "this file system can neither link nor rename without replacing, so that it cannot keep two writers apart; use another one");
  }
  return failed(errno);
}

Result<bool> NewFile::Publish(const std::string& name) {
  SP_CHECK(IsName(name));
  SP_ASSIGN_OR_RETURN(const bool published, GiveName(name));
  if (!name_.empty()) ::unlinkat(directory_, name_.c_str(), 0);  // If that fails, it is a second name of a whole file, and is swept.
  name_.clear();
  SP_RETURN_IF_ERROR(SyncDirectory(directory_));
  return published;
}

}  // namespace sp
