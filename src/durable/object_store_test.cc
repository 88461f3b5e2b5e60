#include "durable/object_store.h"

#include <gtest/gtest.h>

#include "format/constants.h"
#include "os/test_util.h"

namespace sp {
namespace {

TEST(CheckKey, AcceptsSegmentsOfTheAllowedBytesAndNothingElse) {
  for (const std::string key : {"a", "a/b", "ns/step-1/0123/rank-0.safetensors", "...", "..a", ".hidden/x", "_=+@%-./z"}) {
    SP_EXPECT_CODE(kOk, CheckKey(key));
  }
  SP_EXPECT_CODE(kOk, CheckKey(std::string(900, 'k')));
  SP_EXPECT_CODE(kInvalidArgument, CheckKey(std::string(901, 'k')));
  for (const std::string key : {"", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a b", "a:b", "a*", "a\\b", "~", "a\n", "\x7f",
                                "\xff"}) {
    SP_EXPECT_CODE(kInvalidArgument, CheckKey(key));
  }
  SP_EXPECT_CODE(kInvalidArgument, CheckKey(std::string("a\0b", 3)));
}

TEST(CheckKey, EveryByteIsEitherAllowedOrNot) {
  const std::string allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._=+@%-";
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    EXPECT_EQ(CheckKey(std::string("a") + c + "b").ok(), c == '/' || allowed.find(c) != std::string::npos) << byte;
  }
}

TEST(CheckKey, MessagesShowNoForeignBytes) {
  const Status status = CheckKey("a\x1b[31m" + std::string(2000, 'b'));
  EXPECT_NE(status.message().find("a?[31mb"), std::string::npos) << status.message();
  EXPECT_LT(status.message().size(), 300u);
}

TEST(CheckPrefix, IsTheBeginningOfAKey) {
  for (const std::string prefix : {"", "a", "a/", "a/b", "a/.", "..", "a/.."}) SP_EXPECT_CODE(kOk, CheckPrefix(prefix));
  for (const std::string prefix : {"/", "/a", "a//", "../", "a/./", "a/../b", "a b"}) SP_EXPECT_CODE(kInvalidArgument, CheckPrefix(prefix));
  SP_EXPECT_CODE(kInvalidArgument, CheckPrefix(std::string(901, 'k')));
}

TEST(CheckLimits, CancelComesBeforeDeadline) {
  std::atomic<bool> cancelled = false;
  const CallLimits limits{.deadline = 10, .cancelled = &cancelled};
  SP_EXPECT_CODE(kOk, CheckLimits(limits, 10, "put x"));
  SP_EXPECT_CODE(kDeadline, CheckLimits(limits, 11, "put x"));
  cancelled = true;
  SP_EXPECT_CODE(kClosed, CheckLimits(limits, 11, "put x"));
  SP_EXPECT_CODE(kOk, CheckLimits({}, std::numeric_limits<Nanos>::max(), "put x"));
}

TEST(PutSource, IsOneRangeAfterAnotherInWholeBlocks) {
  const std::vector<uint8_t> bytes(2 * kBlockBytes + 1);
  const ByteSpan all = bytes;
  EXPECT_EQ(PutSource{}.size_bytes(), 0u);
  SP_EXPECT_CODE(kOk, CheckSource({}));
  const PutSource good{{all.first(kBlockBytes), {}, all.subspan(kBlockBytes)}, {1, 2, 3}};
  EXPECT_EQ(good.size_bytes(), bytes.size());
  SP_EXPECT_CODE(kOk, CheckSource(good));
  SP_EXPECT_CODE(kInvalidArgument, CheckSource({{all.first(1), all.subspan(1)}, {1, 2, 3}}));
  SP_EXPECT_CODE(kInvalidArgument, CheckSource({{all}, {1, 2}}));
  SP_EXPECT_CODE(kInvalidArgument, CheckSource({{all}, {1, 2, 3, 4}}));
}

}  // namespace
}  // namespace sp
