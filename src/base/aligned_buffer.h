// Memory that a disk can read and write directly: begins at a page, so it has the alignment that every Linux file system asks for (open(2), O_DIRECT).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "base/bytes.h"

namespace sp {

inline constexpr size_t kDirectAlignment = 4096;

// Not initialised. Throws std::bad_alloc.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t size) : bytes_(static_cast<uint8_t*>(::operator new(size, std::align_val_t(kDirectAlignment)))), size_(size) {}
  MutableByteSpan span() const { return {bytes_.get(), size_}; }

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { ::operator delete(bytes, std::align_val_t(kDirectAlignment)); }
  };
  std::unique_ptr<uint8_t, Free> bytes_;
  size_t size_;
};

}  // namespace sp
