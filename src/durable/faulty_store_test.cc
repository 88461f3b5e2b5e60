// FaultyStore does to the store what it says, and the interface gives its callers the means to get through: rows F57 to F69, as a drain would meet
// them.
#include "durable/faulty_store.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/crc32c.h"
#include "durable/memory_store.h"
#include "durable/verify.h"
#include "os/test_util.h"

namespace sp {
namespace {

class Faulty : public testing::Test {
 protected:
  Status Put(const CallLimits& limits = {}) { return store_.Put(key_, {{bytes_}, crcs_}, limits); }
  Status Verify() { return VerifyObject(store_, key_, bytes_.size(), crcs_, {}); }
  bool Exists() { return memory_.Head(key_, {}).has_value(); }
  std::vector<std::string> Listed() {
    std::vector<std::string> keys;
    const ListPage page = store_.List("", "", {}).value();
    for (const ObjectInfo& info : page.objects) keys.push_back(info.key);
    return keys;
  }

  const std::string key_ = "ns/step-1/attempt/rank-0";
  const std::vector<uint8_t> bytes_ = std::vector<uint8_t>(1000, 7);
  const std::vector<uint32_t> crcs_ = {Crc32c(0, bytes_)};
  ManualClock clock_;
  MemoryStore memory_{clock_};
  FaultyStore store_{memory_, clock_, 42};
};

TEST_F(Faulty, F57AndF59ABurstOfErrorsPassesAndLeavesNothing) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kFailBefore, .nth = 2, .times = 3, .key_part = "rank-0"});
  SP_ASSERT_OK(store_.Put("ns/rank-1", {{bytes_}, crcs_}, {}));  // Another key: not counted.
  SP_ASSERT_OK(Put());
  SP_ASSERT_OK(memory_.Delete(key_, {}));
  for (int i = 0; i < 3; ++i) {
    SP_EXPECT_CODE(kUnavailable, Put());
    EXPECT_FALSE(Exists());
  }
  SP_EXPECT_CODE(kOk, Put());
  EXPECT_EQ(store_.calls(StoreCall::kPut), 6u);
  EXPECT_EQ(store_.faults(), 3u);
}

TEST_F(Faulty, F58AHangEndsAtTheDeadlineOrWithTheCaller) {
  store_.OnHang([&](const CallLimits& limits) { clock_.Advance(limits.deadline - clock_.Now()); });
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kHang});
  const Nanos deadline = clock_.Now() + 30 * kNanosPerSecond;
  SP_EXPECT_CODE(kDeadline, Put({.deadline = deadline}));
  EXPECT_EQ(clock_.Now(), deadline);
  EXPECT_FALSE(Exists());
  std::atomic<bool> cancelled = false;
  store_.OnHang([&](const CallLimits&) { cancelled = true; });
  store_.Add({.call = StoreCall::kHead, .kind = FaultKind::kHang});
  SP_EXPECT_CODE(kClosed, store_.Head(key_, {.cancelled = &cancelled}));
}

TEST_F(Faulty, F58ALateSuccessIsFoundByAskingAndOverwritesNothing) {
  store_.Add({.call = StoreCall::kCreate, .kind = FaultKind::kArriveLate});
  SP_EXPECT_CODE(kDeadline, store_.Create("manifest", AsBytes("ours"), {}));
  SP_EXPECT_CODE(kNotFound, store_.Head("manifest", {}));
  EXPECT_EQ(store_.DeliverLate(), std::vector<Status>{Status()});
  SP_ASSERT_OK_AND_ASSIGN(const bool again, store_.Create("manifest", AsBytes("ours"), {}));
  EXPECT_FALSE(again);
  // The other order: the retry is first, the late one finds it there.
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kArriveLate});
  {
    const std::vector<uint8_t> gone = bytes_;  // The caller's memory goes when the call has returned.
    SP_EXPECT_CODE(kDeadline, store_.Put(key_, {{gone}, crcs_}, {}));
  }
  SP_ASSERT_OK(Put());
  EXPECT_EQ(store_.DeliverLate(), std::vector<Status>{Status()});
  SP_EXPECT_CODE(kOk, Verify());
  store_.Add({.call = StoreCall::kDelete, .kind = FaultKind::kArriveLate});
  SP_EXPECT_CODE(kDeadline, store_.Delete(key_, {}));
  EXPECT_TRUE(Exists());
  EXPECT_EQ(store_.DeliverLate().size(), 1u);
  EXPECT_FALSE(Exists());
  EXPECT_EQ(store_.DeliverLate().size(), 0u);
}

