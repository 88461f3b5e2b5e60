// What every ObjectStore has to do, as one GoogleTest suite. A store joins with a StoreFactory:
//
//   INSTANTIATE_TEST_SUITE_P(S3, ObjectStoreConformance,
//                            testing::Values(StoreFactory{"Gateway", [] { return std::make_unique<MyPlace>(); }}), StoreName);
//
// Include this in one .cc file per test program: it defines tests. No test sleeps. For stores that cost something: the largest object has 20 MiB, the
// most keys are 1,003.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/crc32c.h"
#include "durable/object_store.h"
#include "durable/verify.h"
#include "format/constants.h"
#include "os/test_util.h"

namespace sp {

// An empty place for objects, for one test, and a store in it. Emptied, if that matters, when it goes.
class ConformancePlace {
 public:
  virtual ~ConformancePlace() = default;
  virtual ObjectStore& store() = 0;
  virtual const Clock& clock() = 0;  // The store's.
  // What a writer that died in the middle of Put(key) leaves. False: cannot be played here, the test is skipped.
  virtual bool LeaveUnfinishedUpload(const std::string& /*key*/) { return false; }
};

struct StoreFactory {
  std::string name;  // Letters and digits.
  std::function<std::unique_ptr<ConformancePlace>()> make;
  std::function<std::string()> why_not = {};  // Why this store cannot be tested here: all tests are skipped. Empty: it can.
};

inline std::string StoreName(const testing::TestParamInfo<StoreFactory>& info) { return info.param.name; }
inline void PrintTo(const StoreFactory& factory, std::ostream* out) { *out << factory.name; }

namespace conformance {

// Bytes that differ from block to block and from seed to seed.
inline std::vector<uint8_t> Bytes(size_t size, uint32_t seed = 1) {
  std::vector<uint8_t> bytes(size);
  uint32_t state = seed * 2654435761u + 1;
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>((state = state * 1664525 + 1013904223) >> 24);
  return bytes;
}

}  // namespace conformance

class ObjectStoreConformance : public testing::TestWithParam<StoreFactory> {
 protected:
  void SetUp() override {
    if (const std::string why_not = GetParam().why_not ? GetParam().why_not() : ""; !why_not.empty()) GTEST_SKIP() << why_not;
    place_ = GetParam().make();
    ASSERT_NE(place_, nullptr) << "no place for the store " << GetParam().name;
  }

  ObjectStore& store() { return place_->store(); }

  Status Put(const std::string& key, ByteSpan content) { return store().Put(key, PutSource::OfMemory(content), {}); }

  Result<std::vector<uint8_t>> Read(const std::string& key) {
    SP_ASSIGN_OR_RETURN(const ObjectInfo info, store().Head(key, {}));
    std::vector<uint8_t> content(info.size_bytes);
    SP_RETURN_IF_ERROR(store().ReadRange(key, 0, content, {}));
    return content;
  }

  // All keys under `prefix`, over all pages.
  Result<std::vector<std::string>> Keys(const std::string& prefix) {
    SP_ASSIGN_OR_RETURN(const std::vector<ObjectInfo> objects, ListAll(store(), prefix, {}));
    std::vector<std::string> keys;
    for (const ObjectInfo& info : objects) keys.push_back(info.key);
    return keys;
  }

  // As after nothing at all: no object, no key in the list, no upload.
  void ExpectNothing(const std::string& key) {
    SP_EXPECT_CODE(kNotFound, store().Head(key, {}));
    const auto keys = Keys("");
    ASSERT_TRUE(keys.has_value()) << keys.error().ToString();
    EXPECT_EQ(std::ranges::count(*keys, key), 0);
    const auto uploads = store().ListUploads("", {});
    ASSERT_TRUE(uploads.has_value()) << uploads.error().ToString();
    EXPECT_EQ(uploads->size(), 0u);
  }

