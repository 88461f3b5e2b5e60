// Manifests, and the lineages beside them (T-5). Property: the text is canonical, so what parses is made again byte for byte, and every record hashes to
// its identity; a lineage goes down only.
//
// An input that begins with '{' is a text. Any other is a list of changes to a true manifest, because no mutation finds the hashes in one: first the
// number of ranks, then (where, what) for bytes of the records before the text is made and of the text.
#include "format/manifest.h"

#include "format/stored_step.h"

#include "base/sha256.h"
#include "fuzz.h"

namespace {

using namespace sp;

void TryLineage(std::string_view text) {
  const auto lineage = ParseLineage(text);
  if (!lineage) {
    SP_CHECK(lineage.error().code() == StatusCode::kProtocol);
    return;
  }
  SP_CHECK(MakeLineage(*lineage) == text);
  for (size_t i = 1; i < lineage->size(); ++i) SP_CHECK((*lineage)[i].generation < (*lineage)[i - 1].generation);
}

void TryKey(std::string_view text) {
  if (const auto name = ParseManifestKey(text)) SP_CHECK(name->Prefix() + "manifest.json" == text);
}

void TryText(std::string_view text) {
  TryKey(text);
  TryLineage(text);
  fuzz::AllocationMeter meter;
  const auto records = ParseManifest(text);
  SP_CHECK(meter.bytes() <= 64 * text.size() + 16384);
  if (!records) {
    SP_CHECK(records.error().code() == StatusCode::kProtocol);
    return;
  }
  SP_CHECK(MakeManifest(*records) == text);
  const SealRecord of_text = ManifestRecord(*records, std::string(text));
  SP_CHECK(SealRecord::Decode(of_text.Encode()) == of_text);
}

std::vector<SealRecord> Records(uint32_t world_size) {
  std::vector<SealRecord> records(world_size);
  for (uint32_t rank = 0; rank < world_size; ++rank) {
    SealRecord& r = records[rank];
    r.key.ns = "run";
    r.key.step = 10;
    r.attempt = r.key.AttemptId();
    r.world_size = world_size;
    r.rank = rank;
    r.length_bytes = 10000;
    r.header_bytes = 8192;
    r.static_offset = 4096;
  }
  return records;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const ByteSpan bytes(data, size);
  TryText(AsText(bytes));
  if (size == 0 || data[0] == '{') return 0;
  fuzz::Numbers in(bytes);
  std::vector<SealRecord> records = Records(1 + in.U8() % 5);
  for (uint8_t changes = in.U8() % 4; changes > 0; --changes) {
    SealRecord& r = records[in.U8() % records.size()];
    switch (in.U8() % 8) {
      case 0: r.length_bytes = in.U64(); break;
      case 1: r.header_bytes = in.U64(); break;
      case 2: r.static_offset = in.U64(); break;
      case 3: r.whole_crc = in.U32(); break;
      case 4: r.structure.bytes[in.U8() % 32] = in.U8(); break;
      case 5: r.block_root.bytes[in.U8() % 32] = in.U8(); break;
      case 6:
        for (SealRecord& each : records) each.key.step = in.U64(), each.key.generation = each.key.step + 1;
        break;
      default:
        for (SealRecord& each : records) each.key.ns.assign(in.U8() % 201, static_cast<char>(in.U8()));
        break;
    }
  }
  bool valid = true;
  for (SealRecord& r : records) {
    r.key = records[0].key;
    r.attempt = r.key.AttemptId();
    valid = valid && SealRecord::Decode(r.Encode()).has_value();
  }
  std::string text = MakeManifest(records);
  const auto parsed = ParseManifest(text);
  SP_CHECK(parsed.has_value() == valid);
  if (parsed) {
    SP_CHECK(*parsed == records);
    const auto name = ParseManifestKey(ManifestObjectKey(records[0].key));
    SP_CHECK(name && name->attempt == records[0].attempt && name->Prefix() == StepPrefix(records[0].key));
    for (const std::string& key : {ShardObjectKey(records[0]), ChecksumsObjectKey(records[0]), LineageObjectKey(records[0].key)}) {
      SP_CHECK(key.starts_with(name->Prefix()) && !ParseManifestKey(key));
    }
  }
  while (!in.done()) {
    const size_t at = in.U16() % text.size();
    if (in.U8() % 4 != 0) text[at] = static_cast<char>(in.U8());
    else text.insert(at, 1, static_cast<char>(in.U8()));
  }
  TryText(text);
  return 0;
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  std::vector<Input> seeds;
  ledger::Generation child{1000, "run", 7, {}, 2, true, {}, 3, 800, false, true};
  seeds.push_back(AsInput(MakeLineage({child, ledger::Generation{1000, "run", 3, {}, 4, false, {}, 0, 0, true, true}})));
  const std::string lineage = MakeLineage({child, ledger::Generation{1000, "run", 3, {}, 4, false, {}, 0, 0, true, true}});
  for (const auto& [from, to] : {std::pair("safepoint-lineage", "safepoint-manifest"), std::pair("\"version\":1", "\"version\":2"),
                                 std::pair("\"uid\":1000", "\"uid\":\"x\""), std::pair("\"uid\":1000", "\"uid\":1001"),
                                 std::pair("\"namespace\":\"run\"", "\"namespace\":\"..\""), std::pair("\"fresh\"", "\"stale\""),
                                 std::pair("\"nonce\":\"0", "\"nonce\":\"X"), std::pair("\"attempt\":\"0", "\"attempt\":\"X"),
                                 std::pair("\"world_size\":2", "\"world_size\":0"), std::pair("\"step\":800", "\"step\":18446744073709551615"),
                                 std::pair("\"generation\":3,\"nonce\"", "\"generation\":9,\"nonce\""), std::pair("}]}", "}] }"), std::pair("[{", "[7,{"),
                                 std::pair("\"generations\":[", "\"generations\":{\"a\":[")}) {
    std::string text = lineage;
    text.replace(text.find(from), std::string_view(from).size(), to);
    seeds.push_back(AsInput(text));
  }
  seeds.push_back(AsInput(MakeLineage({})));
  seeds.push_back(AsInput(std::string("[]")));
  child.parent_generation = 9;
  seeds.push_back(AsInput(MakeLineage({child})));
  const std::string id(32, 'a');
  for (const std::string& key : {"run/step-10/" + id + "/manifest.json", "run/step-010/" + id + "/manifest.json", "run/step-10/" + id,
                                 std::string("run"), "../step-10/" + id + "/manifest.json", "run/move-10/" + id + "/manifest.json",
                                 "run/step-x/" + id + "/manifest.json", "run/step-99999999999999999999/" + id + "/manifest.json",
                                 "run/step-10/" + std::string(32, 'X') + "/manifest.json", std::string("run/step-10/short")}) {
    seeds.push_back(AsInput(key));
  }
  const std::string one = MakeManifest(Records(1)), three = MakeManifest(Records(3));
  seeds.push_back(AsInput(one));
  seeds.push_back(AsInput(three));
  const auto with = [&](std::string_view from, std::string_view to) {
    std::string text = three;
    text.replace(text.find(from), from.size(), to);
    seeds.push_back(AsInput(text));
  };
  with("\"version\":1", "\"version\":2");
  with("\"version\":1", "\"version\":01");
  with("\"world_size\":3", "\"world_size\":0");
  with("\"world_size\":3", "\"world_size\":2");
  with("\"world_size\":3", "\"world_size\":4");
  with("\"world_size\":3", "\"world_size\":65537");
  with("\"world_size\":3", "\"world_size\":99999999999999999999");
  with("\"rank\":1", "\"rank\":0");
  with("\"rank\":1", "\"rank\":2");
  with("\"length\":10000", "\"length\":18446744073709551615");
  with("\"length\":10000", "\"length\":-1");
  with("\"length\":10000", "\"length\": 10000");
  with("\"namespace\":\"run\"", "\"namespace\":\"\"");
  with("\"namespace\":\"run\"", "\"namespace\":\"../run\"");
  with("\"record\":\"", "\"record\":\"0");
  with("]}", "]}\n");
  seeds.push_back(Input(three.begin(), three.begin() + 300));
  seeds.push_back({1, 0});
  seeds.push_back({4, 1, 0, 3, 1, 2, 3, 4, 10, 0, 1, 'x'});
  seeds.push_back({3, 1, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff});
  seeds.push_back({3, 1, 0, 7, 200, 'a'});
  seeds.push_back({3, 1, 0, 7, 3, '/'});
  return seeds;
}
