// Arithmetic of CRC32C: polynomials over GF(2) modulo the Castagnoli polynomial. Pure, usable at compile time.
//
// Representation: bit 31 is the coefficient of x^0, bit 0 that of x^31 ("reflected", as the CRC instructions have it).
// Appending n bytes to a message multiplies the CRC register of what came before by x^(8n).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sp::crc32c {

inline constexpr uint32_t kPolynomial = 0x82f63b78;
inline constexpr uint32_t kOne = 0x80000000;          // x^0
inline constexpr uint32_t kXToThe8 = kOne >> 8;

constexpr uint32_t TimesX(uint32_t a) { return a >> 1 ^ (a & 1 ? kPolynomial : 0); }

constexpr uint32_t Multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int bit = 0; bit < 32; ++bit) {
    product ^= b & (0u - (a >> 31));
    a <<= 1;
    b = TimesX(b);
  }
  return product;
}

// x^(8 * bytes).
constexpr uint32_t PowerForBytes(uint64_t bytes) {
  uint32_t result = kOne;
  for (uint32_t square = kXToThe8; bytes != 0; bytes >>= 1, square = Multiply(square, square)) {
    if (bytes & 1) result = Multiply(result, square);
  }
  return result;
}

// Multiplication by one fixed polynomial, a byte of the other factor at a time.
class FixedFactor {
 public:
  explicit constexpr FixedFactor(uint32_t factor) {
    for (int byte = 0; byte < 4; ++byte) {
      for (uint32_t value = 0; value < 256; ++value) tables_[byte][value] = Multiply(value << (8 * byte), factor);
    }
  }
  constexpr uint32_t Times(uint32_t a) const {
    return tables_[0][a & 255] ^ tables_[1][a >> 8 & 255] ^ tables_[2][a >> 16 & 255] ^ tables_[3][a >> 24];
  }

 private:
  std::array<std::array<uint32_t, 256>, 4> tables_{};
};

// The two distances at which crc32c_streams.inc runs its four checksums side by side.
inline constexpr size_t kLongStride = 4096;
inline constexpr size_t kShortStride = 256;
extern const FixedFactor kShiftLong;   // Appends kLongStride bytes.
extern const FixedFactor kShiftShort;  // Appends kShortStride bytes.

}  // namespace sp::crc32c
