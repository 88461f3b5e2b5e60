#include "os/mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <limits>
#include <string>
#include <utility>

#include "base/check.h"
#include "os/errors.h"

namespace sp {
namespace {

int Protection(MapMode mode) { return mode == MapMode::kReadWrite ? PROT_READ | PROT_WRITE : PROT_READ; }

// The kernel refuses to unmap (ENOMEM) where that would need more bookkeeping than it has or allows. The range stays mapped then, used by nobody:
// no reason to end a trainer. Anything else would be our own bug.
void Release(void* at, uint64_t size) { SP_CHECK(::munmap(at, size) == 0 || errno == ENOMEM); }

// Address space of `size` bytes, aligned to huge pages if the size is. Reserved first, so that fixed addresses in it are ours: nothing else
// can be mapped in between.
void* Reserve(uint64_t size) {
  const uint64_t slack = size % kHugePageBytes == 0 ? kHugePageBytes : 0;
  void* reserved = ::mmap(nullptr, size + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED || slack == 0) return reserved;
  auto* begin = static_cast<uint8_t*>(reserved);
  const uint64_t head = (kHugePageBytes - reinterpret_cast<uintptr_t>(begin) % kHugePageBytes) % kHugePageBytes;
  if (head > 0) Release(begin, head);
  if (slack > head) Release(begin + head + size, slack - head);
  return begin + head;
}

}  // namespace

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)), mode_(other.mode_) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  if (this != &other) {
    Unmap();
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    mode_ = other.mode_;
  }
  return *this;
}

Mapping::~Mapping() { Unmap(); }

void Mapping::Unmap() {
  if (data_ != nullptr) Release(data_, size_);
  data_ = nullptr;
}

Result<Mapping> Mapping::MapShared(int fd, uint64_t size_bytes, MapMode mode, bool populate) {
  void* reserved = size_bytes % kHugePageBytes == 0 && size_bytes > 0 ? Reserve(size_bytes) : nullptr;
  if (reserved == MAP_FAILED) return ErrnoError(errno, "reserve " + std::to_string(size_bytes) + " bytes of address space");
  const int flags = MAP_SHARED | (populate ? MAP_POPULATE : 0) | (reserved != nullptr ? MAP_FIXED : 0);
  void* at = ::mmap(reserved, size_bytes, Protection(mode), flags, fd, 0);
  if (at == MAP_FAILED && reserved != nullptr) {
    const int error = errno;
    Release(reserved, size_bytes);
    errno = error;
  }
  if (at == MAP_FAILED) return ErrnoError(errno, "map " + std::to_string(size_bytes) + " bytes");
  return Mapping(static_cast<uint8_t*>(at), size_bytes, mode);
}

MutableByteSpan Mapping::mutable_bytes() const {
  SP_CHECK(data_ == nullptr || mode_ == MapMode::kReadWrite);
  return {data_, size_};
}

Status Mapping::Lock() const {
  if (::mlock(data_, size_) == 0) return {};
  return ErrnoStatus(errno, "lock " + std::to_string(size_) + " bytes in memory (see RLIMIT_MEMLOCK)");
}

Result<SlotMapping> SlotMapping::Map(std::span<const int> extents, uint64_t extent_bytes, MapMode mode) {
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  if (extents.empty() || extent_bytes == 0 || extent_bytes % page != 0 ||
      extents.size() > std::numeric_limits<int64_t>::max() / extent_bytes) {
    return Error(StatusCode::kInvalidArgument, "cannot map " + std::to_string(extents.size()) + " extents of " +
                                                   std::to_string(extent_bytes) + " bytes");
  }
  const uint64_t size = extents.size() * extent_bytes;
  void* reserved = Reserve(size);
  if (reserved == MAP_FAILED) return ErrnoError(errno, "reserve " + std::to_string(size) + " bytes of address space");
  Mapping range(static_cast<uint8_t*>(reserved), size, mode);
  for (size_t i = 0; i < extents.size(); ++i) {
    void* at = range.data_ + i * extent_bytes;
    const int flags = MAP_SHARED | MAP_FIXED | MAP_POPULATE;
    if (::mmap(at, extent_bytes, Protection(mode), flags, extents[i], 0) == MAP_FAILED) {
      return ErrnoError(errno, "map extent " + std::to_string(i) + " of " + std::to_string(extents.size()));
    }
  }
  if (RetryOnEintr([&] { return ::madvise(range.data_, size, MADV_DONTFORK); }) != 0) return ErrnoError(errno, "keep a slot from forked children");
  return SlotMapping(std::move(range), extent_bytes);
}

}  // namespace sp
