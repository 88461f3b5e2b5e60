#include "format/shard_index.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>

#include "format/constants.h"
#include "format/test_values.h"

namespace sp {
namespace {

using Json = nlohmann::ordered_json;

// Builds the static part of a header as docs/formats/shard.md says it.
struct Header {
  Json tensors = Json::object(), sharding = Json::object(), info = {{"version", 1}};

  Header& Tensor(const std::string& key, const std::string& dtype, Json shape, uint64_t begin, uint64_t end, Json offsets) {
    tensors[key] = {{"dtype", dtype}, {"shape", std::move(shape)}, {"data_offsets", {begin, end}}};
    sharding[key] = {{"saved_offsets", std::move(offsets)}};
    return *this;
  }
  std::string Text() const {
    std::string text = R"(,"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":)" + Json(sharding.dump()).dump() + R"(,"safepoint":)" +
                       Json(info.dump()).dump() + "}";
    for (const auto& [key, value] : tensors.items()) text += "," + Json(key).dump() + ":" + value.dump();
    text += "}";
    text.resize(AlignUp(text.size(), kAlignBytes), ' ');
    return text;
  }
  Result<ShardIndex> Parse() const { return ShardIndex::ParseStaticPart(AsBytes(Text())); }
};

Header Good() {
  Header h;
  h.Tensor("a.weight", "F32", {2, 3}, 0, 24, {4, 0}).Tensor("b", "BF16", Json::array(), 24, 26, Json::array());
  h.info["global"] = {{"a.weight", {8, 3}}};
  return h;
}

std::string Error(const Result<ShardIndex>& result) { return result ? "accepted" : result.error().message(); }
std::string Error(const std::string& text) {
  const auto result = ShardIndex::ParseStaticPart(AsBytes(text));
  EXPECT_TRUE(result.has_value() || result.error().code() == StatusCode::kProtocol);
  return Error(result);
}
::testing::AssertionResult Says(const std::string& error, const std::string& part) {
  if (error.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "\"" << error << "\" does not contain \"" << part << "\"";
}
std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(ShardIndex, ReadsPieces) {
  const auto index = Good().Parse();
  ASSERT_TRUE(index.has_value()) << index.error().ToString();
  EXPECT_EQ(index->data_bytes, 26u);
  EXPECT_EQ(index->expected.size(), 0u);
  const std::vector<TensorPiece> expected = {{"a.weight", "F32", {2, 3}, {4, 0}, {8, 3}, 0, 24}, {"b", "BF16", {}, {}, {}, 24, 26}};
  EXPECT_EQ(index->pieces, expected);
}

TEST(ShardIndex, ReadsAnEmptyShard) {
  const auto index = Header().Parse();
  ASSERT_TRUE(index.has_value()) << index.error().ToString();
  EXPECT_EQ(index->data_bytes, 0u);
}

TEST(ShardIndex, ReadsNamesAliasesRawShapesAndExpected) {
  Header h;
  h.Tensor("w", "F32", {2}, 0, 8, {0}).Tensor("w@1", "F32", {2}, 8, 16, {2}).Tensor("c", "U8", {32}, 16, 48, {0, 1});
  h.info["global"] = {{"w", {4}}, {"w@1", {4}}, {"c", {2, 3}}};
  h.info["name"] = {{"w@1", "w"}, {"tied@1", "tied"}};
  h.info["raw"] = {{"c", {{"dtype", "complex128"}, {"shape", {1, 2}}}}};
  h.info["alias"] = {{"tied@1", "w@1"}, {"tied", "w"}};
  h.info["path"] = {{"w", {"model", 0, {"deep", nullptr}, -1.5, true}}};
  h.info["expected"] = {"w", "x\xc3\xa4"};
  h.info["of a later version"] = {{"x", {1, 2, {{"y", false}}}}};
  const auto index = h.Parse();
  ASSERT_TRUE(index.has_value()) << index.error().ToString();
  const std::vector<TensorPiece> expected = {{"w", "F32", {2}, {0}, {4}, 0, 8},        {"w", "F32", {2}, {2}, {4}, 8, 16},
                                             {"c", "U8", {1, 2}, {0, 1}, {2, 3}, 16, 48}};
  EXPECT_EQ(index->pieces, expected);
  EXPECT_EQ(index->aliases, (std::vector<PieceAlias>{{"tied", 0}, {"tied", 1}}));
  EXPECT_EQ(index->data_bytes, 48u);
  std::vector<std::string> names;
  for (const std::string_view name : index->expected) names.emplace_back(name);
  EXPECT_EQ(names, (std::vector<std::string>{"w", "x\xc3\xa4"}));
}

TEST(ShardIndex, EveryTruncationIsRefused) {
  std::string text = Good().Text();
  text.resize(text.find_last_not_of(' ') + 1);
  ASSERT_EQ(Error(text), "accepted");
  for (size_t n = 0; n < text.size(); ++n) ASSERT_NE(Error(text.substr(0, n)), "accepted") << n;
  EXPECT_NE(Error(text + "x"), "accepted");
}

TEST(ShardIndex, OffsetsMustTileTheData) {
  const auto two = [](uint64_t b0, uint64_t e0, uint64_t b1, uint64_t e1) {
    Header h;
    h.Tensor("a", "U8", {e0 - b0}, b0, e0, {0}).Tensor("b", "U8", {e1 - b1}, b1, e1, {0});
    return Error(h.Parse());
  };
  EXPECT_EQ(two(0, 5, 5, 9), "accepted");
  EXPECT_EQ(two(4, 9, 0, 4), "accepted") << "any order in the header";
  EXPECT_EQ(two(0, 5, 5, 5), "accepted") << "nothing at the end";
  EXPECT_EQ(two(0, 5, 0, 0), "accepted") << "nothing at the start";
  EXPECT_TRUE(Says(two(1, 5, 5, 9), "gap"));
  EXPECT_TRUE(Says(two(0, 5, 6, 9), "gap"));
  EXPECT_TRUE(Says(two(0, 5, 4, 9), "overlaps"));
  EXPECT_TRUE(Says(two(0, 5, 0, 5), "overlaps"));
  EXPECT_TRUE(Says(two(0, 5, 2, 2), "overlaps"));
}

TEST(ShardIndex, SizesMustAgreeAndNotOverflow) {
  const auto one = [](const std::string& dtype, Json shape, uint64_t begin, uint64_t end, Json offsets) {
    return Error(Header().Tensor("a", dtype, std::move(shape), begin, end, std::move(offsets)).Parse());
  };
  const uint64_t huge = uint64_t{1} << 33;
  EXPECT_EQ(one("F32", {4}, 0, 16, {0}), "accepted");
  EXPECT_EQ(one("F4", {4}, 0, 2, {0}), "accepted");
  EXPECT_TRUE(Says(one("F4", {3}, 0, 2, {0}), "contradict"));
  EXPECT_TRUE(Says(one("F32", {4}, 0, 15, {0}), "contradict"));
  EXPECT_TRUE(Says(one("F32", {4}, 16, 0, {0}), "bad data offsets"));
  EXPECT_TRUE(Says(one("F32", {huge, huge}, 0, 0, {0, 0}), "overflow"));
  EXPECT_TRUE(Says(one("F32", {uint64_t{1} << 59}, 0, 0, {0}), "overflow"));
  EXPECT_EQ(one("F32", {huge, huge, 0}, 0, 0, {0, 0, 0}), "accepted") << "empty, whatever the other dimensions are";
  EXPECT_TRUE(Says(one("U8", {uint64_t{1} << 41}, 0, uint64_t{1} << 41, {0}), "bad data offsets"));
  EXPECT_TRUE(Says(one("F32", {4}, 0, 16, {1}), "exceeds the global shape"));
  EXPECT_TRUE(Says(one("F32", {4}, 0, 16, {UINT64_MAX}), "exceeds the global shape"));
  EXPECT_TRUE(Says(one("F32", {4}, 0, 16, {0, 0}), "differ in dimensions"));
  EXPECT_TRUE(Says(one("F99", {4}, 0, 16, {0}), "unknown dtype"));
  EXPECT_EQ(one("U8", Json(std::vector<int>(64, 1)), 0, 1, Json(std::vector<int>(64, 0))), "accepted");
  EXPECT_TRUE(Says(one("U8", Json(std::vector<int>(65, 1)), 0, 1, Json(std::vector<int>(65, 0))), "too many dimensions"));
}

TEST(ShardIndex, NumbersMustBeNumbers) {
  const std::string text = Good().Text();
  for (const char* bad : {"NaN", "Infinity", "-1", "2.0", "2e0", "1e999", "18446744073709551616", "99999999999999999999999999", "null", "true", "\"2\"",
                          "[2]", "{}", "02", "0x2"}) {
    EXPECT_NE(Error(Replaced(text, "[2,3]", std::string("[") + bad + ",3]")), "accepted") << bad;
    EXPECT_NE(Error(Replaced(text, "[0,24]", std::string("[0,") + bad + "]")), "accepted") << bad;
    EXPECT_NE(Error(Replaced(text, "[4,0]", std::string("[") + bad + ",0]")), "accepted") << bad;
    EXPECT_NE(Error(Replaced(text, "[8,3]", std::string("[") + bad + ",3]")), "accepted") << bad;
  }
  EXPECT_NE(Error(Replaced(text, "[0,24]", "[0,24,24]")), "accepted");
  EXPECT_NE(Error(Replaced(text, "[0,24]", "[24]")), "accepted");
}

TEST(ShardIndex, RepeatedKeysAreRefusedEverywhere) {
  const std::string text = Good().Text();
  EXPECT_TRUE(Says(Error(Replaced(text, ",\"b\":", ",\"a.weight\":")), "repeated key"));
  EXPECT_TRUE(Says(Error(Replaced(text, "\"dtype\":\"F32\"", "\"dtype\":\"F32\",\"dtype\":\"F32\"")), "repeated key"));
  EXPECT_TRUE(Says(Error(Replaced(text, ",\"format\":\"pt\"", ",\"format\":\"pt\",\"format\":\"pt\"")), "repeated key"));
  EXPECT_TRUE(Says(Error(Replaced(text, ",\"format\":\"pt\"", ",\"_\":\"pt\"")), "repeated key"));
  EXPECT_TRUE(Says(Error(Replaced(text, ",\"b\":", ",\"__metadata__\":{},\"b\":")), "repeated key"));
  EXPECT_TRUE(Says(Error(Replaced(text, R"({\"saved_offsets\":[]})", R"({\"saved_offsets\":[],\"saved_offsets\":[]})")), "repeated"));
  EXPECT_TRUE(Says(Error(Replaced(text, R"(\"b\":{\"saved)", R"(\"a.weight\":{\"saved)")), "repeated"));
  EXPECT_TRUE(Says(Error(Replaced(text, R"({\"version\":1)", R"({\"version\":1,\"version\":1)")), "repeated"));
  EXPECT_TRUE(Says(Error(Replaced(text, R"({\"a.weight\":[8,3]})", R"({\"a.weight\":[8,3],\"a.weight\":[8,3]})")), "repeated"));
}

TEST(ShardIndex, NestingIsBounded) {
  Header h = Good();
  Json deep = 1;
  for (int i = 0; i < 13; ++i) deep = Json::array({deep});
  h.info["other"] = deep;
  EXPECT_EQ(Error(h.Parse()), "accepted");
  for (int i = 0; i < 200; ++i) deep = Json::array({std::move(deep)});
  h.info["other"] = std::move(deep);
  EXPECT_TRUE(Says(Error(h.Parse()), "nested too deeply"));
  EXPECT_NE(Error(",\"x\":" + std::string(1 << 20, '[')), "accepted");
  EXPECT_NE(Error("," + [] {
              std::string s;
              for (int i = 0; i < 100000; ++i) s += "\"x\":{";
              return s;
            }()),
            "accepted");
}

TEST(ShardIndex, TextMustBeStrictJsonInUtf8) {
  const std::string text = Good().Text();
  EXPECT_NE(Error(Replaced(text, "\"a.weight\"", "\"a.\xff\"")), "accepted");
  EXPECT_NE(Error(Replaced(text, "\"a.weight\"", "\"a.\xed\xa0\x80\"")), "accepted") << "surrogate";
  EXPECT_NE(Error(Replaced(text, "\"a.weight\"", "\"a.\xc0\xaf\"")), "accepted") << "overlong";
  EXPECT_NE(Error(Replaced(text, "\"a.weight\"", "\"a.\\ud800\"")), "accepted") << "half a pair";
  EXPECT_NE(Error(Replaced(text, "\"a.weight\"", "\"a.\n\"")), "accepted");
  EXPECT_NE(Error(Replaced(text, ",\"b\"", ",/*x*/\"b\"")), "accepted");
  EXPECT_NE(Error(Replaced(text, ",\"b\"", ",,\"b\"")), "accepted");
  std::string zero = text;
  zero.back() = '\0';
  EXPECT_TRUE(Says(Error(zero), "not a JSON object")) << "a parser that stops at a zero byte would not see what follows";
  EXPECT_NE(Error(Replaced(text, R"({\"version\":1)", R"(\u0000{\"version\":1)")), "accepted");
  EXPECT_NE(Error(Replaced(text, R"({\"version\":1)", R"(\ufeff{\"version\":1)")), "accepted") << "byte order mark";
  EXPECT_NE(Error(Replaced(text, R"("safepoint":"{)", R"("safepoint":"[{)")), "accepted");
}

TEST(ShardIndex, MetadataMustSpeakOfTheTensorsThatAreThere) {
  Header h = Good();
  h.sharding.erase("b");
  EXPECT_TRUE(Says(Error(h.Parse()), "missing in DCP_SHARDING_INFO"));
  h = Good();
  h.sharding["x"] = {{"saved_offsets", Json::array()}};
  EXPECT_TRUE(Says(Error(h.Parse()), "not in the file"));
  h = Good();
  h.info["global"]["x"] = {1};
  EXPECT_TRUE(Says(Error(h.Parse()), "not in the file"));
  h = Good();
  h.info["alias"] = {{"c", "x"}};
  EXPECT_TRUE(Says(Error(h.Parse()), "alias"));
  h = Good();
  h.info["alias"] = {{"b", "a.weight"}};
  EXPECT_TRUE(Says(Error(h.Parse()), "alias"));
  h = Good();
  h.info["version"] = 2;
  EXPECT_TRUE(Says(Error(h.Parse()), "unknown version 2"));
  h = Good();
  h.info.erase("version");
  EXPECT_NE(Error(h.Parse()), "accepted");
  EXPECT_TRUE(Says(Error(",\"format\":\"pt\"}}"), "no DCP_SHARDING_INFO"));
  EXPECT_TRUE(Says(Error("},\"format\":{}}"), "without dtype"));
  EXPECT_TRUE(Says(Error("}}"), "no DCP_SHARDING_INFO"));
}

TEST(ShardIndex, NamesAreBounded) {
  EXPECT_EQ(Error(Header().Tensor(std::string(1024, 'n'), "U8", {1}, 0, 1, {0}).Parse()), "accepted");
  EXPECT_TRUE(Says(Error(Header().Tensor(std::string(1025, 'n'), "U8", {1}, 0, 1, {0}).Parse()), "longer than 1024"));
  Header h = Good();
  h.info["expected"] = {std::string(1025, 'n')};
  EXPECT_TRUE(Says(Error(h.Parse()), "longer than 1024"));
}

TEST(ShardIndex, AnyMutationGivesAnErrorOrAConsistentIndex) {
  testing::Randomizer random(7);
  const std::string good = [] {
    std::string t = Good().Text();
    t.resize(t.find_last_not_of(' ') + 1);
    return t;
  }();
  for (int i = 0; i < 20000; ++i) {
    std::string text = good;
    for (uint64_t n = 1 + random.Next() % 3; n > 0; --n) {
      const size_t at = random.Next() % text.size();
      switch (random.Next() % 3) {
        case 0: text[at] = static_cast<char>(random.Next()); break;
        case 1: text.erase(at, random.Next() % 8); break;
        default: text.insert(at, text.substr(random.Next() % text.size(), random.Next() % 20)); break;
      }
    }
    const auto index = ShardIndex::ParseStaticPart(AsBytes(text));
    if (!index) continue;
    uint64_t bytes = 0;
    for (const TensorPiece& p : index->pieces) {
      ASSERT_LE(p.begin, p.end);
      bytes += p.end - p.begin;
    }
    ASSERT_EQ(bytes, index->data_bytes);
  }
}

// An alias of a dozen bytes refers to its target's three lists of up to 64 numbers, and does not copy them (I-26, I-40).
TEST(ShardIndex, AnAliasCopiesNoNumbers) {
  Header h;
  h.Tensor("w", "U8", std::vector<uint64_t>(64, 1), 0, 1, std::vector<uint64_t>(64, 0));
  for (int i = 0; i < 5000; ++i) h.info["alias"]["t" + std::to_string(i)] = "w";
  const auto index = h.Parse();
  ASSERT_TRUE(index.has_value()) << index.error().ToString();
  EXPECT_EQ(index->pieces.size(), 1u);
  EXPECT_EQ(index->aliases.size(), 5000u);
  EXPECT_LT(PackedIndex::Of(*index)->entries.size(), 5000u * 16);
}

// --- what a hostile header can cost (I-26, I-27)

// One text repeated with another key each time, until the header is full.
std::string Filled(size_t bytes, const std::string& head, const std::string& before, const std::string& after, const std::string& tail) {
  static const char kDigits[] = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-_";
  std::string text = head;
  for (uint32_t i = 0; text.size() + before.size() + after.size() + tail.size() + 8 < bytes; ++i) {
    text += text.ends_with('[') || text.ends_with('{') ? before.substr(1) : before;
    if (!after.empty()) {
      for (uint32_t left = i;; left >>= 6) {
        text.push_back(kDigits[left & 63]);
        if (left < 64) break;
      }
    }
    text += after;
  }
  return text + tail;
}

std::string Numbers(size_t count, char digit) {
  std::string text;
  for (size_t i = 0; i < count; ++i) text += std::string(i ? "," : "") + digit;
  return text;
}

// Scalars of a byte, or tensors without bytes: the numbers that take the most memory for their text.
std::string Tensors(size_t bytes, size_t dimensions) {
  std::string sharding, tensors;
  for (uint32_t i = 0; sharding.size() + tensors.size() + 1000 < bytes; ++i) {
    const std::string key = std::to_string(i);
    sharding += std::string(i ? "," : "") + R"(\")" + key + R"(\":{\"saved_offsets\":[)" + Numbers(dimensions, '0') + "]}";
    tensors += ",\"" + key + R"(":{"dtype":"U8","shape":[)" + Numbers(dimensions, '0') + R"(],"data_offsets":[)" +
               (dimensions == 0 ? key + "," + std::to_string(i + 1) : "0,0") + "]}";
  }
  return R"(,"DCP_SHARDING_INFO":"{)" + sharding + R"(}","safepoint":"{\"version\":1}"})" + tensors + "}";
}

uint64_t StatusKiB(const char* name) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(name)) return std::stoull(line.substr(line.find(':') + 1));
  }
  return 0;
}

