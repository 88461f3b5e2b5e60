#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/sha256.h"
#include "base/status.h"

namespace sp {
namespace {

TEST(Status, DefaultIsOkAndOthersKeepCodeAndMessage) {
  EXPECT_TRUE(Status().ok());
  EXPECT_EQ(Status().ToString(), "OK");
  const Status status(StatusCode::kNoSpace, "pool is full");
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.code(), StatusCode::kNoSpace);
  EXPECT_EQ(status.message(), "pool is full");
  EXPECT_EQ(status.ToString(), "NO_SPACE: pool is full");
  EXPECT_EQ(status, Status(StatusCode::kNoSpace, "pool is full"));
  EXPECT_NE(status, Status(StatusCode::kLimit, "pool is full"));
}

TEST(Status, CodesHaveFixedNumbersAndDistinctNames) {
  // The numbers travel in the socket protocol: this table may only grow at its end (I-35).
  const std::vector<std::string> names = {"OK",       "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "INCOMPLETE",
                                          "CORRUPT",  "FENCED",           "NO_SPACE",  "DENIED",      "LOST",
                                          "DEADLINE", "LIMIT",            "PROTOCOL",  "CLOSED",      "INTERNAL"};
  for (size_t i = 0; i < names.size(); ++i) EXPECT_EQ(StatusCodeName(static_cast<StatusCode>(i)), names[i]);
  EXPECT_EQ(StatusCodeName(static_cast<StatusCode>(names.size())), "UNKNOWN");
}

Result<int> Half(int value) {
  if (value % 2 != 0) return Error(StatusCode::kInvalidArgument, "odd");
  return value / 2;
}

Result<int> Quarter(int value) {
  SP_ASSIGN_OR_RETURN(const int half, Half(value));
  SP_ASSIGN_OR_RETURN(const int quarter, Half(half));
  return quarter;
}

Status CheckQuarter(int value) {
  SP_ASSIGN_OR_RETURN(const int quarter, Quarter(value));
  return quarter == 3 ? Status() : Status(StatusCode::kNotFound, "not three");
}

Result<std::unique_ptr<int>> Wrap(int value) {
  SP_RETURN_IF_ERROR(CheckQuarter(value));
  return std::make_unique<int>(value);
}

TEST(Result, MacrosReturnTheFirstErrorFromBothKindsOfFunction) {
  EXPECT_EQ(Quarter(12).value(), 3);
  EXPECT_EQ(Quarter(3).error(), Status(StatusCode::kInvalidArgument, "odd"));
  EXPECT_TRUE(CheckQuarter(12).ok());
  EXPECT_EQ(CheckQuarter(6).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(CheckQuarter(8).code(), StatusCode::kNotFound);
  EXPECT_EQ(**Wrap(12), 12);
  EXPECT_EQ(Wrap(8).error().code(), StatusCode::kNotFound);
}

TEST(Bytes, HexGoesThereAndBack) {
  Id128 id;
  for (size_t i = 0; i < id.bytes.size(); ++i) id.bytes[i] = static_cast<uint8_t>(17 * i);
  EXPECT_EQ(id.ToHex(), "00112233445566778899aabbccddeeff");
  Id128 parsed;
  ASSERT_TRUE(Id128::FromHex(id.ToHex(), &parsed));
  EXPECT_EQ(parsed, id);
  EXPECT_FALSE(parsed.is_zero());
  EXPECT_TRUE(Id128().is_zero());
}

TEST(Bytes, HexRefusesWhateverIsNotExactlyTheText) {
  Id128 untouched;
  untouched.bytes.fill(9);
  const Id128 before = untouched;
  const std::string good = "00112233445566778899aabbccddeeff";
  const std::vector<std::string> bad = {
      "",
      good.substr(1),
      good + "0",
      good + "00",
      "0X" + good.substr(2),
      "00112233445566778899AABBCCDDEEFF",
      " " + good.substr(1),
      good.substr(0, 31) + "g",
      good.substr(0, 31) + '\0',
  };
  for (const std::string& text : bad) {
    EXPECT_FALSE(Id128::FromHex(text, &untouched)) << text;
    EXPECT_EQ(untouched, before) << text;
  }
}

TEST(Bytes, OrderIsThatOfTheBytes) {
  Hash256 low;
  Hash256 high;
  low.bytes[0] = 1, low.bytes[31] = 0xff;
  high.bytes[0] = 0x80;
  EXPECT_LT(low, high);  // Unsigned.
  std::unordered_set<Hash256, FixedBytesHash> set{low, high, low};
  EXPECT_EQ(set.size(), 2u);
}

TEST(Bytes, TextAndBytesAreTheSameMemory) {
  const std::string text("a\0b", 3);
  EXPECT_EQ(AsBytes(text).size(), 3u);
  EXPECT_EQ(AsText(AsBytes(text)), text);
}

TEST(Sha256, KnownAnswers) {  // FIPS 180-4 examples.
  EXPECT_EQ(Sha256(AsBytes("")).ToHex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256(AsBytes("abc")).ToHex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Sha256(AsBytes("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq")).ToHex(),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Sha256(std::vector<uint8_t>(1000000, 'a')).ToHex(),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, PartsAreConcatenated) {
  EXPECT_EQ(Sha256({AsBytes("a"), AsBytes(""), AsBytes("bc")}), Sha256(AsBytes("abc")));
  EXPECT_NE(Sha256({AsBytes("a"), AsBytes("cb")}), Sha256(AsBytes("abc")));
}

TEST(Clock, ManualClockMovesOnlyByHandAndTheSteadyOneNeverBack) {  // I-33
  ManualClock manual;
  const Nanos begin = manual.Now();
  EXPECT_EQ(manual.Now(), begin);
  manual.Advance(5 * kNanosPerMilli);
  EXPECT_EQ(manual.Now() - begin, 5 * kNanosPerMilli);
  SteadyClock steady;
  Nanos last = steady.Now();
  for (int i = 0; i < 1000; ++i) {
    const Nanos now = steady.Now();
    ASSERT_GE(now, last);
    last = now;
  }
}

TEST(CheckDeathTest, FailureNamesTheExpressionAndAborts) {
  SP_CHECK(1 + 1 == 2);
  EXPECT_DEATH(SP_CHECK(1 + 1 == 3), "CHECK failed: 1 \\+ 1 == 3");
}

}  // namespace
}  // namespace sp
