#include "client/copy_engine.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <string>
#include <thread>

#include "base/crc32c.h"
#include "os/memfd.h"

namespace sp {
namespace {

using Bytes = std::vector<uint8_t>;

Bytes RandomBytes(std::mt19937_64& rng, size_t size) {
  Bytes bytes(size + 8);
  for (size_t i = 0; i < size; i += 8) {
    const uint64_t word = rng();
    std::memcpy(bytes.data() + i, &word, sizeof word);
  }
  bytes.resize(size);
  return bytes;
}

std::vector<uint32_t> BlockCrcs(ByteSpan bytes) {
  std::vector<uint32_t> crcs;
  for (size_t at = 0; at < bytes.size(); at += kBlockBytes) {
    crcs.push_back(internal::Crc32cPortable(0, bytes.subspan(at, std::min<size_t>(kBlockBytes, bytes.size() - at))));
  }
  return crcs;
}

std::vector<const CopyKernel*> Kernels() {
  std::vector<const CopyKernel*> kernels;
  for (const KernelKind kind : {KernelKind::kPortable, KernelKind::kAvx2, KernelKind::kAvx512}) {
    if (const CopyKernel* kernel = FindCopyKernel(kind)) kernels.push_back(kernel);
  }
  return kernels;
}

// Sizes as tensors have them: many scalars, a few large ones, empty ones, seldom round.
size_t RandomSize(std::mt19937_64& rng, size_t max) {
  switch (rng() % 6) {
    case 0: return 0;
    case 1: return std::min<size_t>(max, 4);
    case 2: return rng() % std::min<size_t>(max + 1, 200);
    case 3: return rng() % std::min<size_t>(max + 1, 20000);
    case 4: return std::min<size_t>(max, 4096 * (rng() % 40));
    default: return rng() % (max + 1);
  }
}

// A shard made of pieces of `memory`, cut at random, each at a random alignment.
struct Layout {
  Bytes memory;
  std::vector<CopySegment> segments;
  Bytes expected;
};

Layout RandomLayout(std::mt19937_64& rng, size_t length) {
  Layout layout;
  layout.memory = RandomBytes(rng, length + 128);
  layout.expected.reserve(length);
  while (layout.expected.size() < length || rng() % 4 == 0) {
    const size_t size = RandomSize(rng, length - layout.expected.size());
    const uint8_t* source = layout.memory.data() + rng() % (layout.memory.size() - size + 1);
    layout.segments.push_back({size == 0 && rng() % 2 ? nullptr : source, layout.expected.size(), size});
    layout.expected.insert(layout.expected.end(), source, source + size);
  }
  return layout;
}

// Extents with the bytes of a shard.
struct Extents {
  std::vector<Fd> owned;
  std::vector<int> fds;
  std::vector<uint32_t> crcs;
  ShardSource source;
};

Extents MakeExtents(ByteSpan bytes, uint64_t extent_bytes, bool sealed) {
  Extents extents;
  for (uint64_t at = 0; at < bytes.size(); at += extent_bytes) {
    Fd fd = CreateMemfd("copy-test", extent_bytes).value();
    EXPECT_TRUE(PWriteExact(fd.get(), bytes.subspan(at, std::min<uint64_t>(extent_bytes, bytes.size() - at)), 0).ok());
    if (sealed) {
      EXPECT_TRUE(SealSize(fd.get()).ok());
    }
    extents.fds.push_back(fd.get());
    extents.owned.push_back(std::move(fd));
  }
  extents.crcs = BlockCrcs(bytes);
  extents.source = {.mapped = {}, .extents = extents.fds, .extent_bytes = extent_bytes, .length = bytes.size(),
                    .block_crcs = extents.crcs};
  return extents;
}

TEST(CopyKernel, AutoIsOneOfTheKernelsAndForcingWorks) {
  EXPECT_NE(FindCopyKernel(KernelKind::kAuto), nullptr);
  EXPECT_EQ(FindCopyKernel(KernelKind::kAuto), FindCopyKernel(KernelKind::kAuto));
  EXPECT_STREQ(CopyEngine(*FindCopyKernel(KernelKind::kPortable)).KernelName(), "portable");
  for (const CopyKernel* kernel : Kernels()) EXPECT_EQ(FindCopyKernel(kernel->kind), kernel);
}

TEST(CopyKernel, EveryAlignmentAndSizeAroundALine) {
  std::mt19937_64 rng(1);
  const Bytes source = RandomBytes(rng, 2048);
  for (const CopyKernel* kernel : Kernels()) {
    for (size_t from = 0; from < 64; from += 7) {
      for (size_t to = 0; to < 64; ++to) {
        for (const size_t size : {0, 1, 7, 8, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 1100}) {
          Bytes target(2048, 0xee);
          const uint32_t crc = kernel->copy(99, source.data() + from, target.data() + 64 + to, size);
          kernel->fence();
          Bytes expected(2048, 0xee);
          std::memcpy(expected.data() + 64 + to, source.data() + from, size);
          ASSERT_EQ(target, expected) << kernel->name << " " << from << " " << to << " " << size;
          ASSERT_EQ(crc, internal::Crc32cPortable(99, {source.data() + from, size})) << kernel->name << " " << size;
        }
      }
    }
  }
}

TEST(CopyKernel, RandomRunsOfAnyLength) {
  std::mt19937_64 rng(2);
  const Bytes source = RandomBytes(rng, 150 << 10);
  Bytes target(source.size() + 256);
  for (const CopyKernel* kernel : Kernels()) {
    for (int round = 0; round < 1000; ++round) {
      const size_t size = RandomSize(rng, 140 << 10);
      const size_t from = rng() % 4096;
      const size_t to = 1 + rng() % 100;
      const uint32_t before = static_cast<uint32_t>(rng());
      target[to - 1] = target[to + size] = 0x5a;
      const uint32_t crc = kernel->copy(before, source.data() + from, target.data() + to, size);
      kernel->fence();
      ASSERT_EQ(crc, Crc32c(before, {source.data() + from, size})) << kernel->name << " " << size;
      ASSERT_EQ(std::memcmp(target.data() + to, source.data() + from, size), 0) << kernel->name << " " << size;
      ASSERT_EQ(target[to - 1], 0x5a);
      ASSERT_EQ(target[to + size], 0x5a);
    }
  }
}

TEST(CopyIn, RandomLayoutsWithEveryKernelAndThreadCount) {
  std::mt19937_64 rng(3);
  const std::vector<const CopyKernel*> kernels = Kernels();
  std::vector<std::unique_ptr<CopyEngine>> engines;
  for (const CopyKernel* kernel : kernels) engines.push_back(std::make_unique<CopyEngine>(*kernel));
  for (int round = 0; round < 1500; ++round) {
    const size_t max = round % 50 == 0 ? 9 << 20 : round % 10 == 0 ? 3 << 20 : 40 << 10;
    const size_t length = rng() % 12 == 0 ? kBlockBytes * (max / kBlockBytes) : rng() % (max + 1);
    const Layout layout = RandomLayout(rng, length);
    const size_t shift = rng() % 2 == 0 ? 0 : rng() % 64;
    Bytes target(length + 128, 0x77);
    std::vector<uint32_t> crcs(BlockCount(length), 0);
    CopyEngine& engine = *engines[rng() % engines.size()];
    const CopyOptions options{.threads = static_cast<int>(rng() % 4)};
    const Status status = engine.CopyIn(layout.segments, {target.data() + shift, length}, crcs, options);
    ASSERT_TRUE(status.ok()) << status.ToString();
    ASSERT_EQ(Bytes(target.begin() + shift, target.begin() + shift + length), layout.expected) << engine.KernelName();
    ASSERT_EQ(crcs, BlockCrcs(layout.expected)) << engine.KernelName() << " " << length;
    for (size_t i = 0; i < shift; ++i) ASSERT_EQ(target[i], 0x77);
    for (size_t i = shift + length; i < target.size(); ++i) ASSERT_EQ(target[i], 0x77);
  }
}

TEST(CopyIn, ThousandsOfScalars) {
  std::mt19937_64 rng(4);
  const size_t count = 600000;
  const Bytes source = RandomBytes(rng, 4 * count);
  std::vector<CopySegment> segments;
  for (size_t i = 0; i < count; ++i) segments.push_back({source.data() + 4 * i, 4 * i, 4});
  Bytes target(source.size());
  std::vector<uint32_t> crcs(BlockCount(target.size()));
  CopyEngine engine;
  ASSERT_TRUE(engine.CopyIn(segments, target, crcs, {.threads = 2}).ok());
  EXPECT_EQ(target, source);
  EXPECT_EQ(crcs, BlockCrcs(source));
}

TEST(CopyIn, RefusesWhateverDoesNotTileTheShardAndWritesNothing) {
  const Bytes source(100, 1);
  const uint8_t* s = source.data();
  const uint64_t huge = ~uint64_t{0};
  const std::vector<std::vector<CopySegment>> layouts = {
      {},                                  // nothing
      {{s, 0, 99}},                        // short
      {{s, 0, 101}},                       // long
      {{s, 1, 99}},                        // gap at the start
      {{s, 0, 50}, {s, 51, 49}},           // gap
      {{s, 0, 50}, {s, 49, 51}},           // overlap
      {{s, 50, 50}, {s, 0, 50}},           // order
      {{s, 0, 100}, {s, 50, 0}},           // an empty one out of order
      {{nullptr, 0, 100}},                 // no source
      {{s, 0, 50}, {s, 50, huge - 20}},    // overflow
      {{s, 0, huge}, {s, huge, 101}},      // overflow
  };
  CopyEngine engine;
  for (size_t i = 0; i < layouts.size(); ++i) {
    Bytes target(100, 7);
    std::vector<uint32_t> crcs(1, 7);
    EXPECT_EQ(engine.CopyIn(layouts[i], target, crcs).code(), StatusCode::kInvalidArgument) << i;
    EXPECT_EQ(target, Bytes(100, 7)) << i;
    EXPECT_EQ(crcs[0], 7u) << i;
  }
  const std::vector<CopySegment> good = {{s, 0, 100}};
  Bytes target(100, 7);
  std::vector<uint32_t> crcs(2);
  EXPECT_EQ(engine.CopyIn(good, target, crcs).code(), StatusCode::kInvalidArgument);
  crcs.resize(1);
  EXPECT_EQ(engine.CopyIn(good, target, crcs, {.threads = -1}).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(engine.CopyIn(good, target, crcs, {.threads = kCopyThreadsMax + 1}).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(engine.CopyIn(good, target, crcs).ok());
  EXPECT_TRUE(engine.CopyIn({}, {}, {}).ok());
}

TEST(CopyIn, CancelStops) {
  const Bytes source(16 << 20, 3);
  Bytes target(source.size());
  std::vector<uint32_t> crcs(BlockCount(source.size()));
  const std::vector<CopySegment> segments = {{source.data(), 0, source.size()}};
  const std::atomic<bool> cancel = true;
  CopyEngine engine;
  for (const int threads : {1, 2, 3}) {
    const CopyOptions options{.threads = threads, .cancel = &cancel};
    EXPECT_EQ(engine.CopyIn(segments, target, crcs, options).code(), StatusCode::kClosed);
  }
  EXPECT_EQ(target, Bytes(target.size(), 0));
}

TEST(CopyIn, TwoCallersAndAForkedChildShareOneEngine) {
  std::mt19937_64 rng(5);
  const Layout layout = RandomLayout(rng, 20 << 20);
  CopyEngine engine;
  const auto copies_well = [&](int threads) {
    Bytes target(layout.expected.size());
    std::vector<uint32_t> crcs(BlockCount(target.size()));
    return engine.CopyIn(layout.segments, target, crcs, {.threads = threads}).ok() && target == layout.expected &&
           crcs == BlockCrcs(layout.expected);
  };
  EXPECT_TRUE(copies_well(3));
  bool other_well = false;
  std::thread other([&] { other_well = copies_well(2); });
  EXPECT_TRUE(copies_well(3));
  other.join();
  EXPECT_TRUE(other_well);

  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(copies_well(3) ? 0 : 1);
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_TRUE(copies_well(3));
}

TEST(CopyEngine, DestructionInAForkedChildLeavesTheThreadsAlone) {
  auto engine = std::make_unique<CopyEngine>();
  const Bytes source(9 << 20, 3);
  Bytes target(source.size());
  std::vector<uint32_t> crcs(BlockCount(source.size()));
  const std::vector<CopySegment> segments = {{source.data(), 0, source.size()}};
  ASSERT_TRUE(engine->CopyIn(segments, target, crcs, {.threads = 3}).ok());
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(20);  // A hang must fail.
    engine.reset();
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(CopyOut, RandomPartialRestores) {
  std::mt19937_64 rng(6);
  CopyEngine engine;
  for (int round = 0; round < 250; ++round) {
    const size_t length = rng() % (round % 25 == 0 ? 9 << 20 : 3 << 20);
    const Bytes shard = RandomBytes(rng, length);
    const bool sealed = rng() % 2 == 0;  // Sealed extents are mapped, others are read.
    Extents extents = MakeExtents(shard, kBlockBytes * (1 + rng() % 3), sealed);
    if (rng() % 3 == 0) extents.source.mapped = shard;
    const size_t count = rng() % 40;
    std::vector<ScatterSegment> segments;
    std::vector<Bytes> targets;
    std::vector<bool> touched(extents.crcs.size(), false);
    for (size_t i = 0; i < count; ++i) {
      const uint64_t offset = rng() % (length + 1);
      const uint64_t size = RandomSize(rng, length - offset);
      targets.emplace_back(size + 2, 0x31);
      segments.push_back({offset, size, targets.back().data() + 1});
      if (size == 0) continue;
      for (uint64_t b = offset / kBlockBytes; b <= (offset + size - 1) / kBlockBytes; ++b) touched[b] = true;
    }
    const CopyOptions options{.threads = static_cast<int>(rng() % 4), .verify_all = rng() % 4 == 0};
    const CopyOutReport report = engine.CopyOut(extents.source, segments, options);
    ASSERT_TRUE(report.status.ok()) << report.status.ToString();
    const auto wanted_blocks = options.verify_all ? static_cast<ptrdiff_t>(touched.size())
                                                  : std::count(touched.begin(), touched.end(), true);
    EXPECT_EQ(static_cast<ptrdiff_t>(report.blocks_verified), wanted_blocks);
    EXPECT_EQ(report.target_modified, std::count(touched.begin(), touched.end(), true) != 0);
    EXPECT_TRUE(report.corrupt_blocks.empty());
    for (size_t i = 0; i < count; ++i) {
      ASSERT_EQ(std::memcmp(targets[i].data() + 1, shard.data() + segments[i].offset, segments[i].size), 0) << i;
      ASSERT_EQ(targets[i].front(), 0x31);
      ASSERT_EQ(targets[i].back(), 0x31);
    }
  }
}

TEST(CopyOut, OneChangedBitAnywhereInATouchedBlockIsFound) {  // I-8
  std::mt19937_64 rng(7);
  const Bytes shard = RandomBytes(rng, (5 << 20) + 12345);
  CopyEngine engine;
  for (const bool sealed : {true, false}) {
    Extents extents = MakeExtents(shard, 2 * kBlockBytes, sealed);
    for (int round = 0; round < 60; ++round) {
      const uint64_t at = round == 0 ? 0 : round == 1 ? shard.size() - 1 : rng() % shard.size();
      const uint64_t bad_block = at / kBlockBytes;
      const uint8_t bad = shard[at] ^ static_cast<uint8_t>(1u << rng() % 8);
      const int fd = extents.fds[at / extents.source.extent_bytes];
      ASSERT_TRUE(PWriteExact(fd, {&bad, 1}, at % extents.source.extent_bytes).ok());

      // One byte of the bad block is wanted, seldom the changed one; and a whole other block.
      const uint64_t good_block = (bad_block + 1) % extents.crcs.size();
      const uint64_t good_size = std::min<uint64_t>(kBlockBytes, shard.size() - good_block * kBlockBytes);
      const uint64_t bad_size = std::min<uint64_t>(kBlockBytes, shard.size() - bad_block * kBlockBytes);
      uint8_t one = 0;
      Bytes whole(good_size);
      const std::vector<ScatterSegment> segments = {{bad_block * kBlockBytes + rng() % bad_size, 1, &one},
                                                    {good_block * kBlockBytes, good_size, whole.data()}};
      const CopyOutReport report = engine.CopyOut(extents.source, segments, {.threads = 1 + round % 3});
      EXPECT_EQ(report.status.code(), StatusCode::kCorrupt);
      EXPECT_NE(report.status.message().find(std::to_string(bad_block)), std::string::npos) << report.status.message();
      EXPECT_EQ(report.corrupt_blocks, std::vector<uint64_t>{bad_block});
      EXPECT_EQ(report.blocks_verified, 1u);
      EXPECT_TRUE(report.target_modified);
      EXPECT_EQ(std::memcmp(whole.data(), shard.data() + good_block * kBlockBytes, good_size), 0);

      // Nothing of the bad block is wanted: only verify_all finds it, and without changing a target.
      EXPECT_TRUE(engine.CopyOut(extents.source, std::span(segments).subspan(1)).status.ok());
      const CopyOutReport scan = engine.CopyOut(extents.source, {}, {.verify_all = true});
      EXPECT_EQ(scan.corrupt_blocks, std::vector<uint64_t>{bad_block});
      EXPECT_FALSE(scan.target_modified);

      // What the caller then asks another copy for.
      const std::vector<ScatterSegment> missing = SegmentsInBlocks(segments, report.corrupt_blocks);
      ASSERT_EQ(missing.size(), 1u);
      EXPECT_EQ(missing[0].target, &one);
      ASSERT_TRUE(PWriteExact(fd, {shard.data() + at, 1}, at % extents.source.extent_bytes).ok());
    }
  }
}

TEST(CopyOut, ChecksumsOfAnotherShardNeverPass) {
  std::mt19937_64 rng(8);
  const Bytes shard = RandomBytes(rng, 3 << 20);
  Extents extents = MakeExtents(shard, kBlockBytes, true);
  for (uint32_t& crc : extents.crcs) ++crc;
  CopyEngine engine;
  const CopyOutReport report = engine.CopyOut(extents.source, {}, {.verify_all = true});
  EXPECT_EQ(report.corrupt_blocks, (std::vector<uint64_t>{0, 1, 2}));
  EXPECT_EQ(report.blocks_verified, 0u);
}

TEST(CopyOut, ShortFilesAreCorruptNeverZeros) {  // I-8, I-26
  std::mt19937_64 rng(9);
  const Bytes shard(4 << 20, 0);  // Zeros on purpose: zero-filling would give the right checksum.
  Extents extents = MakeExtents(shard, 2 * kBlockBytes, false);
  ASSERT_EQ(ftruncate(extents.fds[1], kBlockBytes + 1000), 0);
  Bytes target(shard.size(), 9);
  const std::vector<ScatterSegment> segments = {{0, target.size(), target.data()}};
  CopyEngine engine;
  for (const int threads : {1, 2}) {
    const CopyOutReport report = engine.CopyOut(extents.source, segments, {.threads = threads});
    EXPECT_EQ(report.status.code(), StatusCode::kCorrupt);
    EXPECT_EQ(report.corrupt_blocks, std::vector<uint64_t>{3});
    EXPECT_EQ(report.blocks_verified, 3u);
  }
  EXPECT_EQ(target.back(), 9);
}

TEST(CopyOut, AReadErrorIsNotCalledCorruption) {  // I-31
  const Bytes shard(2 << 20, 1);
  Extents extents = MakeExtents(shard, kBlockBytes, true);
  extents.fds[1] = -1;
  CopyEngine engine;
  const CopyOutReport report = engine.CopyOut(extents.source, {}, {.verify_all = true});
  EXPECT_FALSE(report.status.ok());
  EXPECT_NE(report.status.code(), StatusCode::kCorrupt);
  EXPECT_TRUE(report.corrupt_blocks.empty());
}

TEST(CopyOut, RefusesNonsenseAndTouchesNothing) {
  const Bytes shard(3 << 20, 1);
  const Extents extents = MakeExtents(shard, kBlockBytes, true);
  CopyEngine engine;
  Bytes target(10, 5);
  const uint64_t length = shard.size();
  const std::vector<ScatterSegment> bad_segments = {{length, 1, target.data()},
                                                    {length - 1, 2, target.data()},
                                                    {length + 1, 0, target.data()},
                                                    {5, ~uint64_t{0}, target.data()},
                                                    {0, 1, nullptr}};
  for (const ScatterSegment& bad : bad_segments) {
    const std::vector<ScatterSegment> segments = {{0, 10, target.data()}, bad};
    const CopyOutReport report = engine.CopyOut(extents.source, segments);
    EXPECT_EQ(report.status.code(), StatusCode::kInvalidArgument);
    EXPECT_FALSE(report.target_modified);
  }
  const std::vector<ScatterSegment> good = {{0, 10, target.data()}};
  const auto refused = [&](const ShardSource& source) {
    return engine.CopyOut(source, good).status.code() == StatusCode::kInvalidArgument;
  };
  ShardSource source = extents.source;
  source.block_crcs = source.block_crcs.first(2);
  EXPECT_TRUE(refused(source));
  source = extents.source;
  source.extents = source.extents.first(2);
  EXPECT_TRUE(refused(source));
  source = extents.source;
  source.extent_bytes = kBlockBytes + 4096;
  EXPECT_TRUE(refused(source));
  source.extent_bytes = 0;
  EXPECT_TRUE(refused(source));
  source = extents.source;
  source.mapped = ByteSpan(shard).first(length - 1);
  EXPECT_TRUE(refused(source));
  EXPECT_EQ(target, Bytes(10, 5));
}

TEST(CopyOut, CancelStops) {
  const Bytes shard(8 << 20, 1);
  const Extents extents = MakeExtents(shard, 4 * kBlockBytes, true);
  Bytes target(shard.size(), 5);
  const std::vector<ScatterSegment> segments = {{0, target.size(), target.data()}};
  const std::atomic<bool> cancel = true;
  CopyEngine engine;
  const CopyOutReport report = engine.CopyOut(extents.source, segments, {.cancel = &cancel});
  EXPECT_EQ(report.status.code(), StatusCode::kClosed);
  EXPECT_FALSE(report.target_modified);
}

TEST(SegmentsInBlocks, CutsAtBlocks) {
  Bytes memory(4 << 20);
  const std::vector<ScatterSegment> segments = {{100, 3 * kBlockBytes, memory.data()}, {kBlockBytes, 0, memory.data()}};
  const std::vector<uint64_t> blocks = {0, 2, 3, 7};
  const std::vector<ScatterSegment> parts = SegmentsInBlocks(segments, blocks);
  ASSERT_EQ(parts.size(), 3u);
  EXPECT_EQ(parts[0].offset, 100u);
  EXPECT_EQ(parts[0].size, kBlockBytes - 100);
  EXPECT_EQ(parts[0].target, memory.data());
  EXPECT_EQ(parts[1].offset, 2 * kBlockBytes);
  EXPECT_EQ(parts[1].size, kBlockBytes);
  EXPECT_EQ(parts[1].target, memory.data() + 2 * kBlockBytes - 100);
  EXPECT_EQ(parts[2].offset, 3 * kBlockBytes);
  EXPECT_EQ(parts[2].size, 100u);
}

}  // namespace
}  // namespace sp
