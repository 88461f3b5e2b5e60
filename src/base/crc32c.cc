#include "base/crc32c.h"

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>
#endif

#include <array>
#include <bit>
#include <cstring>

#include "base/crc32c_math.h"

namespace sp {

namespace crc32c {
constinit const FixedFactor kShiftLong(PowerForBytes(kLongStride));
constinit const FixedFactor kShiftShort(PowerForBytes(kShortStride));
}  // namespace crc32c

namespace {

#if defined(__x86_64__)

#define SP_CRC_TARGET __attribute__((target("sse4.2")))
#define SP_CRC_INSTRUCTIONS 1
constexpr bool kCopies = false;
bool HasCrcInstructions() { return __builtin_cpu_supports("sse4.2"); }
SP_CRC_TARGET inline uint64_t CrcWord(uint64_t crc, const uint8_t* s) {
  uint64_t word;
  __builtin_memcpy(&word, s, sizeof word);
  return _mm_crc32_u64(crc, word);
}
SP_CRC_TARGET inline uint64_t CrcByte(uint64_t crc, uint8_t byte) {
  return _mm_crc32_u8(static_cast<uint32_t>(crc), byte);
}
[[maybe_unused]] inline void CopyLine(const uint8_t*, uint8_t*) {}
#include "base/crc32c_streams.inc"

#elif defined(__aarch64__) && defined(__linux__)

#define SP_CRC_TARGET __attribute__((target("+crc")))
#define SP_CRC_INSTRUCTIONS 1
constexpr bool kCopies = false;
constexpr unsigned long kHwcapCrc32 = 1ul << 7;  // HWCAP_CRC32 of the Linux ABI.
bool HasCrcInstructions() { return (getauxval(AT_HWCAP) & kHwcapCrc32) != 0; }
SP_CRC_TARGET inline uint64_t CrcWord(uint64_t crc, const uint8_t* s) {
  uint64_t word;
  __builtin_memcpy(&word, s, sizeof word);
  return __crc32cd(static_cast<uint32_t>(crc), word);
}
SP_CRC_TARGET inline uint64_t CrcByte(uint64_t crc, uint8_t byte) {
  return __crc32cb(static_cast<uint32_t>(crc), byte);
}
[[maybe_unused]] inline void CopyLine(const uint8_t*, uint8_t*) {}
#include "base/crc32c_streams.inc"

#endif

// tables[k][b]: register b followed by k zero bytes ("slicing by eight").
constexpr auto kSlices = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t value = 0; value < 256; ++value) {
    uint32_t crc = value;
    for (int bit = 0; bit < 8; ++bit) crc = crc32c::TimesX(crc);
    tables[0][value] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t value = 0; value < 256; ++value) {
      const uint32_t previous = tables[k - 1][value];
      tables[k][value] = previous >> 8 ^ tables[0][previous & 255];
    }
  }
  return tables;
}();

// powers[digit][value] = x^(8 * value * 256^digit): any shift is a product of at most eight.
constexpr auto kPowers = [] {
  std::array<std::array<uint32_t, 256>, 8> powers{};
  uint32_t base = crc32c::kXToThe8;
  for (auto& digit : powers) {
    digit[0] = crc32c::kOne;
    for (size_t value = 1; value < 256; ++value) digit[value] = crc32c::Multiply(digit[value - 1], base);
    base = crc32c::Multiply(digit[255], base);
  }
  return powers;
}();

}  // namespace

uint32_t internal::Crc32cPortable(uint32_t crc_before, ByteSpan data) {
  static_assert(std::endian::native == std::endian::little);
  uint32_t crc = ~crc_before;
  const uint8_t* s = data.data();
  size_t n = data.size();
  for (; n >= 8; n -= 8, s += 8) {
    uint64_t word;
    std::memcpy(&word, s, sizeof word);
    word ^= crc;
    crc = 0;
#pragma GCC unroll 8
    for (size_t byte = 0; byte < 8; ++byte) crc ^= kSlices[7 - byte][word >> (8 * byte) & 255];
  }
  for (; n != 0; --n, ++s) crc = crc >> 8 ^ kSlices[0][(crc ^ *s) & 255];
  return ~crc;
}

uint32_t Crc32c(uint32_t crc, ByteSpan data) {
#ifdef SP_CRC_INSTRUCTIONS
  static const bool has_instructions = HasCrcInstructions();
  if (has_instructions) return Streams(crc, data.data(), nullptr, data.size());
#endif
  return internal::Crc32cPortable(crc, data);
}

uint32_t Crc32cCombine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b) {
  // The inversions at start and end cancel out: the finished checksum shifts as the register does.
  for (const auto& digit : kPowers) {
    if ((length_b & 255) != 0) crc_a = crc32c::Multiply(digit[length_b & 255], crc_a);
    length_b >>= 8;
  }
  return crc_a ^ crc_b;
}

}  // namespace sp
