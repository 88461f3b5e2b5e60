// The s3:// store against a sink on loopback: GB/s and CPU seconds of the client per GiB, as JSON lines. Checksums of blocks exist already, as after a
// seal; those of parts are made from them. `get` only reads; `get+crc` also computes the checksums of the blocks, as a restore does.
//   s3_bench [--mib N] [--rounds N]
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/crc32c.h"
#include "durable/s3_store.h"
#include "format/constants.h"
#include "s3_sink.h"

namespace sp {
namespace {

double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + 1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

long AnonKiB() {
  FILE* status = std::fopen("/proc/self/status", "r");
  SP_CHECK(status != nullptr);
  char line[256];
  long kib = 0;
  while (std::fgets(line, sizeof line, status)) (void)std::sscanf(line, "RssAnon: %ld kB", &kib);
  std::fclose(status);
  return kib;
}

void Measure(const char* what, uint64_t bytes, int rounds, const std::function<void()>& work) {
  work();  // Connections, pages.
  for (int round = 0; round < rounds; ++round) {
    const double cpu = CpuSeconds();
    const long anon = AnonKiB();
    const auto begin = std::chrono::steady_clock::now();
    work();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    std::printf("{\"what\": \"%s\", \"gb_per_s\": %.2f, \"cpu_s_per_gib\": %.3f, \"anon_growth_mib\": %.1f}\n", what,
                static_cast<double>(bytes) / 1e9 / seconds, (CpuSeconds() - cpu) / (static_cast<double>(bytes) / (1 << 30)),
                static_cast<double>(AnonKiB() - anon) / 1024);
    std::fflush(stdout);
  }
}

std::vector<uint32_t> BlockCrcs(ByteSpan content) {
  std::vector<uint32_t> crcs;
  for (uint64_t at = 0; at < content.size(); at += kBlockBytes) {
    crcs.push_back(Crc32c(0, content.subspan(at, std::min<uint64_t>(kBlockBytes, content.size() - at))));
  }
  return crcs;
}

void Run(uint64_t bytes, int rounds) {
  constexpr size_t kObjects = 8;
  const S3Sink sink = StartS3Sink(bytes);
  const int fd = ::memfd_create("data", MFD_CLOEXEC);  // As the pool's extents: not the client's private memory.
  SP_CHECK(fd >= 0 && ::ftruncate(fd, static_cast<off_t>(bytes)) == 0);
  auto* data = static_cast<uint8_t*>(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0));
  SP_CHECK(data != MAP_FAILED);
  std::memset(data, 0, bytes);
  const MutableByteSpan all(data, bytes);
  const std::vector<uint32_t> crcs = BlockCrcs(all);
  S3Options options;
  options.bucket = "sink";
  options.region = "us-east-1";
  options.endpoint = "http://127.0.0.1:" + std::to_string(sink.port);
  options.path_style = true;
  options.credentials = S3Credentials{"key", "secret", ""};
  const SteadyClock clock;
  auto store = S3Store::Open(options, clock).value();
  const auto must = [](const Status& status) {
    if (status.ok()) return;
    std::fprintf(stderr, "%s\n", status.ToString().c_str());
    std::abort();
  };
  const uint64_t piece = bytes / kObjects;
  const auto in_eight = [&](const std::function<void(size_t)>& work) {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kObjects; ++i) threads.emplace_back(work, i);
    for (std::thread& thread : threads) thread.join();
  };
  const auto source = [&](uint64_t begin, uint64_t size) {
    const auto first = crcs.begin() + static_cast<ptrdiff_t>(begin / kBlockBytes);
    return PutSource::OfMemory(all.subspan(begin, size), {first, first + static_cast<ptrdiff_t>(size / kBlockBytes)});
  };
  Measure("put1", bytes, rounds, [&] { must(store->Put("one", source(0, bytes), {})); });
  Measure("put8", bytes, rounds, [&] { in_eight([&](size_t i) { must(store->Put(std::to_string(i), source(i * piece, piece), {})); }); });
  Measure("get1", bytes, rounds, [&] { must(store->ReadRange("one", 0, all, {})); });
  Measure("get8", bytes, rounds, [&] { in_eight([&](size_t i) { must(store->ReadRange("one", i * piece, all.subspan(i * piece, piece), {})); }); });
  Measure("get8+crc", bytes, rounds, [&] {
    in_eight([&](size_t i) {
      must(store->ReadRange("one", i * piece, all.subspan(i * piece, piece), {}));
      SP_CHECK(!BlockCrcs(all.subspan(i * piece, piece)).empty());
    });
  });
  store.reset();
  StopS3Sink(sink);
}

}  // namespace
}  // namespace sp

int main(int argc, char** argv) {
  uint64_t mib = 1024;
  int rounds = 3;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::string(argv[i]) == "--mib") mib = std::strtoull(argv[i + 1], nullptr, 10) / 8 * 8;
    if (std::string(argv[i]) == "--rounds") rounds = std::atoi(argv[i + 1]);
  }
  sp::Run(std::max<uint64_t>(mib, 8) << 20, rounds);
}
