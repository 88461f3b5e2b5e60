#include "client/copy_kernel.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <vector>

#include "base/crc32c.h"

namespace sp {
namespace {

// Small enough that the second read of a chunk comes from the first-level cache.
constexpr size_t kPortableChunkBytes = 16 << 10;

uint32_t PortableCopy(uint32_t crc, const uint8_t* source, uint8_t* target, size_t n) {
  while (n != 0) {
    const size_t chunk = std::min(n, kPortableChunkBytes);
    std::memcpy(target, source, chunk);
    crc = Crc32c(crc, {source, chunk});
    source += chunk, target += chunk, n -= chunk;
  }
  return crc;
}

void NoFence() {}  // Ordinary stores need none.

constexpr CopyKernel kPortableKernel{KernelKind::kPortable, "portable", PortableCopy, NoFence};

constexpr size_t kSelfTestBytes = 2 << 20;  // Fresh pages are the dear part: 1 to 2 microseconds each.
constexpr int kSelfTestRounds = 3;

// An odd mixture of sizes and alignments; every byte that must be copied is, no other is touched, and the checksum is
// right.
bool IsCorrect(const CopyKernel& kernel, const uint8_t* source, uint8_t* target) {
  constexpr std::array<size_t, 6> kSizes{1, 63, 64, 1023, 4097, 40003};
  constexpr uint8_t kGuard = 0xa5;
  for (const size_t size : kSizes) {
    for (size_t shift = 0; shift < 70; shift += 23) {
      std::memset(target, kGuard, size + 256);
      uint8_t* const at = target + 64 + shift;
      const uint32_t crc = kernel.copy(0x1234567, source + shift / 2, at, size);
      kernel.fence();
      if (crc != internal::Crc32cPortable(0x1234567, {source + shift / 2, size})) return false;
      if (std::memcmp(at, source + shift / 2, size) != 0 || at[-1] != kGuard || at[size] != kGuard) return false;
    }
  }
  return true;
}

const CopyKernel* ChooseKernel() {
  std::vector<const CopyKernel*> candidates;
  for (const CopyKernel* kernel : {Avx512CopyKernel(), Avx2CopyKernel()}) {
    if (kernel != nullptr) candidates.push_back(kernel);
  }
  // The portable kernel takes part only where nothing else is left: a test this small stays in the last-level cache,
  // where ordinary stores look better than they are on a whole checkpoint.
  if (candidates.empty()) return &kPortableKernel;

  std::vector<uint8_t> source(kSelfTestBytes);
  std::vector<uint8_t> target(kSelfTestBytes);
  uint32_t state = 1;
  for (size_t i = 0; i < 64 << 10; ++i) source[i] = static_cast<uint8_t>((state = state * 1664525 + 1013904223) >> 24);
  std::erase_if(candidates, [&](const CopyKernel* k) { return !IsCorrect(*k, source.data(), target.data()); });
  if (candidates.empty()) return &kPortableKernel;
  if (candidates.size() == 1) return candidates.front();

  using Clock = std::chrono::steady_clock;
  std::vector<Clock::duration> best(candidates.size(), Clock::duration::max());
  for (int round = 0; round < kSelfTestRounds; ++round) {
    for (size_t i = 0; i < candidates.size(); ++i) {
      const auto begin = Clock::now();
      candidates[i]->copy(0, source.data(), target.data(), kSelfTestBytes);
      candidates[i]->fence();
      best[i] = std::min(best[i], Clock::now() - begin);
    }
  }
  return candidates[std::min_element(best.begin(), best.end()) - best.begin()];
}

}  // namespace

const CopyKernel* FindCopyKernel(KernelKind kind) {
  switch (kind) {
    case KernelKind::kPortable: return &kPortableKernel;
    case KernelKind::kAvx2: return Avx2CopyKernel();
    case KernelKind::kAvx512: return Avx512CopyKernel();
    case KernelKind::kAuto: break;
  }
  static const CopyKernel* const chosen = ChooseKernel();
  return chosen;
}

}  // namespace sp