struct Cost {
  bool accepted = false;
  double peak = 0, kept = 0, parse_ms = 0, check_ms = 0;  // The first two in bytes per byte of text.
};

Cost CostOf(const std::string& text) {
  const auto now = [] { return static_cast<double>(std::clock()) * 1000 / CLOCKS_PER_SEC; };  // Of this process: others may keep the machine busy.
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const pid_t child = fork();  // Its peak begins at what it has.
  if (child == 0) {
    Cost cost;
    const uint64_t before = StatusKiB("VmRSS");
    double begin = now();
    std::shared_ptr<PackedIndex> packed;
    {
      const std::vector<uint8_t> bytes(text.begin(), text.end());  // As the daemon reads it.
      auto index = ShardIndex::ParseStaticPart(bytes);
      if (index) packed = PackedIndex::Of(std::move(*index));
    }
    cost.parse_ms = now() - begin;
    cost.peak = static_cast<double>((StatusKiB("VmHWM") - before) << 10) / static_cast<double>(text.size());
    begin = now();
    cost.accepted = packed != nullptr;
    if (packed) {
      cost.kept = static_cast<double>(packed->cost() + packed->expected->cost()) / static_cast<double>(text.size());
      (void)CheckCoverage({packed.get()});
    }
    cost.check_ms = now() - begin;
    if (write(ends[1], &cost, sizeof cost) != sizeof cost) _exit(1);
    _exit(0);
  }
  Cost cost;
  EXPECT_EQ(read(ends[0], &cost, sizeof cost), static_cast<ssize_t>(sizeof cost));
  waitpid(child, nullptr, 0);
  close(ends[0]);
  close(ends[1]);
  return cost;
}

