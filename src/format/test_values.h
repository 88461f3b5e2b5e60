// Values for the tests of this folder: seeded random instances of anything with Fields(), and a pair of records that the golden bytes use.
#pragma once

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "format/seal_record.h"

namespace sp::testing {

// Fills every field with random content within its bounds; the third kind of archive beside Encoder and Decoder.
class Randomizer {
 public:
  explicit Randomizer(uint64_t seed) : random_(seed) {}
  uint64_t Next() { return random_(); }
  void U8(uint8_t& v) { v = static_cast<uint8_t>(Next()); }
  void U16(uint16_t& v) { v = static_cast<uint16_t>(Next()); }
  void U32(uint32_t& v) { v = static_cast<uint32_t>(Next()); }
  void U64(uint64_t& v) { v = Next(); }
  template <typename E>
  void Enum(E& v, E last) {
    v = static_cast<E>(Next() % (static_cast<uint64_t>(last) + 1));
  }
  void Bool(bool& v) { v = Next() % 2 == 1; }
  template <size_t N>
  void Fixed(FixedBytes<N>& v) {
    for (uint8_t& b : v.bytes) b = static_cast<uint8_t>(Next());
  }
  void Text(std::string& v, uint64_t max) {
    v.resize(Next() % (std::min<uint64_t>(max, 40) + 1));
    for (char& c : v) c = static_cast<char>(Next());
  }
  template <typename T, typename F>
  void List(std::vector<T>& v, uint64_t max, F&& element) {
    v.resize(Next() % (std::min<uint64_t>(max, 5) + 1));
    for (T& e : v) element(*this, e);
  }

 private:
  std::mt19937_64 random_;
};

template <typename T>
T RandomValue(Randomizer& random) {
  T value;
  value.Fields(random);
  return value;
}

template <typename T>
std::string Hex(const T& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (uint8_t b : bytes) {
    out += kDigits[b >> 4];
    out += kDigits[b & 15];
  }
  return out;
}

template <size_t N>
FixedBytes<N> Counting(uint8_t first) {
  FixedBytes<N> value;
  for (uint8_t& b : value.bytes) b = first++;
  return value;
}

// The data record of the golden bytes: rank `rank` of a world of two.
inline SealRecord GoldenRecord(uint32_t rank) {
  SealRecord r;
  r.key = {1000, "llama-7b_run3", 7, Counting<16>(0), 1200, 2};
  r.attempt = r.key.AttemptId();
  r.world_size = 2;
  r.rank = rank;
  r.length_bytes = 3 * (1u << 20) + 17;
  r.block_root = Counting<32>(32);
  r.whole_crc = 0xdeadbeef;
  r.header_bytes = 8192;
  r.static_offset = 4096;
  r.structure = Counting<32>(64);
  return r;
}

}  // namespace sp::testing
