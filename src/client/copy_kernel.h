// The inner loops of the copy engine: copy bytes and continue their CRC32C in one pass. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sp {

enum class KernelKind { kAuto, kPortable, kAvx2, kAvx512 };

struct CopyKernel {
  KernelKind kind;
  const char* name;
  // Copies n bytes, any alignment, ranges not overlapping. Returns the checksum continued over them, like Crc32c. Lines
  // that are written whole may go past the caches: nobody else may rely on them before `fence`.
  uint32_t (*copy)(uint32_t crc, const uint8_t* source, uint8_t* target, size_t n);
  // Makes everything this thread has copied visible to whoever later sees its next ordinary store.
  void (*fence)();
};

// nullptr when this CPU cannot run that kind. kAuto is the fastest kind that passes a self-test on this machine; it is
// found once per process, within 20 ms, and never nullptr.
const CopyKernel* FindCopyKernel(KernelKind kind);

// The kernels of single files; nullptr where compiled for another architecture or when the CPU lacks the instructions.
const CopyKernel* Avx2CopyKernel();
const CopyKernel* Avx512CopyKernel();

}  // namespace sp
