// What every fuzz target provides, and what they share. Built with clang, libFuzzer calls the first function; built with g++,
// standalone_main.cc calls both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"

// Must return 0 and must not crash, whatever the bytes are. Broken properties end in SP_CHECK.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

extern "C" __attribute__((weak)) int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*, size_t),
                                                                                void (*on_free)(const volatile void*));

namespace sp::fuzz {

using Input = std::vector<uint8_t>;

// The target's hand-made inputs: real encodings, and the bad ones of the reliability reference. Mutations start from them.
std::vector<Input> Seeds();

inline Input AsInput(std::string_view text) { return {text.begin(), text.end()}; }
template <typename T>
  requires(!std::is_convertible_v<const T&, std::string_view>)
Input AsInput(const T& bytes) {
  return {bytes.begin(), bytes.end()};
}

// How much memory was asked for since it was made, freed or not. Counts only where a sanitizer tells of allocations; elsewhere always 0.
// One at a time, in single-threaded targets.
class AllocationMeter {
 public:
  AllocationMeter() {
    static const bool installed = [] {
      return __sanitizer_install_malloc_and_free_hooks &&
             __sanitizer_install_malloc_and_free_hooks([](const volatile void*, size_t size) { total_ += size; }, [](const volatile void*) {}) > 0;
    }();
    (void)installed;
    before_ = total_;
  }
  size_t bytes() const { return total_ - before_; }

 private:
  static inline size_t total_ = 0;
  size_t before_;
};

// The next bytes of an input as numbers; zeros when it is used up.
class Numbers {
 public:
  explicit Numbers(ByteSpan bytes) : bytes_(bytes) {}
  bool done() const { return bytes_.empty(); }
  ByteSpan rest() const { return bytes_; }
  uint8_t U8() {
    if (bytes_.empty()) return 0;
    const uint8_t value = bytes_[0];
    bytes_ = bytes_.subspan(1);
    return value;
  }
  uint16_t U16() {
    const uint16_t low = U8();
    return static_cast<uint16_t>(low | U8() << 8);
  }
  uint32_t U32() {
    const uint32_t low = U16();
    return low | uint32_t{U16()} << 16;
  }
  uint64_t U64() {
    const uint64_t low = U32();
    return low | uint64_t{U32()} << 32;
  }

 private:
  ByteSpan bytes_;
};

}  // namespace sp::fuzz
