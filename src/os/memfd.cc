#include "os/memfd.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "os/errors.h"
#include "os/mapping.h"

namespace sp {
namespace {

// Newer than the C library's headers: the memory can never be executed; also silences a warning of the kernel.
constexpr unsigned kMfdNoexecSeal = 0x0008U;
constexpr int kMadvPopulateWrite = 23;
constexpr int kMadvCollapse = 25;

Result<uint64_t> FileSize(int fd) {
  struct stat info {};
  if (::fstat(fd, &info) != 0) return ErrnoError(errno, "fstat of descriptor " + std::to_string(fd));
  return static_cast<uint64_t>(info.st_size);
}

std::string Range(uint64_t offset, size_t size) {
  return std::to_string(size) + " bytes at " + std::to_string(offset);
}

}  // namespace

Result<Fd> CreateMemfd(const std::string& name, uint64_t size_bytes) {
  constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  Fd fd(::memfd_create(name.c_str(), kFlags | kMfdNoexecSeal));
  if (!fd.valid() && errno == EINVAL) fd.Reset(::memfd_create(name.c_str(), kFlags));
  if (!fd.valid()) return ErrnoError(errno, "memfd_create " + name);
  // Born with permissions for everybody, which whoever sees /proc/<pid>/fd could use.
  if (::fchmod(fd.get(), 0600) != 0) return ErrnoError(errno, "fchmod of memfd " + name);
  const auto size = static_cast<off_t>(size_bytes);
  if (RetryOnEintr([&] { return ::ftruncate(fd.get(), size); }) != 0) {
    return ErrnoError(errno, "size memfd " + name + " to " + std::to_string(size_bytes) + " bytes");
  }
  return fd;
}

Status SealSize(int fd) {
  if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) return ErrnoStatus(errno, "seal a memfd");
  return {};
}

Result<Fd> ReopenReadOnly(int fd) {
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  Fd copy(RetryOnEintr([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC); }));
  if (!copy.valid()) return ErrnoError(errno, "open " + path + " read-only");
  return copy;
}

Status CheckSealedSize(int fd, uint64_t expected_bytes) {
  SP_ASSIGN_OR_RETURN(const uint64_t size, FileSize(fd));
  if (size != expected_bytes) {
    return Status(StatusCode::kProtocol, "shared memory of " + std::to_string(size) + " bytes, expected " +
                                             std::to_string(expected_bytes));
  }
  const int seals = ::fcntl(fd, F_GET_SEALS);
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW;
  if (seals < 0 || (seals & kNeeded) != kNeeded) {
    return Status(StatusCode::kProtocol, "shared memory is not sealed against a change of its size");
  }
  return {};
}

Status Prefault(int fd, uint64_t size_bytes) {
  if (size_bytes == 0) return {};
  SP_ASSIGN_OR_RETURN(const uint64_t file_size, FileSize(fd));
  if (file_size < size_bytes) {
    return Status(StatusCode::kInvalidArgument, "cannot pre-fault " + std::to_string(size_bytes) + " bytes of a file of " +
                                                    std::to_string(file_size));
  }
  const std::string what = "pre-fault " + std::to_string(size_bytes) + " bytes of shared memory";
  SP_ASSIGN_OR_RETURN(Mapping mapping, Mapping::MapShared(fd, size_bytes, MapMode::kReadWrite, /*populate=*/false));
  // Before the first touch, or the pages are small already. Only hints: where they do nothing, pages stay small.
  (void)::madvise(mapping.data(), size_bytes, MADV_HUGEPAGE);
  if (mapping.huge_aligned()) {
    // Kernels with huge pages of shared memory switched off still make them on request, wherever one small page is there (6.1 on). They save a
    // fresh process most of the cost of mapping an extent (measured here: 1 ms instead of 60 per GiB) and cost no more than small pages to make.
    for (uint64_t offset = 0; offset < size_bytes; offset += kHugePageBytes) {
      if (::madvise(mapping.data() + offset, 1, kMadvPopulateWrite) != 0) break;
    }
    (void)::madvise(mapping.data(), size_bytes, kMadvCollapse);
  }
  if (RetryOnEintr([&] { return ::madvise(mapping.data(), size_bytes, kMadvPopulateWrite); }) == 0) return {};
  // EFAULT stands for the SIGBUS that touching the page would have raised.
  if (errno == ENOMEM || errno == EFAULT) return ErrnoStatus(ENOMEM, what);
  if (errno != EINVAL) return ErrnoStatus(errno, what);
  // A kernel before 5.14: fallocate says in words when there is no room, then touching is safe.
  const auto length = static_cast<off_t>(size_bytes);
  if (RetryOnEintr([&] { return ::fallocate(fd, 0, 0, length); }) != 0) return ErrnoStatus(errno, what);
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  for (uint64_t offset = 0; offset < size_bytes; offset += page) {
    // Adding zero writes the page without changing what another process may store there meanwhile.
    __atomic_fetch_add(mapping.data() + offset, 0, __ATOMIC_RELAXED);
  }
  return {};
}

Status PReadExact(int fd, MutableByteSpan out, uint64_t offset) {
  size_t done = 0;
  while (done < out.size()) {
    const auto at = static_cast<off_t>(offset + done);
    const ssize_t got = RetryOnEintr([&] { return ::pread(fd, out.data() + done, out.size() - done, at); });
    if (got < 0) return ErrnoStatus(errno, "read " + Range(offset, out.size()));
    if (got == 0) {
      return Status(StatusCode::kCorrupt, "read " + Range(offset, out.size()) + ": the file ends after " +
                                              std::to_string(done));
    }
    done += static_cast<size_t>(got);
  }
  return {};
}

Status PWriteExact(int fd, ByteSpan data, uint64_t offset) {
  size_t done = 0;
  while (done < data.size()) {
    const auto at = static_cast<off_t>(offset + done);
    const ssize_t put = RetryOnEintr([&] { return ::pwrite(fd, data.data() + done, data.size() - done, at); });
    if (put < 0) return ErrnoStatus(errno, "write " + Range(offset, data.size()));
    if (put == 0) {
      return Status(StatusCode::kInternal, "write " + Range(offset, data.size()) + ": stuck after " + std::to_string(done));
    }
    done += static_cast<size_t>(put);
  }
  return {};
}

}  // namespace sp
