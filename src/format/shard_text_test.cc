#include "format/shard_text.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "format/constants.h"
#include "format/shard_index.h"

namespace sp {
namespace {

TEST(ShardTextTest, GoldenText) {
  const std::vector<uint64_t> shape = {2, 3}, offsets = {4, 0}, none;
  const std::vector<StaticEntry> entries = {{"a.b", "F32", shape, offsets, 0, 24}, {"s", "I64", none, none, 24, 32}};
  std::string expected =
      R"(,"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":"{\"a.b\":{\"saved_offsets\":[4,0]},\"s\":{\"saved_offsets\":[]}}")"
      R"(,"safepoint":"{\"version\":1,\"global\":{\"a.b\":[9,3]}}"},)"
      R"("a.b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"s":{"dtype":"I64","shape":[],"data_offsets":[24,32]}})";
  expected.resize(kAlignBytes, ' ');
  EXPECT_EQ(WriteStaticPart(entries, R"({"version":1,"global":{"a.b":[9,3]}})"), expected);
}

TEST(ShardTextTest, WithoutTensors) {
  std::string expected = R"(,"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":"{}","safepoint":"{\"version\":1}"}})";
  expected.resize(kAlignBytes, ' ');
  EXPECT_EQ(WriteStaticPart({}, R"({"version":1})"), expected);
}

TEST(ShardTextTest, StringsAreAscii) {
  std::string out;
  AppendJsonString(out, std::string_view("q\"b\\ \n\r\t\f\b\x01\x7f\0z", 14));
  EXPECT_EQ(out, R"("q\"b\\ \n\r\t\f\b\u0001\u007f\u0000z")");
  out.clear();
  AppendJsonString(out, "é€😀~");
  EXPECT_EQ(out, R"("\u00e9\u20ac\ud83d\ude00~")");
}

// Every key that can be written is read back as it was, through both layers of JSON.
TEST(ShardTextTest, ReadsBackWhatWasWritten) {
  const std::vector<std::string> keys = {"plain", "q\"uote", "back\\slash", "new\nline", "é€😀", "\x7f", "a\\\"b", "{}[],:"};
  std::vector<StaticEntry> entries;
  const std::vector<uint64_t> shape = {4}, offsets = {2};
  for (size_t i = 0; i < keys.size(); ++i) entries.push_back({keys[i], "F32", shape, offsets, 16 * i, 16 * (i + 1)});
  std::string info = R"({"version":1,"global":{)";
  for (const std::string& key : keys) {
    if (info.back() != '{') info += ',';
    AppendJsonString(info, key);
    info += ":[6]";
  }
  const std::string text = WriteStaticPart(entries, info + "}}");
  EXPECT_EQ(text.size() % kAlignBytes, 0u);
  const auto index = ShardIndex::ParseStaticPart({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
  ASSERT_TRUE(index) << index.error().message();
  ASSERT_EQ(index->pieces.size(), keys.size());
  for (size_t i = 0; i < keys.size(); ++i) {
    EXPECT_EQ(index->pieces[i], (TensorPiece{keys[i], "F32", {4}, {2}, {6}, 16 * i, 16 * (i + 1)}));
  }
}

std::string Rewritten(std::string_view text) {  // What the quick reader understood, written again; empty: it refused.
  const auto texts = SplitStaticPart(text);
  if (!texts) return "";
  struct Owned {
    std::string key, dtype;
    std::vector<uint64_t> shape, offsets;
    uint64_t begin, end;
  };
  std::vector<Owned> owned;
  const bool read = ReadEntries(text.substr(texts->entries), [&](const StaticEntry& e) {
    owned.push_back({std::string(e.key), std::string(e.dtype), {e.shape.begin(), e.shape.end()}, {}, e.begin, e.end});
    return true;
  });
  if (!read) return "";
  const auto index = ShardIndex::ParseStaticPart({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
  if (!index || index->pieces.size() != owned.size()) return "";
  std::vector<StaticEntry> entries;
  for (size_t i = 0; i < owned.size(); ++i) {
    entries.push_back({owned[i].key, owned[i].dtype, owned[i].shape, index->pieces[i].offsets, owned[i].begin, owned[i].end});
  }
  return WriteStaticPart(entries, texts->safepoint);
}

TEST(ShardTextTest, TheQuickReaderKnowsWhatTheWriterWrites) {
  const std::vector<uint64_t> shape = {2, 3}, offsets = {0, 0}, none;
  const std::vector<StaticEntry> entries = {{"a.b", "F32", shape, offsets, 0, 24}, {"s", "I64", none, none, 24, 32}};
  for (const std::string& text : {WriteStaticPart(entries, R"({"version":1,"path":{"a.b":["a.b"]}})"), WriteStaticPart({}, R"({"version":1})"),
                                  WriteStaticPart(entries, R"({"version":1,"x":"\u00e9\\\""})")}) {
    EXPECT_EQ(Rewritten(text), text);
    // Any one character less or other: it is refused, or reads as the general parser reads it.
    for (size_t i = 0; i < text.find_last_not_of(' ') + 2; ++i) {
      std::string changed = text;
      changed[i] = changed[i] == '1' ? '2' : '1';
      const std::string again = Rewritten(changed);
      EXPECT_TRUE(again.empty() || again == changed) << i << ": " << changed;
      const std::string cut = text.substr(0, i);
      const auto texts = SplitStaticPart(cut);
      const bool whole = i > text.find_last_not_of(' ');
      EXPECT_EQ(texts && ReadEntries(std::string_view(cut).substr(texts->entries), [](const StaticEntry&) { return true; }), whole) << cut;
    }
  }
}

TEST(ShardTextTest, TheQuickReaderRefusesOtherForms) {
  const auto read = [](std::string_view text) { return ReadEntries(text, [](const StaticEntry&) { return true; }); };
  EXPECT_TRUE(read(R"(,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}  )"));
  for (const char* text : {
           "", ",", R"(,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})", R"(,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}x)",
           R"(,"a":{"shape":[1],"dtype":"U8","data_offsets":[0,1]}})", R"(,"a":{"dtype":"U8","shape":[01],"data_offsets":[0,1]}})",
           R"(,"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", R"(,"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})",
           R"(,"a":{"dtype":"U8","shape":[1,],"data_offsets":[0,1]}})", R"(,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,18446744073709551616]}})",
           R"(,"\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", R"(,"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
           "}\n",
       }) {
    EXPECT_FALSE(read(text)) << text;
  }
}

}  // namespace
}  // namespace sp
