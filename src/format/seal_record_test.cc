#include "format/seal_record.h"

#include "base/crc32c.h"
#include "base/sha256.h"
#include "format/constants.h"
#include "format/fixed_layout.h"
#include "format/test_values.h"

namespace sp {
namespace {

using testing::Counting;
using testing::GoldenRecord;
using testing::Hex;
using testing::Randomizer;

// The golden bytes here come from a second implementation, written from docs/formats only.
constexpr char kGoldenRecord[] =
    "5350535201000000cdea75522fb0fd08fa0a944de9436afd000102030405060708090a0b0c0d0e0f0700000000000000"
    "b00400000000000002000000e80300000200000000000000110030000000000000200000000000000010000000000000"
    "efbeadde0d006c6c616d612d37625f72756e330000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "00000000000000000000000000000000202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f"
    "404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f00000000000000000000000029089670";

constexpr char kGoldenCopy[] =
    "5350435201000100508e1fa2e514008d3ab82b7e43945380047179b4c34c5a18f5b6d82c776ae4110001020304050607"
    "08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f000000000000000000000000000000000000000001b81fc8";

SealRecord RandomRecord(Randomizer& random) {
  SealRecord r;
  r.key.uid = static_cast<uint32_t>(random.Next());
  r.key.ns = std::string(1 + random.Next() % kNamespaceBytesMax, 'n');
  r.key.generation = random.Next();
  random.Fixed(r.key.nonce);
  r.key.step = random.Next() & kStepMax;
  r.key.try_number = static_cast<uint32_t>(random.Next());
  r.attempt = r.key.AttemptId();
  r.kind = random.Next() % 4 == 0 ? ShardKind::kManifest : ShardKind::kData;
  r.world_size = 1 + static_cast<uint32_t>(random.Next() % kWorldSizeMax);
  r.length_bytes = kHeaderBytesMax + random.Next() % (kShardBytesMax - kHeaderBytesMax + 1);
  random.Fixed(r.block_root);
  r.whole_crc = static_cast<uint32_t>(random.Next());
  if (r.kind == ShardKind::kData) {
    r.rank = static_cast<uint32_t>(random.Next() % r.world_size);
    r.header_bytes = random.Next() % (kHeaderBytesMax + 1);
    r.static_offset = random.Next() % (r.header_bytes + 1);
    random.Fixed(r.structure);
  }
  return r;
}

// Sets the checksum right again, so that a test reaches the checks behind it.
template <size_t N>
void Reseal(std::array<uint8_t, N>& bytes) {
  layout::Put(bytes, N - 4, Crc32c(0, ByteSpan(bytes).first(N - 4)));
}

TEST(SealRecord, GoldenBytes) {
  const SealRecord r = GoldenRecord(0);
  EXPECT_EQ(r.attempt.ToHex(), "cdea75522fb0fd08fa0a944de9436afd");
  EXPECT_EQ(Hex(r.Encode()), kGoldenRecord);
  EXPECT_EQ(r.Identity().ToHex(), "508e1fa2e514008d3ab82b7e43945380047179b4c34c5a18f5b6d82c776ae411");
}

TEST(SealRecord, RoundTrip) {
  Randomizer random(1);
  for (int i = 0; i < 2000; ++i) {
    const SealRecord r = RandomRecord(random);
    const auto decoded = SealRecord::Decode(r.Encode());
    ASSERT_TRUE(decoded.has_value()) << decoded.error().ToString();
    ASSERT_EQ(*decoded, r);
  }
}

TEST(SealRecord, EverySingleBitFlipIsRefused_F72) {
  auto bytes = GoldenRecord(0).Encode();
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    const auto decoded = SealRecord::Decode(bytes);
    ASSERT_FALSE(decoded.has_value()) << "bit " << bit;
    ASSERT_EQ(decoded.error().code(), StatusCode::kProtocol);
    bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
  }
}

TEST(SealRecord, EveryTruncationAndExtensionIsRefused) {
  const auto bytes = GoldenRecord(0).Encode();
  for (size_t n = 0; n < bytes.size(); ++n) ASSERT_FALSE(SealRecord::Decode(ByteSpan(bytes).first(n)).has_value()) << n;
  std::vector<uint8_t> longer(bytes.begin(), bytes.end());
  longer.push_back(0);
  EXPECT_FALSE(SealRecord::Decode(longer).has_value());
}

TEST(SealRecord, UnknownVersionIsRefusedByName_I35) {
  auto bytes = GoldenRecord(0).Encode();
  layout::Put(bytes, 4, uint16_t{2});
  Reseal(bytes);
  const auto decoded = SealRecord::Decode(bytes);
  ASSERT_FALSE(decoded.has_value());
  EXPECT_NE(decoded.error().message().find("unknown version 2"), std::string::npos);
}

// Each change alone makes the record contradict itself or a limit, although its checksum is right (T-5).
TEST(SealRecord, ContradictionsAreRefused) {
  const auto refused = [](auto change) {
    SealRecord r = GoldenRecord(1);
    change(r);
    return !SealRecord::Decode(r.Encode()).has_value();
  };
  EXPECT_FALSE(refused([](SealRecord&) {}));
  EXPECT_TRUE(refused([](SealRecord& r) { r.attempt.bytes[0] ^= 1; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.key.step += 1; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.world_size = 0; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.world_size = 1; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.world_size = kWorldSizeMax + 1; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.length_bytes = r.header_bytes - 1; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.length_bytes = kShardBytesMax + 1; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.static_offset = r.header_bytes + 1; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.header_bytes = kHeaderBytesMax + 1, r.length_bytes = kShardBytesMax; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.key.ns = "", r.attempt = r.key.AttemptId(); }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.key.ns = "a/b", r.attempt = r.key.AttemptId(); }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.key.step = kStepMax + 1, r.attempt = r.key.AttemptId(); }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.kind = ShardKind::kManifest; }));
  EXPECT_TRUE(refused([](SealRecord& r) { r.kind = static_cast<ShardKind>(2); }));
}

