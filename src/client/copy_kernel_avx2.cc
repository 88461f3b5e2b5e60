// Streaming copy with AVX2 stores. Target attributes instead of compiler flags for the whole file: no inline function
// of a header gets compiled with instructions that another CPU lacks and then chosen by the linker for the whole
// program.
#include "client/copy_kernel.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "base/crc32c_math.h"

namespace sp {
namespace {

#define SP_CRC_TARGET __attribute__((target("avx2,sse4.2")))
constexpr bool kCopies = true;

SP_CRC_TARGET inline uint64_t CrcWord(uint64_t crc, const uint8_t* s) {
  uint64_t word;
  __builtin_memcpy(&word, s, sizeof word);
  return _mm_crc32_u64(crc, word);
}

SP_CRC_TARGET inline uint64_t CrcByte(uint64_t crc, uint8_t byte) {
  return _mm_crc32_u8(static_cast<uint32_t>(crc), byte);
}

SP_CRC_TARGET inline void CopyLine(const uint8_t* s, uint8_t* d) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + 32));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(d), low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(d + 32), high);
}

#include "base/crc32c_streams.inc"

SP_CRC_TARGET uint32_t Copy(uint32_t crc, const uint8_t* source, uint8_t* target, size_t n) {
  return Streams(crc, source, target, n);
}

void Fence() { _mm_sfence(); }

}  // namespace

const CopyKernel* Avx2CopyKernel() {
  static constexpr CopyKernel kKernel{KernelKind::kAvx2, "avx2", Copy, Fence};
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("sse4.2") ? &kKernel : nullptr;
}

}  // namespace sp

#else

namespace sp {
const CopyKernel* Avx2CopyKernel() { return nullptr; }
}  // namespace sp

#endif