  std::unique_ptr<ConformancePlace> place_;
};

TEST_P(ObjectStoreConformance, ProbeFindsConditionalCreateAndLeavesNoKeys) {
  SP_ASSERT_OK_AND_ASSIGN(const StoreAbilities abilities, store().Probe({}));
  EXPECT_TRUE(abilities.conditional_create);
  SP_ASSERT_OK_AND_ASSIGN(const StoreAbilities again, store().Probe({}));
  EXPECT_EQ(again, abilities);
  EXPECT_EQ(Keys("").value(), std::vector<std::string>{});
}

TEST_P(ObjectStoreConformance, PutAndReadBackInAllSizes) {
  const size_t sizes[] = {0, 1, kBlockBytes - 1, kBlockBytes, kBlockBytes + 1, 5 * kBlockBytes + 17, 20 * kBlockBytes};
  for (size_t i = 0; i < std::size(sizes); ++i) {
    const std::string key = "ns/step-7/attempt/rank-" + std::to_string(i) + ".safetensors";
    const std::vector<uint8_t> content = conformance::Bytes(sizes[i], static_cast<uint32_t>(i + 1));
    const PutSource source = PutSource::OfMemory(content);
    ASSERT_EQ(source.size_bytes, sizes[i]);
    uint64_t progress = 0;
    SP_ASSERT_OK(store().Put(key, source, {.progress = [&](uint64_t bytes) { progress += bytes; }}));
    EXPECT_EQ(progress, sizes[i]);
    SP_ASSERT_OK_AND_ASSIGN(const ObjectInfo info, store().Head(key, {}));
    EXPECT_EQ(info.key, key);
    EXPECT_EQ(info.size_bytes, sizes[i]);
    if (info.crc32c) {
      EXPECT_EQ(*info.crc32c, Crc32c(0, content));
    }
    EXPECT_TRUE(Read(key).value() == content) << "size " << sizes[i];
    SP_ASSERT_OK(VerifyObject(store(), key, content.size(), source.block_crcs, {}));
  }
  EXPECT_EQ(Keys("ns/step-7/").value().size(), std::size(sizes));
}

TEST_P(ObjectStoreConformance, APutWithoutBytesIsAnEmptyObject) {
  SP_ASSERT_OK(store().Put("empty", PutSource{}, {}));
  EXPECT_EQ(store().Head("empty", {}).value().size_bytes, 0u);
}

TEST_P(ObjectStoreConformance, SourcesThatBreakTheirRulesAreRefused) {
  const std::vector<uint8_t> content = conformance::Bytes(2 * kBlockBytes);
  PutSource source = PutSource::OfMemory(content);
  source.block_crcs.pop_back();
  SP_EXPECT_CODE(kInvalidArgument, store().Put("key", source, {}));
  source = PutSource::OfMemory(content);
  source.read = [](uint64_t, MutableByteSpan) { return Status(StatusCode::kUnavailable, "the memory cannot be read"); };
  SP_EXPECT_CODE(kUnavailable, store().Put("key", source, {}));
  ExpectNothing("key");
}

TEST_P(ObjectStoreConformance, PutLeavesWhatIsThere) {
  const std::vector<uint8_t> first = conformance::Bytes(kBlockBytes + 5, 1);
  SP_ASSERT_OK(Put("a/key", first));
  SP_ASSERT_OK(Put("a/key", first));
  // The same length: looks done, unless the store tells a checksum. VerifyObject tells in any case.
  const Status other = Put("a/key", conformance::Bytes(kBlockBytes + 5, 2));
  EXPECT_TRUE(other.ok() || other.code() == StatusCode::kCorrupt) << other.ToString();
  SP_EXPECT_CODE(kCorrupt, Put("a/key", conformance::Bytes(kBlockBytes + 6, 1)));
  SP_EXPECT_CODE(kCorrupt, Put("a/key", conformance::Bytes(0)));
  EXPECT_TRUE(Read("a/key").value() == first);
  EXPECT_EQ(store().ListUploads("", {}).value().size(), 0u);
}

TEST_P(ObjectStoreConformance, CreateMakesOneObjectOnce) {
  SP_ASSERT_OK_AND_ASSIGN(const bool first, store().Create("ns/manifest.json", AsBytes("first"), {}));
  EXPECT_TRUE(first);
  SP_ASSERT_OK_AND_ASSIGN(const bool second, store().Create("ns/manifest.json", AsBytes("second, longer"), {}));
  EXPECT_FALSE(second);
  EXPECT_EQ(AsText(Read("ns/manifest.json").value()), "first");
  SP_ASSERT_OK(store().Delete("ns/manifest.json", {}));
  SP_ASSERT_OK_AND_ASSIGN(const bool third, store().Create("ns/manifest.json", {}, {}));
  EXPECT_TRUE(third);
  EXPECT_EQ(store().Head("ns/manifest.json", {}).value().size_bytes, 0u);
}

// F69: of those who race for a manifest exactly one wins, and what is there is his.
TEST_P(ObjectStoreConformance, OfSixteenRacingCreatesExactlyOneWins) {
  constexpr int kRacers = 16;
  for (int round = 0; round < 4; ++round) {
    const std::string key = "race/round-" + std::to_string(round) + "/manifest.json";
    std::atomic<int> ready = 0;
    std::vector<Result<bool>> results(kRacers, false);
    std::vector<std::thread> threads;
    for (int i = 0; i < kRacers; ++i) {
      threads.emplace_back([&, i] {
        const std::string content = "racer " + std::to_string(i);
        ++ready;
        while (ready < kRacers) std::this_thread::yield();
        results[static_cast<size_t>(i)] = store().Create(key, AsBytes(content), {});
      });
    }
    for (std::thread& thread : threads) thread.join();
    int winners = 0, winner = -1;
    for (int i = 0; i < kRacers; ++i) {
      const Result<bool>& result = results[static_cast<size_t>(i)];
      ASSERT_TRUE(result.has_value()) << result.error().ToString();
      if (!*result) continue;
      ++winners;
      winner = i;
    }
    EXPECT_EQ(winners, 1);
    EXPECT_EQ(AsText(Read(key).value()), "racer " + std::to_string(winner));
  }
  EXPECT_EQ(store().ListUploads("", {}).value().size(), 0u);
}

// F69: two daemons drain one shard.
TEST_P(ObjectStoreConformance, RacingPutsOfTheSameBytesAllSucceed) {
  const std::vector<uint8_t> content = conformance::Bytes(3 * kBlockBytes);
  std::vector<Status> results(4);
  std::vector<std::thread> threads;
  for (Status& result : results) threads.emplace_back([&] { result = Put("a/b/shard", content); });
  for (std::thread& thread : threads) thread.join();
  for (const Status& result : results) SP_EXPECT_CODE(kOk, result);
  EXPECT_TRUE(Read("a/b/shard").value() == content);
  EXPECT_EQ(store().ListUploads("", {}).value().size(), 0u);
}

TEST_P(ObjectStoreConformance, RangesAreReadAtEveryEdge) {
  const std::vector<uint8_t> content = conformance::Bytes(2 * kBlockBytes + 3);
  SP_ASSERT_OK(Put("key", content));
  const uint64_t size = content.size();
  const std::pair<uint64_t, uint64_t> ranges[] = {
      {0, 0}, {0, 1}, {0, size}, {1, size - 1}, {size - 1, 1}, {size, 0}, {kBlockBytes - 1, 2}, {kBlockBytes, kBlockBytes}, {2 * kBlockBytes, 3}};
  for (const auto& [offset, length] : ranges) {
    std::vector<uint8_t> out(length, 0xee);
    SP_ASSERT_OK(store().ReadRange("key", offset, out, {}));
    EXPECT_TRUE(std::ranges::equal(out, ByteSpan(content).subspan(offset, length))) << offset << " " << length;
  }
  const std::pair<uint64_t, uint64_t> beyond[] = {{0, size + 1}, {size - 1, 2}, {size, 1}, {size + 1, 1}, {uint64_t{1} << 40, 1}};
  for (const auto& [offset, length] : beyond) {
    std::vector<uint8_t> out(length);
    SP_EXPECT_CODE(kCorrupt, store().ReadRange("key", offset, out, {}));
  }
  SP_ASSERT_OK(Put("empty", {}));
  std::vector<uint8_t> byte(1);
  SP_EXPECT_CODE(kCorrupt, store().ReadRange("empty", 0, byte, {}));
  SP_ASSERT_OK(store().ReadRange("empty", 0, {}, {}));
}

TEST_P(ObjectStoreConformance, WhatIsMissingIsNotFound) {
  std::vector<uint8_t> out(1);
  SP_ASSERT_OK(Put("a/b", conformance::Bytes(1)));
  for (const std::string key : {"none", "a", "a/c", "no/such/folder/key", "a/b/c"}) {
    SP_EXPECT_CODE(kNotFound, store().Head(key, {}));
    SP_EXPECT_CODE(kNotFound, store().ReadRange(key, 0, out, {}));
    SP_EXPECT_CODE(kOk, store().Delete(key, {}));
  }
  EXPECT_EQ(Keys("none").value(), std::vector<std::string>{});
  EXPECT_EQ(Keys("").value(), std::vector<std::string>{"a/b"});
  const auto missing = store().Head("no/such/key", {});
  EXPECT_NE(missing.error().message().find(store().url().substr(0, store().url().find('?')) + "/no/such/key"), std::string::npos) << missing.error().ToString();
}

TEST_P(ObjectStoreConformance, DeleteRemovesOneObject) {
  for (const std::string key : {"a/b", "a/bb", "a/c/d"}) SP_ASSERT_OK(Put(key, conformance::Bytes(10)));
  SP_ASSERT_OK(store().Delete("a/b", {}));
  SP_ASSERT_OK(store().Delete("a/b", {}));
  SP_EXPECT_CODE(kNotFound, store().Head("a/b", {}));
  EXPECT_EQ(Keys("").value(), (std::vector<std::string>{"a/bb", "a/c/d"}));
  SP_ASSERT_OK(Put("a/b", conformance::Bytes(3)));
  EXPECT_EQ(store().Head("a/b", {}).value().size_bytes, 3u);
}

TEST_P(ObjectStoreConformance, KeysMayHaveAllAllowedBytes) {
  const std::vector<std::string> keys = {".hidden",     "..a/...",  "UPPER/lower/0", "_=+@%-.", "a%2Fb",         "a%2fb", "a=1/b+c@d", "-dash",
                                         "very-" + std::string(200, 'l') + "/" + std::string(200, 'm')};
  for (size_t i = 0; i < keys.size(); ++i) SP_ASSERT_OK(Put(keys[i], conformance::Bytes(i + 1, static_cast<uint32_t>(i))));
  for (size_t i = 0; i < keys.size(); ++i) {
    EXPECT_TRUE(Read(keys[i]).value() == conformance::Bytes(i + 1, static_cast<uint32_t>(i))) << keys[i];
    EXPECT_EQ(Keys(keys[i]).value(), std::vector<std::string>{keys[i]});
  }
  std::vector<std::string> sorted = keys;
  std::ranges::sort(sorted);
  EXPECT_EQ(Keys("").value(), sorted);
}

TEST_P(ObjectStoreConformance, KeysThatLeaveTheBaseAreRefused) {
  const std::vector<uint8_t> content = conformance::Bytes(10);
  std::vector<uint8_t> out(1);
  for (const std::string& key : {std::string(), std::string("/a"), std::string("a/"), std::string("a//b"), std::string("."), std::string(".."),
                                std::string("../a"), std::string("a/../b"), std::string("a/.."), std::string("a/./b"), std::string("a b"),
                                std::string("a\\b"), std::string("a\0b", 3), std::string("a\nb"), std::string("\xc3\xa4"), std::string("a?b"),
                                std::string(901, 'a')}) {
    SP_EXPECT_CODE(kInvalidArgument, Put(key, content));
    SP_EXPECT_CODE(kInvalidArgument, store().Create(key, content, {}));
    SP_EXPECT_CODE(kInvalidArgument, store().Head(key, {}));
    SP_EXPECT_CODE(kInvalidArgument, store().ReadRange(key, 0, out, {}));
    SP_EXPECT_CODE(kInvalidArgument, store().Delete(key, {}));
  }
  for (const std::string prefix : {"/a", "a//b", "../a", "a/../b", "a b"}) {
    SP_EXPECT_CODE(kInvalidArgument, store().List(prefix, "", {}));
    SP_EXPECT_CODE(kInvalidArgument, store().ListUploads(prefix, {}));
  }
  EXPECT_EQ(Keys("").value(), std::vector<std::string>{});
}

// A prefix is a text: "a/b" finds "a/bc" as well as "a/b/c". The order is that of the bytes of whole keys, in which "a.b" comes before "a/b".
TEST_P(ObjectStoreConformance, ListsByPrefixInOrderOfBytes) {
  std::vector<std::string> keys = {"a.b", "a/b/c", "a/bc", "a/b.c", "a0", "A", "ab/c", "a-b", "b/a/a/a/a"};
  for (const std::string& key : keys) SP_ASSERT_OK(Put(key, conformance::Bytes(key.size())));
  std::ranges::sort(keys);
  for (const std::string prefix : {"", "a", "a/", "a/b", "a/b/", "a/b/c", "a/b/cd", "a.", "b/a/a", "c", "A"}) {
    std::vector<std::string> wanted;
    std::ranges::copy_if(keys, std::back_inserter(wanted), [&](const std::string& key) { return key.starts_with(prefix); });
    EXPECT_EQ(Keys(prefix).value(), wanted) << prefix;
  }
  SP_ASSERT_OK_AND_ASSIGN(const ListPage page, store().List("a/bc", "", {}));
  ASSERT_EQ(page.objects.size(), 1u);
  EXPECT_EQ(page.objects[0].size_bytes, 4u);
}

TEST_P(ObjectStoreConformance, ListsMoreThanAPage) {
  constexpr size_t kKeys = 1003, kThreads = 8;
  std::vector<std::string> keys;
  for (size_t i = 0; i < kKeys; ++i) keys.push_back("many/step-" + std::to_string(i % 7) + "/rank-" + std::to_string(i));
  std::vector<std::thread> threads;
  std::atomic<size_t> next = 0, made = 0;
  for (size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      for (size_t i = next++; i < kKeys; i = next++) {
        const auto created = store().Create(keys[i], {}, {});
        made += created && *created;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_EQ(made, kKeys);
  SP_ASSERT_OK(Put("many0", {}));
  std::ranges::sort(keys);
  SP_ASSERT_OK_AND_ASSIGN(const ListPage first, store().List("many/", "", {}));
  EXPECT_LE(first.objects.size(), 1000u);
  EXPECT_FALSE(first.next.empty());
  EXPECT_EQ(Keys("many/").value(), keys);
  // What goes and comes between two pages moves nothing else.
  SP_ASSERT_OK(store().Delete(first.objects.front().key, {}));
  SP_ASSERT_OK_AND_ASSIGN(const ListPage second, store().List("many/", first.next, {}));
  EXPECT_EQ(first.objects.size() + second.objects.size(), kKeys);
  EXPECT_EQ(second.next, "");
}

TEST_P(ObjectStoreConformance, ACancelledCallDoesNothing) {
  const std::vector<uint8_t> content = conformance::Bytes(10);
  std::vector<uint8_t> out(1);
  SP_ASSERT_OK(Put("there", content));
  const std::atomic<bool> cancelled = true;
  const CallLimits limits{.cancelled = &cancelled};
  SP_EXPECT_CODE(kClosed, store().Put("key", PutSource::OfMemory(content), limits));
  SP_EXPECT_CODE(kClosed, store().Create("key", content, limits));
  SP_EXPECT_CODE(kClosed, store().ReadRange("there", 0, out, limits));
  SP_EXPECT_CODE(kClosed, store().Head("there", limits));
  SP_EXPECT_CODE(kClosed, store().List("", "", limits));
  SP_EXPECT_CODE(kClosed, store().Delete("there", limits));
  SP_EXPECT_CODE(kClosed, store().ListUploads("", limits));
  SP_EXPECT_CODE(kClosed, store().Probe(limits));
  ExpectNothing("key");
  EXPECT_TRUE(Read("there").value() == content);
}

TEST_P(ObjectStoreConformance, APutCancelledOnTheWayLeavesNothing) {
  const std::vector<uint8_t> content = conformance::Bytes(20 * kBlockBytes);
  std::atomic<bool> cancelled = false;
  const CallLimits limits{.cancelled = &cancelled, .progress = [&](uint64_t) { cancelled = true; }};
  SP_EXPECT_CODE(kClosed, store().Put("a/key", PutSource::OfMemory(content), limits));
  ExpectNothing("a/key");
  SP_ASSERT_OK(Put("a/key", content));
}

TEST_P(ObjectStoreConformance, ACallAfterItsDeadlineDoesNothing) {
  const std::vector<uint8_t> content = conformance::Bytes(10);
  std::vector<uint8_t> out(1);
  SP_ASSERT_OK(Put("there", content));
  const CallLimits limits{.deadline = place_->clock().Now() - 1};
  SP_EXPECT_CODE(kDeadline, store().Put("key", PutSource::OfMemory(content), limits));
  SP_EXPECT_CODE(kDeadline, store().Create("key", content, limits));
  SP_EXPECT_CODE(kDeadline, store().ReadRange("there", 0, out, limits));
  SP_EXPECT_CODE(kDeadline, store().Head("there", limits));
  SP_EXPECT_CODE(kDeadline, store().List("", "", limits));
  SP_EXPECT_CODE(kDeadline, store().Delete("there", limits));
  SP_EXPECT_CODE(kDeadline, store().ListUploads("", limits));
  ExpectNothing("key");
  EXPECT_TRUE(Read("there").value() == content);
}

// I-23: what was sealed is what is stored, or somebody says so: the store, or whoever reads back.
TEST_P(ObjectStoreConformance, MemoryThatDoesNotMatchItsSealIsFound) {
  SP_ASSERT_OK_AND_ASSIGN(const StoreAbilities abilities, store().Probe({}));
  std::vector<uint8_t> content = conformance::Bytes(3 * kBlockBytes + 100);
  const std::vector<uint32_t> sealed = PutSource::OfMemory(content).block_crcs;
  content[kBlockBytes + 7] ^= 0x10;
  const Status put = store().Put("key", PutSource::OfMemory(content, sealed), {});
  if (abilities.verifies_checksums || !put.ok()) {
    EXPECT_EQ(put.code(), StatusCode::kCorrupt) << put.ToString();
    ExpectNothing("key");
  } else {
    SP_EXPECT_CODE(kCorrupt, VerifyObject(store(), "key", content.size(), sealed, {}));
  }
}

// F61: what a dead writer left is found, by prefix, and goes when told to; the object can be put afterwards.
TEST_P(ObjectStoreConformance, UnfinishedUploadsAreListedAndAborted) {
  if (!place_->LeaveUnfinishedUpload("ns/step-1/attempt/rank-0")) GTEST_SKIP() << "this place cannot leave an unfinished upload";
  ASSERT_TRUE(place_->LeaveUnfinishedUpload("ns/step-2/attempt/rank-0"));
  SP_EXPECT_CODE(kNotFound, store().Head("ns/step-1/attempt/rank-0", {}));
  EXPECT_EQ(Keys("").value(), std::vector<std::string>{});
  SP_ASSERT_OK_AND_ASSIGN(const std::vector<UnfinishedUpload> all, store().ListUploads("", {}));
  EXPECT_EQ(all.size(), 2u);
  SP_ASSERT_OK_AND_ASSIGN(const std::vector<UnfinishedUpload> one, store().ListUploads("ns/step-1/attempt/rank-", {}));
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(one[0].key, "ns/step-1/attempt/rank-0");
  EXPECT_FALSE(one[0].id.empty());
  EXPECT_EQ(store().ListUploads("ns/step-3", {}).value().size(), 0u);
  SP_ASSERT_OK(Put("ns/step-1/attempt/rank-0", conformance::Bytes(10)));
  SP_ASSERT_OK(store().AbortUpload(one[0], {}));
  SP_ASSERT_OK(store().AbortUpload(one[0], {}));
  EXPECT_EQ(store().ListUploads("", {}).value().size(), 1u);
  EXPECT_TRUE(Read("ns/step-1/attempt/rank-0").value() == conformance::Bytes(10));
}

}  // namespace sp