TEST(SealRecord, PaddingMustBeZero) {
  for (const size_t offset : {size_t{7}, size_t{115}, size_t{301}, size_t{302}, size_t{303}, size_t{368}, size_t{379}}) {
    auto bytes = GoldenRecord(0).Encode();
    ASSERT_EQ(bytes[offset], 0) << offset;
    bytes[offset] = 1;
    Reseal(bytes);
    EXPECT_FALSE(SealRecord::Decode(bytes).has_value()) << offset;
  }
  auto bytes = GoldenRecord(0).Encode();
  layout::Put(bytes, 100, uint16_t{201});
  Reseal(bytes);
  EXPECT_FALSE(SealRecord::Decode(bytes).has_value());
}

TEST(AttemptKey, EveryFieldChangesTheAttempt) {
  const AttemptKey key = GoldenRecord(0).key;
  std::vector<AttemptKey> others(6, key);
  others[0].uid += 1;
  others[1].ns += "x";
  others[2].generation += 1;
  others[3].nonce.bytes[15] ^= 1;
  others[4].step += 1;
  others[5].try_number += 1;
  for (const AttemptKey& other : others) EXPECT_NE(other.AttemptId(), key.AttemptId());
}

TEST(CopyReport, GoldenBytes) {
  const CopyReport report{GoldenRecord(0).Identity(), Counting<16>(0), Counting<16>(16), true};
  EXPECT_EQ(Hex(report.Encode()), kGoldenCopy);
}

TEST(CopyReport, RoundTripFlipsAndTruncation_F72) {
  Randomizer random(2);
  for (int i = 0; i < 20; ++i) {
    CopyReport report;
    random.Fixed(report.record);
    random.Fixed(report.node);
    random.Fixed(report.boot);
    random.Bool(report.held);
    auto bytes = report.Encode();
    ASSERT_EQ(CopyReport::Decode(bytes).value(), report);
    for (size_t n = 0; n < bytes.size(); ++n) ASSERT_FALSE(CopyReport::Decode(ByteSpan(bytes).first(n)).has_value());
    for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
      bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
      ASSERT_FALSE(CopyReport::Decode(bytes).has_value()) << "bit " << bit;
      bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    }
  }
  auto bytes = CopyReport{}.Encode();
  bytes[6] = 2;
  Reseal(bytes);
  EXPECT_FALSE(CopyReport::Decode(bytes).has_value());
  bytes = CopyReport{}.Encode();
  bytes[80] = 1;
  Reseal(bytes);
  EXPECT_FALSE(CopyReport::Decode(bytes).has_value());
}

TEST(BlockRoot, IsTheHashOfTheLittleEndianList) {
  const std::vector<uint32_t> crcs = {0x04030201, 0x08070605};
  EXPECT_EQ(BlockRoot(crcs), Sha256(Counting<8>(1).span()));
  EXPECT_EQ(BlockRoot({}), Sha256(ByteSpan{}));
}

}  // namespace
}  // namespace sp
