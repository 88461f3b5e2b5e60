#include "client/in_place.h"

#include <gtest/gtest.h>

#include <numeric>

#include "base/crc32c.h"
#include "os/test_util.h"

namespace sp {
namespace {

constexpr uint64_t kLength = 2 * kBlockBytes + 777;

TEST(InPlace, FillsGapsAroundWhatIsThereAndChecksumsAll) {
  std::vector<uint8_t> source(kLength), target(kLength), expected;
  std::iota(source.begin(), source.end(), 1);
  std::iota(target.begin(), target.end(), 101);
  const std::vector<CopySegment> segments = {
      {source.data(), 0, 10}, {source.data() + 500, kBlockBytes - 7, 14}, {source.data(), 2 * kBlockBytes, 0}, {source.data(), kLength - 1, 1}};
  expected = target;
  for (const CopySegment& s : segments) std::copy_n(s.source, s.size, expected.begin() + static_cast<std::ptrdiff_t>(s.offset));
  for (const int threads : {1, 4}) {
    std::vector<uint32_t> crcs(BlockCount(kLength));
    CopyThreads pool;
    SP_ASSERT_OK(FillInPlace(segments, target, crcs, {.threads = threads}, pool));
    EXPECT_EQ(target, expected);
    for (uint64_t block = 0; block < crcs.size(); ++block) {
      const uint64_t begin = block * kBlockBytes;
      EXPECT_EQ(crcs[block], Crc32c(0, ByteSpan(expected).subspan(begin, std::min(kBlockBytes, kLength - begin))));
    }
  }
}

TEST(InPlace, CancelledIsClosed) {
  std::vector<uint8_t> target(kLength);
  std::vector<uint32_t> crcs(BlockCount(kLength));
  CopyThreads pool;
  const std::atomic<bool> cancel = true;
  SP_EXPECT_CODE(kClosed, FillInPlace({}, target, crcs, {.cancel = &cancel}, pool));
}

TEST(CheckSegments, RefusesWhatDoesNotFit) {
  const uint8_t byte = 0;
  using S = std::vector<CopySegment>;
  SP_EXPECT_CODE(kOk, CheckSegments(S{{&byte, 0, 4}, {&byte, 4, 6}}, 10, true));
  SP_EXPECT_CODE(kOk, CheckSegments(S{{&byte, 1, 4}, {&byte, 8, 1}}, 10, false));
  SP_EXPECT_CODE(kInvalidArgument, CheckSegments(S{{&byte, 0, 4}, {&byte, 5, 5}}, 10, true));
  SP_EXPECT_CODE(kInvalidArgument, CheckSegments(S{{&byte, 0, 4}}, 10, true));
  SP_EXPECT_CODE(kInvalidArgument, CheckSegments(S{{&byte, 0, 4}, {&byte, 3, 7}}, 10, false));
  SP_EXPECT_CODE(kInvalidArgument, CheckSegments(S{{&byte, 0, 11}}, 10, false));
  SP_EXPECT_CODE(kInvalidArgument, CheckSegments(S{{&byte, 8, UINT64_MAX - 4}}, 10, false));
  SP_EXPECT_CODE(kInvalidArgument, CheckSegments(S{{nullptr, 0, 1}}, 10, false));
}

}  // namespace
}  // namespace sp
