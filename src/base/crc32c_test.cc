#include "base/crc32c.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "base/crc32c_math.h"

namespace sp {
namespace {

// The definition, bit by bit: independent of every table and instruction that the product uses.
uint32_t Reference(uint32_t crc, ByteSpan data) {
  crc = ~crc;
  for (const uint8_t byte : data) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? crc >> 1 ^ 0x82f63b78 : crc >> 1;
  }
  return ~crc;
}

std::vector<uint8_t> RandomBytes(std::mt19937_64& rng, size_t size) {
  std::vector<uint8_t> bytes(size);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng());
  return bytes;
}

TEST(Crc32c, KnownAnswers) {
  EXPECT_EQ(Crc32c(0, AsBytes("123456789")), 0xE3069283u);
  EXPECT_EQ(Crc32c(0, {}), 0u);
  // RFC 3720, B.4.
  EXPECT_EQ(Crc32c(0, std::vector<uint8_t>(32, 0x00)), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(0, std::vector<uint8_t>(32, 0xff)), 0x62A8AB43u);
  EXPECT_EQ(internal::Crc32cPortable(0, AsBytes("123456789")), 0xE3069283u);
}

TEST(Crc32c, AgreesWithTheDefinitionForAllSmallSizesAndAlignments) {
  std::mt19937_64 rng(1);
  const std::vector<uint8_t> bytes = RandomBytes(rng, 4096);
  for (size_t size = 0; size < 300; ++size) {
    const size_t start = size % 17;
    const uint32_t before = static_cast<uint32_t>(rng());
    const ByteSpan data(bytes.data() + start, size);
    const uint32_t expected = Reference(before, data);
    ASSERT_EQ(Crc32c(before, data), expected) << size;
    ASSERT_EQ(internal::Crc32cPortable(before, data), expected) << size;
  }
}

TEST(Crc32c, AgreesWithTheDefinitionAroundTheStridesOfTheFastLoop) {
  std::mt19937_64 rng(2);
  const std::vector<uint8_t> bytes = RandomBytes(rng, 80 << 10);
  for (const size_t around : {4 * crc32c::kShortStride, 8 * crc32c::kShortStride, 4 * crc32c::kLongStride,
                              4 * (crc32c::kLongStride + crc32c::kShortStride), 16 * crc32c::kLongStride}) {
    for (size_t size = around - 9; size <= around + 9; ++size) {
      const ByteSpan data(bytes.data() + size % 13, size);
      const uint32_t expected = Reference(7, data);
      ASSERT_EQ(Crc32c(7, data), expected) << size;
      ASSERT_EQ(internal::Crc32cPortable(7, data), expected) << size;
    }
  }
}

TEST(Crc32c, ContinuesAndCombines) {
  std::mt19937_64 rng(3);
  const std::vector<uint8_t> bytes = RandomBytes(rng, 200 << 10);
  for (int round = 0; round < 500; ++round) {
    const size_t size = rng() % (round % 2 == 0 ? 200 : bytes.size());
    const ByteSpan whole(bytes.data(), size);
    const size_t cut = size == 0 ? 0 : rng() % (size + 1);
    const uint32_t expected = Crc32c(0, whole);
    const uint32_t a = Crc32c(0, whole.first(cut));
    const uint32_t b = Crc32c(0, whole.subspan(cut));
    ASSERT_EQ(Crc32c(a, whole.subspan(cut)), expected) << size << " cut at " << cut;
    ASSERT_EQ(Crc32cCombine(a, b, size - cut), expected) << size << " cut at " << cut;
  }
}

TEST(Crc32c, CombinesLengthsThatNoTestCanHoldInMemory) {
  // Appending 2^40 + 3 zero bytes in one step or in two gives the same.
  const uint32_t a = Crc32c(0, AsBytes("safepoint"));
  uint32_t zeros = 0;  // Checksum of n zero bytes, n doubling up to 2^40.
  {
    const uint8_t zero = 0;
    zeros = Crc32c(0, {&zero, 1});
    for (uint64_t n = 1; n < uint64_t{1} << 40; n *= 2) zeros = Crc32cCombine(zeros, zeros, n);
  }
  const std::vector<uint8_t> three(3, 0);
  const uint32_t last = Crc32c(0, three);
  const uint64_t length = uint64_t{1} << 40;
  const uint32_t left_first = Crc32cCombine(Crc32cCombine(a, zeros, length), last, 3);
  const uint32_t right_first = Crc32cCombine(a, Crc32cCombine(zeros, last, 3), length + 3);
  EXPECT_EQ(left_first, right_first);
  EXPECT_NE(left_first, a);
}

TEST(Crc32c, EverySingleBitFlipIsSeen) {  // I-8
  std::mt19937_64 rng(4);
  std::vector<uint8_t> bytes = RandomBytes(rng, 17000);
  const uint32_t expected = Crc32c(0, bytes);
  for (size_t i = 0; i < bytes.size(); ++i) {
    const uint8_t flip = static_cast<uint8_t>(1u << rng() % 8);
    bytes[i] ^= flip;
    ASSERT_NE(Crc32c(0, bytes), expected) << i;
    bytes[i] ^= flip;
  }
}

}  // namespace
}  // namespace sp
