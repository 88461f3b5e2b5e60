// Mapped memory as types with a lifetime: whoever holds the object may touch the range, nobody else.
#pragma once

#include <cstdint>
#include <span>

#include "base/bytes.h"
#include "base/status.h"

namespace sp {

enum class MapMode { kReadOnly, kReadWrite };

// One shared mapping. Move-only; the memory behind it follows the rules of the file. Unmapped when the object goes.
inline constexpr uint64_t kHugePageBytes = 2u << 20;  // Of x86-64 and of arm64 with 4 KiB pages; elsewhere alignment to it does no harm.

class Mapping {
 public:
  Mapping() = default;
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  // Maps [0, size_bytes) of `fd`, which can be closed afterwards. `populate` takes all page faults now. The file must be at
  // least that long (CheckSealedSize), or touching the end is fatal.
  static Result<Mapping> MapShared(int fd, uint64_t size_bytes, MapMode mode, bool populate);

  bool valid() const { return data_ != nullptr; }
  uint8_t* data() const { return data_; }
  uint64_t size_bytes() const { return size_; }
  // Whole huge pages of the file can appear in it as such. Mappings of multiples of kHugePageBytes are placed so that they can.
  bool huge_aligned() const { return reinterpret_cast<uintptr_t>(data_) % kHugePageBytes == 0 && size_ % kHugePageBytes == 0; }
  ByteSpan bytes() const { return {data_, size_}; }
  MutableByteSpan mutable_bytes() const;  // CHECKs that the mapping is writable.

  // Keeps the pages out of swap. kNoSpace or kDenied when RLIMIT_MEMLOCK does not allow it.
  Status Lock() const;

 private:
  friend class SlotMapping;
  Mapping(uint8_t* data, uint64_t size, MapMode mode) : data_(data), size_(size), mode_(mode) {}
  void Unmap();

  uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
  MapMode mode_ = MapMode::kReadOnly;
};

// The extents of a slot, mapped side by side into one contiguous range: byte i of the shard is byte i of the range.
// A forked child does not inherit the range, so it can neither write into a checkpoint nor keep its memory.
class SlotMapping {
 public:
  SlotMapping() = default;

  // Maps `extents` in order, each `extent_bytes` long, all pages faulted in. The descriptors can be closed afterwards. The caller
  // has checked each with CheckSealedSize. kInvalidArgument for an empty list or an extent size that is no multiple of the
  // page size.
  static Result<SlotMapping> Map(std::span<const int> extents, uint64_t extent_bytes, MapMode mode);

  bool valid() const { return range_.valid(); }
  uint8_t* data() const { return range_.data(); }
  uint64_t size_bytes() const { return range_.size_bytes(); }
  uint64_t extent_bytes() const { return extent_bytes_; }
  ByteSpan bytes() const { return range_.bytes(); }
  MutableByteSpan mutable_bytes() const { return range_.mutable_bytes(); }

 private:
  SlotMapping(Mapping range, uint64_t extent_bytes) : range_(std::move(range)), extent_bytes_(extent_bytes) {}
  Mapping range_;
  uint64_t extent_bytes_ = 0;
};

}  // namespace sp
