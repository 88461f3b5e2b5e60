// VerifyObject: I-23, row F66.
#include "durable/verify.h"

#include <gtest/gtest.h>

#include "base/crc32c.h"
#include "durable/faulty_store.h"
#include "durable/memory_store.h"
#include "format/constants.h"
#include "os/test_util.h"

namespace sp {
namespace {

class Verify : public testing::Test {
 protected:
  // 20 blocks and a bit: three windows.
  Verify() : bytes_(20 * kBlockBytes + 9) {
    for (size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<uint8_t>(i * 7 + i / kBlockBytes);
    for (size_t at = 0; at < bytes_.size(); at += kBlockBytes) {
      crcs_.push_back(Crc32c(0, ByteSpan(bytes_).subspan(at, std::min<size_t>(kBlockBytes, bytes_.size() - at))));
    }
  }
  Status Put() { return store_.Put("ns/rank-0", {{bytes_}, crcs_}, {}); }
  Status Check() { return VerifyObject(store_, "ns/rank-0", bytes_.size(), crcs_, {}); }

  ManualClock clock_;
  MemoryStore memory_{clock_};
  FaultyStore store_{memory_, clock_};
  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> crcs_;
};

TEST_F(Verify, AWholeObjectPassesAndEveryByteIsCounted) {
  SP_ASSERT_OK(Put());
  uint64_t compared = 0;
  SP_ASSERT_OK(VerifyObject(store_, "ns/rank-0", bytes_.size(), crcs_, {.progress = [&](uint64_t bytes) { compared += bytes; }}));
  EXPECT_EQ(compared, bytes_.size());
  EXPECT_EQ(store_.calls(StoreCall::kReadRange), 3u);
  SP_ASSERT_OK(store_.Put("empty", {}, {}));
  SP_ASSERT_OK(VerifyObject(store_, "empty", 0, {}, {}));
}

TEST_F(Verify, AnyBlockThatDiffersIsNamed) {
  for (const uint64_t at : {uint64_t{0}, 8 * kBlockBytes - 1, 8 * kBlockBytes, 20 * kBlockBytes + 8}) {
    store_.Clear();
    store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kFlipStored, .at = at});
    SP_ASSERT_OK(Put());
    const Status status = Check();
    EXPECT_EQ(status.code(), StatusCode::kCorrupt);
    EXPECT_NE(status.message().find("/ns/rank-0: block " + std::to_string(at / kBlockBytes) + " "), std::string::npos) << status.message();
    SP_ASSERT_OK(store_.Delete("ns/rank-0", {}));
  }
}

TEST_F(Verify, AnotherLengthIsFoundWithoutReading) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kTruncateStored});
  SP_ASSERT_OK(Put());
  SP_EXPECT_CODE(kCorrupt, Check());
  EXPECT_EQ(store_.calls(StoreCall::kReadRange), 0u);
}

TEST_F(Verify, WhatIsWrongOnTheWayIsCorruptOnceOnly) {
  SP_ASSERT_OK(Put());
  store_.Add({.call = StoreCall::kReadRange, .kind = FaultKind::kFlipRead, .nth = 2});
  SP_EXPECT_CODE(kCorrupt, Check());
  SP_EXPECT_CODE(kOk, Check());
}

TEST_F(Verify, PassesOnWhatTheStoreSays) {
  SP_EXPECT_CODE(kNotFound, Check());
  SP_ASSERT_OK(Put());
  store_.Add({.call = StoreCall::kHead, .kind = FaultKind::kFailBefore});
  SP_EXPECT_CODE(kUnavailable, Check());
  store_.Add({.call = StoreCall::kReadRange, .kind = FaultKind::kHang, .nth = 2});
  SP_EXPECT_CODE(kDeadline, Check());
  const std::atomic<bool> cancelled = true;
  SP_EXPECT_CODE(kClosed, VerifyObject(store_, "ns/rank-0", bytes_.size(), crcs_, {.cancelled = &cancelled}));
  SP_EXPECT_CODE(kInvalidArgument, VerifyObject(store_, "ns/rank-0", bytes_.size() + kBlockBytes, crcs_, {}));
}

}  // namespace
}  // namespace sp