TEST_F(Faulty, F60ALostAnswerIsARetryAwayFromSuccess) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kFailAfter, .status = {StatusCode::kDeadline, "no answer to complete"}});
  const Status put = Put();
  EXPECT_EQ(put.code(), StatusCode::kDeadline);
  EXPECT_NE(put.message().find("memory://store/" + key_ + ": no answer"), std::string::npos) << put.message();
  EXPECT_TRUE(Exists());
  SP_EXPECT_CODE(kOk, Put());
  SP_EXPECT_CODE(kOk, Verify());
  store_.Add({.call = StoreCall::kCreate, .kind = FaultKind::kFailAfter});
  SP_EXPECT_CODE(kUnavailable, store_.Create("manifest", AsBytes("ours"), {}));
  EXPECT_FALSE(store_.Create("manifest", AsBytes("ours"), {}).value());  // Our own: reading it back shows that.
}

TEST_F(Faulty, F61AnUploadOfADeadWriterIsListedUntilAborted) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kLeaveUpload});
  uint64_t progress = 0;
  SP_EXPECT_CODE(kUnavailable, Put({.progress = [&](uint64_t bytes) { progress += bytes; }}));
  EXPECT_EQ(progress, bytes_.size() / 2);
  EXPECT_FALSE(Exists());
  memory_.LeaveUnfinishedUpload("ns/other");
  EXPECT_EQ(store_.ListUploads("", {}).value().size(), 2u);
  SP_ASSERT_OK_AND_ASSIGN(const std::vector<UnfinishedUpload> uploads, store_.ListUploads("ns/step-1", {}));
  ASSERT_EQ(uploads.size(), 1u);
  EXPECT_EQ(uploads[0].key, key_);
  EXPECT_EQ(uploads[0].started_unix_s, clock_.Now() / kNanosPerSecond);
  SP_ASSERT_OK(store_.AbortUpload(uploads[0], {}));
  EXPECT_EQ(store_.ListUploads("", {}).value().size(), 1u);
}

TEST_F(Faulty, F62AnUploadThatWasAbortedIsPutAfresh) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kDropUpload, .status = {StatusCode::kUnavailable, "NoSuchUpload"}});
  SP_EXPECT_CODE(kUnavailable, Put());
  EXPECT_FALSE(Exists());
  EXPECT_EQ(store_.ListUploads("", {}).value().size(), 0u);
  SP_EXPECT_CODE(kOk, Put());
}

TEST_F(Faulty, F63ToF65RefusalsStayUntilSomebodyMendsThem) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kFailBefore, .times = Fault::kForEver, .status = {StatusCode::kDenied, "403"}});
  store_.Add({.call = StoreCall::kProbe, .kind = FaultKind::kFailBefore, .times = Fault::kForEver, .status = {StatusCode::kInvalidArgument, "301"}});
  for (int i = 0; i < 50; ++i) SP_EXPECT_CODE(kDenied, Put());
  SP_EXPECT_CODE(kInvalidArgument, store_.Probe({}));
  store_.Clear();
  SP_EXPECT_CODE(kOk, Put());
  SP_EXPECT_CODE(kOk, store_.Probe({}));
}

TEST_F(Faulty, F66DamageInTheStoreIsFoundByReadingBack) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kTruncateStored});
  SP_ASSERT_OK(Put());
  EXPECT_EQ(memory_.Head(key_, {}).value().size_bytes, bytes_.size() - 1);
  SP_EXPECT_CODE(kCorrupt, Verify());
  SP_EXPECT_CODE(kCorrupt, Put());  // It is not replaced.
  SP_ASSERT_OK(store_.Delete(key_, {}));
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kFlipStored, .at = 500});
  SP_ASSERT_OK(Put());
  SP_EXPECT_CODE(kCorrupt, Verify());
  store_.Add({.call = StoreCall::kCreate, .kind = FaultKind::kFlipStored, .at = 1u << 30});
  EXPECT_TRUE(store_.Create("manifest", AsBytes("ab"), {}).value());
  std::vector<uint8_t> read(2);
  SP_ASSERT_OK(store_.ReadRange("manifest", 0, read, {}));
  EXPECT_EQ(AsText(read), "ac");
}

