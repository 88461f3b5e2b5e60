// Save and restore through the copy engine against one warm single-thread memcpy of the same bytes. One JSON object per
// case.
//
//   copy_bench [rounds = 7] [megabytes = 1000]
//
// Cases run interleaved and the best round counts, so that a busy neighbour disturbs all of them alike. Save: into a
// pre-touched memfd, as in steady state. Restore: from descriptors that this process has not mapped (every round maps
// anew), into touched memory. Limit of the hardware: a copy with ordinary stores reads the target, too; streaming
// stores move 2 bytes per byte copied.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/crc32c.h"
#include "client/copy_engine.h"
#include "os/mapping.h"
#include "os/memfd.h"

namespace sp {
namespace {

constexpr uint64_t kExtentBytes = 64 << 20;

struct Case {
  std::string name;
  std::function<void()> run;
  double best_seconds = 1e9;
};

MutableByteSpan TouchedMemory(uint64_t size, uint64_t seed) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  SP_CHECK(memory != MAP_FAILED);
  auto* words = static_cast<uint64_t*>(memory);
  for (uint64_t i = 0; i < size / 8; ++i) words[i] = (i + seed) * 0x9e3779b97f4a7c15;
  return {static_cast<uint8_t*>(memory), size};
}

// The same bytes as tensors of `tensor_bytes`, the last one shorter.
std::vector<CopySegment> Cut(ByteSpan bytes, uint64_t tensor_bytes) {
  std::vector<CopySegment> segments;
  for (uint64_t at = 0; at < bytes.size(); at += tensor_bytes) {
    segments.push_back({bytes.data() + at, at, std::min<uint64_t>(tensor_bytes, bytes.size() - at)});
  }
  return segments;
}

int Main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 7;
  const uint64_t size = (argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1000) * 1000 * 1000 / 8 * 8;

  const MutableByteSpan state = TouchedMemory(size, 1);
  std::vector<Fd> extents;
  std::vector<int> fds;
  for (uint64_t at = 0; at < size; at += kExtentBytes) {
    extents.push_back(CreateMemfd("copy-bench", kExtentBytes).value());
    SP_CHECK(Prefault(extents.back().get(), kExtentBytes).ok());
    SP_CHECK(SealSize(extents.back().get()).ok());
    fds.push_back(extents.back().get());
  }
  const SlotMapping slot = SlotMapping::Map(fds, kExtentBytes, MapMode::kReadWrite).value();
  const MutableByteSpan shard = slot.mutable_bytes().first(size);
  const MutableByteSpan restored = TouchedMemory(size, 2);
  std::vector<uint32_t> crcs(BlockCount(size));
  const ShardSource source{
      .mapped = {}, .extents = fds, .extent_bytes = kExtentBytes, .length = size, .block_crcs = crcs};
  ShardSource mapped = source;
  mapped.mapped = shard;

  std::vector<Case> cases;
  volatile uint32_t alone = 0;
  cases.push_back({"memcpy", [&] { std::memcpy(shard.data(), state.data(), size); }});
  cases.push_back({"crc32c", [&] { alone = Crc32c(0, state); }});
  std::vector<std::unique_ptr<CopyEngine>> engines;
  for (const uint64_t tensor_bytes : {uint64_t{100'000'000}, uint64_t{200'000}}) {
    const std::string shape = std::to_string(tensor_bytes / 1000) + "kB";
    const std::vector<CopySegment> tensors = Cut(state, tensor_bytes);
    cases.push_back({"memcpy/" + shape, [=] {
                       for (const CopySegment& t : tensors) std::memcpy(shard.data() + t.offset, t.source, t.size);
                     }});
    std::vector<ScatterSegment> wanted;
    for (const CopySegment& t : tensors) wanted.push_back({t.offset, t.size, restored.data() + t.offset});
    for (const KernelKind kind : {KernelKind::kPortable, KernelKind::kAvx2, KernelKind::kAvx512}) {
      const CopyKernel* kernel = FindCopyKernel(kind);
      if (kernel == nullptr) continue;
      CopyEngine* engine = engines.emplace_back(std::make_unique<CopyEngine>(*kernel)).get();
      for (const int threads : {1, 2}) {
        const CopyOptions options{.threads = threads};
        const std::string how = "/" + shape + "/" + kernel->name + "/" + std::to_string(threads);
        cases.push_back({"save" + how, [=, &crcs] { SP_CHECK(engine->CopyIn(tensors, shard, crcs, options).ok()); }});
        if (kernel != FindCopyKernel(KernelKind::kAuto)) continue;
        cases.push_back({"restore" + how, [=] { SP_CHECK(engine->CopyOut(source, wanted, options).status.ok()); }});
        cases.push_back(
            {"restore-mapped" + how, [=] { SP_CHECK(engine->CopyOut(mapped, wanted, options).status.ok()); }});
      }
    }
  }

  for (int round = 0; round < rounds; ++round) {
    for (Case& c : cases) {
      const auto begin = std::chrono::steady_clock::now();
      c.run();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      c.best_seconds = std::min(c.best_seconds, took.count());
    }
  }
  SP_CHECK(std::memcmp(restored.data(), state.data(), size) == 0);
  for (const Case& c : cases) {
    std::printf("{\"case\": \"%s\", \"ms\": %.1f, \"gb_per_s\": %.2f, \"ratio_to_memcpy\": %.3f, \"bytes\": %llu, "
                "\"rounds\": %d, \"cpus\": %u}\n",
                c.name.c_str(), c.best_seconds * 1e3, static_cast<double>(size) / c.best_seconds / 1e9,
                c.best_seconds / cases.front().best_seconds, static_cast<unsigned long long>(size), rounds,
                std::thread::hardware_concurrency());
  }
  return 0;
}

}  // namespace
}  // namespace sp

int main(int argc, char** argv) { return sp::Main(argc, argv); }
