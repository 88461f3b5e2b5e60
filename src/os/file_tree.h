// Files and directories below one open directory, found by names that no symbolic link can lead elsewhere. Thread-safe, but a NewFile is one
// thread's.
//
// How a file comes to be, and what a crash leaves:
//
//   1. NewFile::Create  a temporary name, locked by its writer       crash: a temporary file that nobody has locked
//   2. Append, Sync     the bytes are on disk                        crash: the same
//   3. Publish          the final name, which replaces nothing; the  crash: the whole file, perhaps with its temporary name as well;
//                       temporary name goes; the directory is synced        or, if the directory did not get to the disk, as before
//
// Names are one component each: CHECKed, because a caller that passes on "../x" has a hole already. Relative paths are such names with "/" between.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "os/fd.h"

namespace sp {

enum class FileKind { kFile, kDirectory, kLink, kOther };

struct FileFacts {
  FileKind kind = FileKind::kOther;
  uint64_t size_bytes = 0;
  int64_t modified_unix_s = 0;
};

struct DirectoryEntry {
  std::string name;
  FileKind kind = FileKind::kOther;
};

// As ErrnoStatus, for a disk that somebody has to look after: says what to do, EROFS is kDenied, and what a broken disk or a server that went away
// answers (EIO, ESTALE, EBUSY) is kUnavailable.
Status FileStatus(int err, const std::string& what);

// The directory where it all begins; symbolic links in `path` are followed, it is the operator's. kNotFound when it does not exist.
Result<Fd> OpenDirectory(const std::string& path);
// Makes the last component of `path` with `mode`, and syncs its parent. Also OK when it is there.
Status MakeDirectory(const std::string& path, unsigned mode);

// The directory `relative` of `base`; "" is `base` itself. kNotFound also when a file is in the way, kDenied for a symbolic link.
Result<Fd> OpenDirectoryBelow(int base, std::string_view relative);
// Makes what is missing of `relative` (0777 less the umask) and opens all of it: `base` first, the directory itself last. Not synced yet, so that
// hardly any time passes before the caller has put a file into the last one, and nobody removes it as empty any more (kNotFound: somebody did).
// kInvalidArgument when a file is in the way.
Result<std::vector<Fd>> MakeDirectoriesBelow(int base, std::string_view relative);
// All of them, also those that were there: whoever made them may not have come to that yet.
Status SyncDirectories(const std::vector<Fd>& directories);
// Removes `relative` and its parents below `base`, the deepest first, as long as they are empty.
void RemoveEmptyDirectoriesBelow(int base, std::string_view relative);
// Whether somebody has removed this open directory: then nothing is in it, and that says nothing about what was.
bool IsRemoved(int directory);

// Without "." and "..", in no order.
Result<std::vector<DirectoryEntry>> ReadDirectory(int directory);
// Of the name itself, not of what a link points to.
Result<FileFacts> StatAt(int directory, const std::string& name);
// For reading. kNotFound when there is none or it is no plain file, kDenied for a symbolic link.
Result<Fd> OpenFileAt(int directory, const std::string& name);
Result<FileFacts> StatOpen(int fd);
// All of `out` at `offset`. A file that ends early is kCorrupt.
Status ReadFileExact(int fd, MutableByteSpan out, uint64_t offset);
// From here on the page cache has no part in what this descriptor reads and writes, where memory, offset and length are multiples of kDirectAlignment.
// False: this file system cannot do that.
bool GoPastPageCache(int fd);
void UsePageCache(int fd);
// Removes a name that is not a directory's, and syncs the directory. False: there was none.
Result<bool> RemoveFileAt(int directory, const std::string& name);
Status SyncDirectory(int directory);

enum class Writer { kGone, kAlive, kUnknown };  // Unknown: this file may not be opened, or its file system has no locks.
// Whether the NewFile that makes the temporary file `name` still exists, in any process of this machine (and of others, where the file system shares
// its locks). kNotFound when there is no such file.
Result<Writer> WriterOf(int directory, const std::string& name);
// Removes the temporary file `name`, unless its writer is alive: kUnavailable. OK when there is none.
Status RemoveAbandonedFile(int directory, const std::string& name);

// A file in the making. Unless it was published, it is removed when the object goes.
class NewFile {
 public:
  // `directory` stays open as long as the object lives. Takes room for `size_bytes` at once, where the file system can: kNoSpace before a byte is
  // written. Mode 0666 less the umask. kNotFound when the directory has been removed.
  static Result<NewFile> Create(int directory, std::string temporary_name, uint64_t size_bytes);

  NewFile(NewFile&& other) noexcept;
  NewFile& operator=(NewFile&&) = delete;
  ~NewFile();

  // Behind what was appended before. Past the page cache where that goes (GoPastPageCache), as long as pieces are aligned: copying into new pages of it
  // costs several times what the disk does. Else the system is told to write it to the disk at once, and made to keep up: no more than
  // kUnwrittenBytesMax wait in memory, which would otherwise be taken from the machine's other work and be left for Sync to wait for.
  Status Append(ByteSpan piece);
  // On disk, and out of the page cache where the system takes that advice, so that reading back asks the disk.
  Status Sync();
  // False: `name` is taken, and this file is removed. Either way the directory has been synced, so that what is there stays there. kUnavailable when
  // somebody removed the temporary file; kInvalidArgument when the file system can neither link nor rename without replacing.
  Result<bool> Publish(const std::string& name);

  static constexpr uint64_t kUnwrittenBytesMax = 64u << 20;

 private:
  NewFile(int directory, std::string name, Fd fd) : directory_(directory), name_(std::move(name)), fd_(std::move(fd)) {}
  Status Write(ByteSpan piece);
  Status StartWriting();
  Result<bool> GiveName(const std::string& name);
  bool IsOurs(const std::string& name) const;

  int directory_;
  std::string name_;  // Empty: no temporary file any more.
  Fd fd_;
  bool direct_ = false;  // Past the page cache.
  uint64_t size_bytes_ = 0;
  uint64_t started_bytes_ = 0;  // Told to be written to the disk.
  uint64_t written_bytes_ = 0;  // Waited for.
};

}  // namespace sp
