#include "format/stored_step.h"

#include <gtest/gtest.h>

namespace sp {
namespace {

AttemptKey Key() {
  AttemptKey key{1000, "run-3", 7, {}, 1200, 0};
  key.nonce.bytes[0] = 9;
  return key;
}

SealRecord Record(uint32_t rank) {
  SealRecord record;
  record.key = Key();
  record.attempt = record.key.AttemptId();
  record.world_size = 2;
  record.rank = rank;
  return record;
}

std::vector<ledger::Generation> Lineage() {
  ledger::Generation child{1000, "run-3", 7, Key().nonce, 2, true, {}, 3, 800, false, true};
  child.parent.bytes[3] = 5;
  ledger::Generation parent{1000, "run-3", 3, {}, 4, false, {}, 0, 0, true, true};
  parent.nonce.bytes[1] = 1;
  return {child, parent};
}

TEST(StoredStep, I24_KeysContainTheAttempt) {
  const std::string prefix = "run-3/step-1200/" + Key().AttemptId().ToHex() + "/";
  EXPECT_EQ(StepPrefix(Key()), prefix);
  EXPECT_EQ(ShardObjectKey(Record(1)), prefix + "rank-1.safetensors");
  EXPECT_EQ(ChecksumsObjectKey(Record(1)), prefix + "rank-1.crc32c");
  EXPECT_EQ(ManifestObjectKey(Key()), prefix + "manifest.json");
  AttemptKey again = Key();
  again.try_number = 1;
  EXPECT_NE(StepPrefix(again), prefix);
}

TEST(StoredStep, ManifestKeysAreReadBackAndNothingElseIs) {
  const auto name = ParseManifestKey(ManifestObjectKey(Key()));
  ASSERT_TRUE(name);
  EXPECT_EQ(*name, (StepName{"run-3", 1200, Key().AttemptId()}));
  EXPECT_EQ(name->Prefix(), StepPrefix(Key()));
  const std::string id = Key().AttemptId().ToHex();
  for (const std::string& foreign :
       {std::string(), std::string("manifest.json"), "run-3/step-01200/" + id + "/manifest.json", "run-3/step-1200/" + id + "/rank-0.safetensors",
        "../step-1200/" + id + "/manifest.json", "run-3/step-1200/" + id.substr(1) + "/manifest.json", "run-3/step--1/" + id + "/manifest.json",
        "a/run-3/step-1200/" + id + "/manifest.json", "run-3/step-99999999999999999999/" + id + "/manifest.json"}) {
    EXPECT_FALSE(ParseManifestKey(foreign)) << foreign;
  }
}

TEST(StoredStep, LineageIsReadBack) {
  const std::string text = MakeLineage(Lineage());
  EXPECT_EQ(text.find('\n'), std::string::npos);
  const auto read = ParseLineage(text);
  ASSERT_TRUE(read) << read.error().ToString();
  EXPECT_EQ(*read, Lineage());
}

TEST(StoredStep, I35_LineagesThatCannotBeAreRefused) {
  const auto refused = [](const std::string& text) { return ParseLineage(text).has_value() ? StatusCode::kOk : ParseLineage(text).error().code(); };
  EXPECT_EQ(refused(""), StatusCode::kProtocol);
  EXPECT_EQ(refused("[]"), StatusCode::kProtocol);
  EXPECT_EQ(refused(MakeLineage({})), StatusCode::kProtocol);
  const std::string good = MakeLineage(Lineage());
  EXPECT_EQ(refused(good + " "), StatusCode::kProtocol);
  for (const auto& [from, to] : {std::pair("\"version\":1", "\"version\":2"), std::pair("\"uid\":1000", "\"uid\":-1"), std::pair("run-3", "run/3"),
                                 std::pair("\"generation\":3", "\"generation\":9"), std::pair("\"fresh\":false", "\"fresh\":0")}) {
    std::string text = good;
    text.replace(text.find(from), std::string(from).size(), to);
    EXPECT_EQ(refused(text), StatusCode::kProtocol) << text;
  }
  // Numbers that no 64 or 32 bits hold: converting them would be undefined behaviour.
  const auto with = [&](const std::string& name, const std::string& value) {
    const size_t at = good.find("\"" + name + "\":") + name.size() + 3;
    return good.substr(0, at) + value + good.substr(good.find_first_of(",}", at));
  };
  for (const char* name : {"uid", "generation", "world_size", "step"}) {
    for (const char* value : {"18446744073709551616", "1.8446744073709551616e19", "-1", "1e30", "2.0", "\"2\""}) {
      EXPECT_EQ(refused(with(name, value)), StatusCode::kProtocol) << name << " " << value;
    }
  }
  EXPECT_EQ(refused(with("uid", "4294967296")), StatusCode::kProtocol);
  auto unrelated = Lineage();
  unrelated[0].has_parent = false;
  EXPECT_EQ(refused(MakeLineage(unrelated)), StatusCode::kProtocol);
}

}  // namespace
}  // namespace sp