TEST(ShardIndex, I27_MemoryFollowsTheTextOfAHostileHeader) {
  const char* mib = std::getenv("SP_HEADER_MIB");  // docs/operating/limits.md says what 16 give.
  const size_t bytes = (mib ? std::stoull(mib) : 2) << 20;
  const std::string info = R"(,"DCP_SHARDING_INFO":"{\".\":{\"saved_offsets\":[)" + Numbers(64, '0') + R"(]}}","safepoint":"{\"version\":1)";
  const std::string tensor = R"(}"},".":{"dtype":"U8","shape":[)" + Numbers(64, '1') + R"(],"data_offsets":[0,1]}})";
  const auto field = [&](const char* name, const char* open, const char* after, const char* close, const char* before = R"(,\")") {
    return Filled(bytes, info + R"(,\")" + name + R"(\":)" + open, before, after, close + tensor);
  };
  const std::pair<const char*, std::string> headers[] = {
      {"names expected, all empty", field("expected", "[", "", "]", R"(,\"\")")},
      {"names expected", field("expected", "[", R"(\")", "]")},
      {"aliases", field("alias", "{", R"(\":\".\")", "}")},
      {"names", field("name", "{", R"(\":\"\")", "}")},
      {"global shapes without dimensions", field("global", "{", R"(\":[])", "}")},
      {"global shapes", field("global", "{", (R"(\":[)" + Numbers(64, '1') + "]").c_str(), "}")},
      {"raw shapes", field("raw", "{", R"(\":{\"shape\":[]})", "}")},
      {"fields of a later version", Filled(bytes, info, R"(,\"~)", R"(\":0)", tensor)},
      {"metadata", Filled(bytes, ",\"x\":\"\"", ",\"m", "\":\"\"", info + tensor)},
      {"scalars", Tensors(bytes, 0)},
      {"vectors", Tensors(bytes, 1)},
      {"tensors of 64 dimensions", Tensors(bytes, 64)}};
  for (const auto& [name, text] : headers) {
    const Cost cost = CostOf(text);
    std::printf("%-34s %s peak %5.2f kept %5.2f bytes per byte; parse %6.0f ms, check %6.0f ms\n", name, cost.accepted ? "accepted" : "refused ", cost.peak, cost.kept, cost.parse_ms, cost.check_ms);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    EXPECT_LT(cost.peak, 10 + 8.0 * (1 << 20) / static_cast<double>(bytes)) << name;
#endif
    EXPECT_LT(cost.kept, 5) << name;
  }
}

}  // namespace
}  // namespace sp
