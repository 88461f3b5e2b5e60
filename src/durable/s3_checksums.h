// CRC32C as S3 writes it, and of parts of a sealed object without reading the object again. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "base/bytes.h"

namespace sp {

// CRC32C of the bytes [begin, end) of an object of `size` bytes from the checksums of its blocks. `begin` is a multiple of kBlockBytes, `end` too or
// the end of the object.
uint32_t CrcOfRange(std::span<const uint32_t> block_crcs, uint64_t size, uint64_t begin, uint64_t end);

// The four bytes, most significant first, in base64: "yZRlqg==".
std::string CrcToBase64(uint32_t crc);
// None for anything else, e.g. for "yZRlqg==-3", the checksum of the checksums of three parts.
std::optional<uint32_t> CrcFromBase64(std::string_view text);

}  // namespace sp
