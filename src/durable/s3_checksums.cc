#include "durable/s3_checksums.h"

#include <algorithm>
#include <array>

#include "base/check.h"
#include "base/crc32c.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

}  // namespace

uint32_t CrcOfRange(std::span<const uint32_t> block_crcs, uint64_t size, uint64_t begin, uint64_t end) {
  SP_CHECK(begin <= end && end <= size && begin % kBlockBytes == 0 && (end % kBlockBytes == 0 || end == size));
  SP_CHECK(block_crcs.size() == BlockCount(size));
  uint32_t crc = 0;
  for (uint64_t at = begin; at < end; at += kBlockBytes) crc = Crc32cCombine(crc, block_crcs[at / kBlockBytes], std::min(kBlockBytes, end - at));
  return crc;
}

std::string CrcToBase64(uint32_t crc) {
  const uint64_t bits = uint64_t{crc} << 4;  // 36 bits: six digits of six bits.
  std::string out;
  for (int digit = 5; digit >= 0; --digit) out.push_back(kAlphabet[bits >> (6 * digit) & 63]);
  return out + "==";
}

std::optional<uint32_t> CrcFromBase64(std::string_view text) {
  if (text.size() != 8 || !text.ends_with("==")) return std::nullopt;
  uint64_t bits = 0;
  for (const char c : text.substr(0, 6)) {
    const size_t value = kAlphabet.find(c);
    if (value == kAlphabet.npos) return std::nullopt;
    bits = bits << 6 | value;
  }
  if (bits & 15) return std::nullopt;
  return static_cast<uint32_t>(bits >> 4);
}

}  // namespace sp
