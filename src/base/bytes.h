// Byte spans, fixed-size ids and hex. Pure.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

namespace sp {

using ByteSpan = std::span<const uint8_t>;
using MutableByteSpan = std::span<uint8_t>;

inline ByteSpan AsBytes(std::string_view s) { return {reinterpret_cast<const uint8_t*>(s.data()), s.size()}; }
inline std::string_view AsText(ByteSpan b) { return {reinterpret_cast<const char*>(b.data()), b.size()}; }

// Opaque fixed-size identifiers: Id128 (attempts, nonces, sessions, boots), Hash256 (SHA-256 values). Ordered by bytes.
template <size_t N>
struct FixedBytes {
  std::array<uint8_t, N> bytes{};

  friend auto operator<=>(const FixedBytes&, const FixedBytes&) = default;
  bool is_zero() const { return *this == FixedBytes{}; }
  ByteSpan span() const { return bytes; }
  std::string ToHex() const {
    static constexpr char kDigits[] = "0123456789abcdef";
    std::string out;
    out.reserve(2 * N);
    for (uint8_t b : bytes) {
      out.push_back(kDigits[b >> 4]);
      out.push_back(kDigits[b & 15]);
    }
    return out;
  }
  // False, and `out` untouched, unless `hex` is exactly 2N lower-case hex digits.
  static bool FromHex(std::string_view hex, FixedBytes* out) {
    if (hex.size() != 2 * N) return false;
    FixedBytes value;
    for (size_t i = 0; i < 2 * N; ++i) {
      const char c = hex[i];
      int digit;
      if (c >= '0' && c <= '9') digit = c - '0';
      else if (c >= 'a' && c <= 'f') digit = c - 'a' + 10;
      else return false;
      value.bytes[i / 2] = static_cast<uint8_t>(value.bytes[i / 2] << 4 | digit);
    }
    *out = value;
    return true;
  }
};

using Id128 = FixedBytes<16>;
using Hash256 = FixedBytes<32>;

struct FixedBytesHash {  // For unordered containers; the bytes are already well mixed.
  template <size_t N>
  size_t operator()(const FixedBytes<N>& v) const {
    size_t h;
    std::memcpy(&h, v.bytes.data(), sizeof h);
    return h;
  }
};

}  // namespace sp