TEST_F(Faulty, F67AListThatLagsOrLosesMisleadsNobodyWhoAsksByKey) {
  for (const std::string key : {"a", "b", "c"}) SP_ASSERT_OK(store_.Create(key, {}, {}));
  SP_ASSERT_OK(Put());
  store_.Add({.call = StoreCall::kList, .kind = FaultKind::kListLags, .at = 2});
  EXPECT_EQ(Listed(), (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(Listed(), (std::vector<std::string>{"a", "b", "c", key_}));
  store_.Add({.call = StoreCall::kList, .kind = FaultKind::kListLags, .at = 100});
  EXPECT_EQ(Listed(), std::vector<std::string>{});
  store_.Add({.call = StoreCall::kList, .kind = FaultKind::kListLosesRest});
  EXPECT_EQ(Listed(), std::vector<std::string>{"a"});
  SP_EXPECT_CODE(kOk, store_.Head(key_, {}));
}

TEST_F(Faulty, F68AnObjectThatWasConfirmedMayGo) {
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kLoseStored});
  SP_ASSERT_OK(Put());
  SP_EXPECT_CODE(kNotFound, Verify());
}

TEST_F(Faulty, F69TwoDaemonsDrainOneShardAndOneManifest) {
  FaultyStore other(memory_, clock_);
  store_.Add({.call = StoreCall::kPut, .kind = FaultKind::kFailAfter});
  SP_EXPECT_CODE(kUnavailable, Put());
  SP_EXPECT_CODE(kOk, other.Put(key_, {{bytes_}, crcs_}, {}));
  SP_EXPECT_CODE(kOk, VerifyObject(other, key_, bytes_.size(), crcs_, {}));
  EXPECT_TRUE(store_.Create("manifest", AsBytes("one"), {}).value());
  EXPECT_FALSE(other.Create("manifest", AsBytes("two"), {}).value());
}

TEST_F(Faulty, CorruptReadsLeaveTheObjectAlone) {
  SP_ASSERT_OK(Put());
  store_.Add({.call = StoreCall::kReadRange, .kind = FaultKind::kFlipRead, .at = 3});
  SP_EXPECT_CODE(kCorrupt, Verify());
  SP_EXPECT_CODE(kOk, Verify());
}

TEST_F(Faulty, ChancesRepeatWithTheSeed) {
  const auto outcomes = [&](uint64_t seed) {
    FaultyStore store(memory_, clock_, seed);
    store.AddChance(30, {.call = StoreCall::kHead, .kind = FaultKind::kFailBefore});
    std::string text;
    for (int i = 0; i < 1000; ++i) text += store.Head(key_, {}).error().code() == StatusCode::kUnavailable ? 'x' : '.';
    return text;
  };
  const std::string first = outcomes(1);
  EXPECT_EQ(first, outcomes(1));
  EXPECT_NE(first, outcomes(2));
  const auto struck = std::ranges::count(first, 'x');
  EXPECT_GT(struck, 230);
  EXPECT_LT(struck, 370);
}

TEST_F(Faulty, TheFirstFaultAddedStrikesAndAllCount) {
  store_.Add({.call = StoreCall::kHead, .kind = FaultKind::kFailBefore, .status = {StatusCode::kDenied, "first"}});
  store_.Add({.call = StoreCall::kHead, .kind = FaultKind::kFailBefore, .status = {StatusCode::kDeadline, "second"}});
  store_.Add({.call = StoreCall::kHead, .kind = FaultKind::kFailBefore, .nth = 2, .status = {StatusCode::kLimit, "third"}});
  SP_EXPECT_CODE(kDenied, store_.Head(key_, {}));
  SP_EXPECT_CODE(kLimit, store_.Head(key_, {}));
  SP_EXPECT_CODE(kNotFound, store_.Head(key_, {}));
}

}  // namespace
}  // namespace sp
