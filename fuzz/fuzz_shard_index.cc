// Static parts of shard headers, and the coverage check on what they say. Properties: pieces tile the data and lie inside their tensors; memory and
// work are bounded by the size of the text; two reads agree. The dynamic part is read by clients only: tests/python/test_fuzz_headers.py.
#include "format/shard_index.h"

#include <algorithm>

#include "fuzz.h"

namespace {

// An element of "expected" takes four bytes of text and a string, in a vector that grows by doubling; a piece has three vectors besides.
constexpr size_t kBytesPerByteMax = 80, kBytesBesideMax = 16 << 10;
// Corners of the coverage check beside those that each piece has (format/coverage.cc).
constexpr size_t kCoverageBytesMax = 5 << 20;

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sp;
  const size_t bound = kBytesPerByteMax * size + kBytesBesideMax;
  fuzz::AllocationMeter parse;
  const auto index = ShardIndex::ParseStaticPart({data, size});
  SP_CHECK(parse.bytes() <= bound);
  if (!index) {
    SP_CHECK(index.error().code() == StatusCode::kProtocol);
    return 0;
  }
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const TensorPiece& p : index->pieces) {
    SP_CHECK(p.begin <= p.end && p.end <= index->data_bytes);
    SP_CHECK(p.offsets.size() == p.shape.size() && p.global_shape.size() == p.shape.size());
    for (size_t d = 0; d < p.shape.size(); ++d) SP_CHECK(p.offsets[d] <= p.global_shape[d] && p.shape[d] <= p.global_shape[d] - p.offsets[d]);
    ranges.emplace_back(p.begin, p.end);
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t end = 0;
  for (const auto& [from, to] : ranges) {
    SP_CHECK(from <= end);
    end = std::max(end, to);
  }
  SP_CHECK(end == index->data_bytes);
  const auto again = ShardIndex::ParseStaticPart({data, size});
  SP_CHECK(again && again->pieces == index->pieces && again->expected == index->expected && again->data_bytes == index->data_bytes);
  SP_CHECK(again->aliases == index->aliases);
  for (const PieceAlias& alias : index->aliases) SP_CHECK(alias.piece < index->pieces.size());
  const auto packed = PackedIndex::Of(*index), packed_again = PackedIndex::Of(*again);
  SP_CHECK(packed->count == index->pieces.size() + index->aliases.size());
  fuzz::AllocationMeter check;
  const Status covered = CheckCoverage({packed.get()});
  SP_CHECK(check.bytes() <= bound + kCoverageBytesMax);
  SP_CHECK(CheckCoverage({packed.get(), packed_again.get()}).code() == covered.code());  // Identical pieces may repeat.
  return 0;
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  const std::string_view good[] = {
      R"(,"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":"{}","safepoint":"{\"version\":1}"}})",
      R"(,"DCP_SHARDING_INFO":"{\"a\":{\"saved_offsets\":[0,0]},\"a@1\":{\"saved_offsets\":[2,0]}}",)"
      R"("safepoint":"{\"version\":1,\"global\":{\"a\":[4,3],\"a@1\":[4,3]},\"name\":{\"a@1\":\"a\"},\"alias\":{\"t\":\"a\"},\"path\":{\"a\":[\"x\",0]},\"expected\":[\"a\"]}"},)"
      R"("a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"a@1":{"dtype":"F32","shape":[2,3],"data_offsets":[24,48]}}   )",
      R"(,"DCP_SHARDING_INFO":"{\"c\":{\"saved_offsets\":[0]},\"s\":{\"saved_offsets\":[]}}",)"
      R"("safepoint":"{\"version\":1,\"raw\":{\"c\":{\"dtype\":\"complex128\",\"shape\":[1]}}}"},)"
      R"("c":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},"s":{"dtype":"BF16","shape":[],"data_offsets":[16,18]}})"};
  std::vector<Input> seeds;
  for (const std::string_view text : good) {
    seeds.push_back(AsInput(text));
    SP_CHECK(ShardIndex::ParseStaticPart(seeds.back()).has_value());
  }
  const auto with = [&](std::string_view base, std::string_view from, std::string_view to) {
    std::string text(base);
    text.replace(text.find(from), from.size(), to);
    seeds.push_back(AsInput(text));
  };
  with(good[1], "[24,48]", "[23,47]");                     // Overlap.
  with(good[1], "[24,48]", "[25,49]");                     // Gap.
  with(good[1], "[24,48]", "[48,24]");
  with(good[1], "[24,48]", "[24,48,72]");
  with(good[1], "[2,3],\"data_offsets\":[24", "[4294967296,4294967296,2],\"data_offsets\":[24");  // The product overflows.
  with(good[1], "[2,3],\"data_offsets\":[24", "[0,18446744073709551615,3],\"data_offsets\":[24");
  with(good[1], "[2,3],\"data_offsets\":[24", "[-2,3],\"data_offsets\":[24");
  with(good[1], "[2,3],\"data_offsets\":[24", "[2e0,3],\"data_offsets\":[24");
  with(good[1], "\"F32\"", "\"F4\"");
  with(good[1], "\"F32\"", "\"X\"");
  with(good[1], "[2,0]", "[3,0]");                         // Beyond the global shape.
  with(good[1], "[2,0]", "[18446744073709551615,0]");
  with(good[1], "[2,0]", "[1,0]");                         // Partial overlap in the tensor.
  with(good[1], "\\\"a@1\\\":[4,3]", "\\\"a@1\\\":[5,3]");
  with(good[1], "\\\"a@1\\\":[4,3]", "\\\"b\\\":[4,3]");
  with(good[1], "\\\"t\\\":\\\"a\\\"", "\\\"a\\\":\\\"a\\\"");
  with(good[1], "\\\"t\\\":\\\"a\\\"", "\\\"t\\\":\\\"u\\\"");
  with(good[1], "[\\\"a\\\"]", "[\\\"missing\\\"]");
  with(good[1], "\\\"version\\\":1", "\\\"version\\\":2");
  with(good[1], "\\\"version\\\":1", "\\\"version\\\":1,\\\"version\\\":1");
  with(good[1], "\"a@1\":{", "\"a\":{");                   // Repeated key.
  with(good[1], "[\\\"x\\\",0]", "[[[[[[[[[[[[[[[[0]]]]]]]]]]]]]]]]");
  with(good[1], "\"shape\":[2,3],", "");
  with(good[1], "\\\"a@1\\\":[4,3]", "\\\"a@1\\\":[4,3],\\\"a@1\\\":[4,3]");
  with(good[1], "[4,3],\\\"a@1\\\":[4,3]", "[18446744073709551615,3],\\\"a@1\\\":[18446744073709551615,3]");
  with(good[1], "[4,3],\\\"a@1\\\":[4,3]", "[8,3],\\\"a@1\\\":[8,3]");
  with(good[1], "\\\"name\\\":{", "\\\"name\\\":{\\\"t\\\":\\\"a\\\",");
  with(good[1], "\\\"path\\\":{", "\\\"other\\\":{\\\"x\\\":[1,-1,null,true,1.5,{}]},\\\"path\\\":{");
  with(good[1], "\\\"version\\\":1", "\\\"version\\\":{}");
  with(good[1], "\\\"version\\\":1", "\\\"version\\\":[1]");
  with(good[1], "\\\"version\\\":1", "\\\"version\\\":\\\"1\\\"");
  with(good[1], "\\\"saved_offsets\\\":[2,0]", "");
  with(good[1], "\\\"saved_offsets\\\":[2,0]", "\\\"saved\\\":[2,0]");
  with(good[1], "\\\"saved_offsets\\\":[2,0]", "\\\"saved_offsets\\\":[2,0],\\\"saved_offsets\\\":[2,0]");
  with(good[1], "\\\"saved_offsets\\\":[2,0]", "\\\"saved_offsets\\\":[[2,0]]");
  with(good[1], "\\\"saved_offsets\\\":[2,0]", "\\\"saved_offsets\\\":{}");
  with(good[1], "\\\"a@1\\\":{\\\"saved_offsets\\\":[2,0]}", "\\\"a\\\":{\\\"saved_offsets\\\":[2,0]}");
  with(good[1], "\"a@1\":{\"dtype\"", "\"a@1\":{\"shape\":{},\"dtype\"");
  with(good[1], "\"a@1\":{\"dtype\"", "\"a@1\":[{\"dtype\"");
  with(good[1], "\"a@1\":{\"dtype\"", "\"a@1\":1,\"x\":{\"dtype\"");
  with(good[1], "\"a@1\":{\"dtype\"", "\"a@1\":\"text\",\"x\":{\"dtype\"");
  with(good[1], "\"a@1\":{\"dtype\":\"F32\"", "\"a@1\":{\"dtype\":\"I32\"");
  with(good[1], "\"DCP_SHARDING_INFO\"", "\"deep\":[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]],\"DCP_SHARDING_INFO\"");
  with(good[1], "\"a\":{\"dtype\"", "\"" + std::string(1100, 'a') + "\":{\"dtype\"");
  seeds.push_back({});
  seeds.push_back(AsInput(std::string_view(",\0", 2)));
  seeds.push_back(AsInput(R"(,"DCP_SHARDING_INFO":"[]","safepoint":"{}"}})"));
  seeds.push_back(AsInput(R"(,"DCP_SHARDING_INFO":"{}","safepoint":""}})"));
  // One tensor in two pieces that overlap in part, and as many elements as the whole; one without elements.
  seeds.push_back(AsInput(
      R"(,"DCP_SHARDING_INFO":"{\"p\":{\"saved_offsets\":[0,0]},\"q\":{\"saved_offsets\":[1,1]}}","safepoint":"{\"version\":1,)"
      R"(\"global\":{\"p\":[2,2],\"q\":[2,2]},\"name\":{\"p\":\"w\",\"q\":\"w\"}}"},)"
      R"("p":{"dtype":"U8","shape":[2,1],"data_offsets":[0,2]},"q":{"dtype":"U8","shape":[1,1],"data_offsets":[2,3]}})"));
  seeds.push_back(AsInput(
      R"(,"DCP_SHARDING_INFO":"{\"p\":{\"saved_offsets\":[0,0]},\"q\":{\"saved_offsets\":[0,0]}}","safepoint":"{\"version\":1,)"
      R"(\"global\":{\"p\":[2,2],\"q\":[2,2]},\"name\":{\"p\":\"w\",\"q\":\"w\"}}"},)"
      R"("p":{"dtype":"U8","shape":[2,1],"data_offsets":[0,2]},"q":{"dtype":"U8","shape":[1,2],"data_offsets":[2,4]}})"));
  seeds.push_back(AsInput(
      R"(,"DCP_SHARDING_INFO":"{\"p\":{\"saved_offsets\":[0]},\"q\":{\"saved_offsets\":[0]}}","safepoint":"{\"version\":1,)"
      R"(\"global\":{\"p\":[3]}}"},"p":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"q":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})"));
  with(good[1], "\"DCP_SHARDING_INFO\"", "\"OTHER\"");
  with(good[2], "\\\"shape\\\":[1]", "\\\"shape\\\":[1],\\\"shape\\\":[1]");
  with(good[2], "\\\"shape\\\":[1]", "\\\"other\\\":[1]");
  with(good[2], "\"BF16\"", "\"\\ud800\"");
  // Many dimensions, all split, and exactly as many elements as needed: the dearest thing to check. Each piece is half of what the ones before left.
  constexpr int kDims = 17;
  uint64_t begin = 0;
  std::string offsets, global, name, entries;
  for (int i = 0; i <= kDims; ++i) {
    const std::string key = "w@" + std::to_string(i), comma = i ? "," : "";
    std::string at, whole, shape;
    for (int d = 0; d < kDims; ++d) {
      at += std::string(d ? "," : "") + (i > d ? "1" : "0");
      whole += std::string(d ? "," : "") + "2";
      shape += std::string(d ? "," : "") + (d < i || i == kDims ? "1" : d == i ? "1" : "2");
    }
    const uint64_t elements = i == kDims ? 1 : uint64_t{1} << (kDims - 1 - i);
    offsets += comma + R"(\")" + key + R"(\":{\"saved_offsets\":[)" + at + "]}";
    global += comma + R"(\")" + key + R"(\":[)" + whole + "]";
    name += comma + R"(\")" + key + R"(\":\"w\")";
    entries += ",\"" + key + R"(":{"dtype":"U8","shape":[)" + shape + R"(],"data_offsets":[)" + std::to_string(begin) + "," +
               std::to_string(begin + elements) + "]}";
    begin += elements;
  }
  seeds.push_back(AsInput(R"(,"DCP_SHARDING_INFO":"{)" + offsets + R"(}","safepoint":"{\"version\":1,\"global\":{)" + global + R"(},\"name\":{)" + name +
                          R"(}}"})" + entries + "}"));
  SP_CHECK(ShardIndex::ParseStaticPart(seeds.back()).has_value());
  // Many names for one tensor of many dimensions.
  std::string dims = "1", zeros = "0", alias;
  for (int d = 1; d < 64; ++d) dims += ",1", zeros += ",0";
  for (int i = 0; i < 60; ++i) alias += std::string(i ? "," : "") + R"(\"t)" + std::to_string(i) + R"(\":\"w\")";
  seeds.push_back(AsInput(R"(,"DCP_SHARDING_INFO":"{\"w\":{\"saved_offsets\":[)" + zeros + R"(]}}","safepoint":"{\"version\":1,\"alias\":{)" + alias +
                          R"(}}"},"w":{"dtype":"U8","shape":[)" + dims + R"(],"data_offsets":[0,1]}})"));
  return seeds;
}
