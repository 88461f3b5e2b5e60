// CRC32C (Castagnoli): the checksum of every block. Pure, thread-safe.
//
// It finds accidents, not forgers. Uses the CPU's CRC instructions where it has them (checked once, at run time).
#pragma once

#include <cstdint>

#include "base/bytes.h"

namespace sp {

// Continues `crc`, the checksum of what came before (0 at the start), over `data`:
// Crc32c(Crc32c(0, a), b) == Crc32c(0, a + b).
uint32_t Crc32c(uint32_t crc, ByteSpan data);

// Checksum of a + b from crc_a = Crc32c(0, a), crc_b = Crc32c(0, b) and the length of b, without the bytes. About 50 ns
// for each byte of length_b's value that is not zero, so once for a whole block.
uint32_t Crc32cCombine(uint32_t crc_a, uint32_t crc_b, uint64_t length_b);

namespace internal {
// The implementation for CPUs without CRC instructions, for tests and as the reference of the others.
uint32_t Crc32cPortable(uint32_t crc, ByteSpan data);
}  // namespace internal

}  // namespace sp
