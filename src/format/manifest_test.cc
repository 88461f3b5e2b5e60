#include "format/manifest.h"

#include "base/crc32c.h"
#include "format/constants.h"
#include "format/test_values.h"

namespace sp {
namespace {

using testing::GoldenRecord;

// From a second implementation, written from docs/formats/manifest.md only.
constexpr char kGolden[] =
    R"({"format":"safepoint-manifest","version":1,"namespace":"llama-7b_run3","uid":1000,"generation":7,)"
    R"("nonce":"000102030405060708090a0b0c0d0e0f","step":1200,"try":2,"attempt":"cdea75522fb0fd08fa0a944de9436afd","world_size":2,)"
    R"("shards":[{"rank":0,"record":"508e1fa2e514008d3ab82b7e43945380047179b4c34c5a18f5b6d82c776ae411","length":3145745,)"
    R"("block_root":"202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f","crc32c":3735928559,"header_bytes":8192,)"
    R"("static_offset":4096,"structure":"404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"},)"
    R"({"rank":1,"record":"1d330485e467a0d9dc87747e79f6937063f06b1965e193fa50e7d7a73ee2f750","length":3145745,)"
    R"("block_root":"202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f","crc32c":3735928559,"header_bytes":8192,)"
    R"("static_offset":4096,"structure":"404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"}]})";

std::vector<SealRecord> Golden() { return {GoldenRecord(0), GoldenRecord(1)}; }

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Manifest, GoldenText) {
  EXPECT_EQ(MakeManifest(Golden()), kGolden);
  const SealRecord r = ManifestRecord(Golden(), kGolden);
  EXPECT_EQ(r.Identity().ToHex(), "282b0001d8c3bc3e6aa4dbc48ce51ebf8b4a6b7cbe0390629f80ce1e407a2ccc");
  EXPECT_TRUE(SealRecord::Decode(r.Encode()).has_value());
}

TEST(Manifest, RoundTrip) {
  const auto parsed = ParseManifest(kGolden);
  ASSERT_TRUE(parsed.has_value()) << parsed.error().ToString();
  EXPECT_EQ(*parsed, Golden());
}

// A world large enough for a manifest of several blocks.
TEST(Manifest, LargeWorld) {
  std::vector<SealRecord> records;
  for (uint32_t rank = 0; rank < 5000; ++rank) {
    records.push_back(GoldenRecord(0));
    records.back().world_size = 5000;
    records.back().rank = rank;
    records.back().length_bytes += rank;
  }
  const std::string text = MakeManifest(records);
  ASSERT_GT(text.size(), kBlockBytes);
  EXPECT_EQ(ParseManifest(text).value(), records);
  const SealRecord r = ManifestRecord(records, text);
  std::vector<uint32_t> crcs;
  for (size_t i = 0; i < text.size(); i += kBlockBytes) crcs.push_back(Crc32c(0, AsBytes(text).subspan(i, std::min(kBlockBytes, text.size() - i))));
  ASSERT_EQ(crcs.size(), BlockCount(text.size()));
  EXPECT_EQ(r.block_root, BlockRoot(crcs));
}

TEST(Manifest, EveryTruncationIsRefused) {
  const std::string text = kGolden;
  for (size_t n = 0; n < text.size(); ++n) ASSERT_FALSE(ParseManifest(text.substr(0, n)).has_value()) << n;
  EXPECT_FALSE(ParseManifest(text + " ").has_value());
}

TEST(Manifest, EverySingleBitFlipIsRefused) {
  std::string text = kGolden;
  for (size_t bit = 0; bit < 8 * text.size(); ++bit) {
    text[bit / 8] = static_cast<char>(text[bit / 8] ^ (1 << bit % 8));
    ASSERT_FALSE(ParseManifest(text).has_value()) << "bit " << bit;
    text[bit / 8] = static_cast<char>(text[bit / 8] ^ (1 << bit % 8));
  }
}

TEST(Manifest, ContradictionsAreRefused) {
  const std::string text = kGolden;
  const auto error = [](const std::string& t) {
    const auto parsed = ParseManifest(t);
    return parsed ? std::string("accepted") : parsed.error().message();
  };
  EXPECT_NE(error(Replaced(text, "\"version\":1", "\"version\":2")).find("unknown version 2"), std::string::npos);
  EXPECT_NE(error(Replaced(text, "\"world_size\":2", "\"world_size\":1")), "accepted");
  EXPECT_NE(error(Replaced(text, "\"world_size\":2", "\"world_size\":3")), "accepted");
  EXPECT_NE(error(Replaced(text, "\"world_size\":2", "\"world_size\":0")), "accepted");
  EXPECT_NE(error(Replaced(text, "\"world_size\":2", "\"world_size\":65537")), "accepted");
  EXPECT_NE(error(Replaced(text, "\"rank\":1", "\"rank\":0")).find("rank 0 in place of rank 1"), std::string::npos) << "rank twice";
  EXPECT_NE(error(Replaced(text, "1d330485", "2d330485")).find("do not hash"), std::string::npos) << "another record's hash";
  EXPECT_NE(error(Replaced(text, "\"uid\":1000", "\"uid\":01000")), "accepted");
  EXPECT_NE(error(Replaced(text, "\"uid\":1000", "\"uid\":-1")), "accepted");
  EXPECT_NE(error(Replaced(text, "\"uid\":1000", "\"uid\":4294967296")), "accepted");
  EXPECT_NE(error(Replaced(text, "\"step\":1200", "\"step\":99999999999999999999999")), "accepted");
  EXPECT_NE(error(Replaced(text, "llama-7b_run3", std::string(1 << 20, 'a'))), "accepted");
  EXPECT_NE(error(""), "accepted");
}

}  // namespace
}  // namespace sp
