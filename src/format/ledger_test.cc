#include "format/ledger.h"

#include <set>

#include "format/fixed_layout.h"
#include "format/test_values.h"

namespace sp {
namespace {

using testing::GoldenRecord;
using testing::Hex;
using testing::Randomizer;
using testing::RandomValue;

constexpr size_t kMemoryBytes = Ledger::kHeaderBytes + 2 * 1024;

// From a second implementation, written from docs/formats/ledger.md only.
constexpr char kGoldenTombstone[] =
    "53504c45476c246b31000000080098f2e80300000d0000006c6c616d612d37625f72756e33cdea75522fb0fd08fa0a94"
    "4de9436afd01070000007265746972656400000000000000";
constexpr char kGoldenHeader[] = "53504c45444745520100000036bde385000400000000000048000000000a1744";

LedgerEntry GoldenTombstone() {
  const SealRecord r = GoldenRecord(0);
  return ledger::Tombstone{r.key.uid, r.key.ns, r.attempt, ledger::TombstoneWhy::kRetired, "retired"};
}

template <size_t I = 0>
LedgerEntry RandomEntry(Randomizer& random, size_t index) {
  if constexpr (I < std::variant_size_v<LedgerEntry>) {
    if (index != I) return RandomEntry<I + 1>(random, index);
    return LedgerEntry(std::in_place_index<I>, RandomValue<std::variant_alternative_t<I, LedgerEntry>>(random));
  } else {
    return {};
  }
}
constexpr size_t kTypes = std::variant_size_v<LedgerEntry>;

using Memory = std::vector<uint64_t>;  // Aligned to 8 bytes.
Memory Blank(size_t bytes = kMemoryBytes) { return Memory(bytes / 8); }
MutableByteSpan Bytes(Memory& m) { return {reinterpret_cast<uint8_t*>(m.data()), m.size() * 8}; }

Ledger::Contents ReadAll(Memory m) { return Ledger::Open(Bytes(m)).value().Read(); }

TEST(LedgerEntry, GoldenBytes) {
  EXPECT_EQ(Hex(EncodeLedgerEntry(GoldenTombstone())), kGoldenTombstone);
  Memory m = Blank();
  Ledger log = Ledger::Open(Bytes(m)).value();
  ASSERT_TRUE(log.Append(GoldenTombstone()).ok());
  EXPECT_EQ(Hex(Bytes(m).first(32)), kGoldenHeader);
  EXPECT_TRUE(layout::AllZero(Bytes(m).subspan(32, Ledger::kHeaderBytes - 32)));
  EXPECT_EQ(Hex(Bytes(m).subspan(Ledger::kHeaderBytes, log.used_bytes())), kGoldenTombstone);
}

TEST(LedgerEntry, RoundTripAndTruncationOfEveryType) {
  Randomizer random(1);
  for (size_t type = 0; type < kTypes; ++type) {
    for (int i = 0; i < 100; ++i) {
      const LedgerEntry entry = RandomEntry(random, type);
      const std::vector<uint8_t> bytes = EncodeLedgerEntry(entry);
      ASSERT_EQ(bytes.size() % 8, 0u);
      uint64_t consumed = 0;
      const auto decoded = DecodeLedgerEntry(bytes, &consumed);
      ASSERT_TRUE(decoded.has_value()) << decoded.error().ToString();
      ASSERT_EQ(*decoded, entry);
      ASSERT_EQ(consumed, bytes.size());
      for (size_t n = 0; n < bytes.size(); ++n) ASSERT_FALSE(DecodeLedgerEntry(ByteSpan(bytes).first(n), &consumed).has_value()) << n;
    }
  }
}

TEST(LedgerEntry, EverySingleBitFlipIsRefused_F72) {
  Randomizer random(2);
  for (size_t type = 0; type < kTypes; ++type) {
    std::vector<uint8_t> bytes = EncodeLedgerEntry(RandomEntry(random, type));
    for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
      bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
      uint64_t consumed;
      ASSERT_FALSE(DecodeLedgerEntry(bytes, &consumed).has_value()) << "type " << type + 1 << " bit " << bit;
      bytes[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    }
  }
}

TEST(Ledger, KeepsWhatWasAppendedOverReopen_I25) {
  Randomizer random(3);
  Memory m = Blank(1 << 20);
  std::vector<LedgerEntry> expected;
  for (int reopen = 0; reopen < 20; ++reopen) {
    Ledger log = Ledger::Open(Bytes(m)).value();
    EXPECT_EQ(log.Read().entries, expected);
    for (int i = 0; i < 20; ++i) {
      expected.push_back(RandomEntry(random, random.Next() % kTypes));
      ASSERT_TRUE(log.Append(expected.back()).ok());
    }
    if (reopen % 5 == 4) {
      expected.resize(expected.size() / 2);
      ASSERT_TRUE(log.Compact(expected).ok());
    }
    EXPECT_EQ(log.Read().damaged_entries, 0u);
  }
}

TEST(Ledger, FullIsRefusedAndLeavesTheLog) {
  Memory m = Blank();
  Ledger log = Ledger::Open(Bytes(m)).value();
  EXPECT_EQ(log.area_bytes(), 1024u);
  std::vector<LedgerEntry> entries;
  const uint64_t each = EncodeLedgerEntry(GoldenTombstone()).size();
  for (uint64_t used = 0; used + each <= log.area_bytes(); used += each) {
    ASSERT_TRUE(log.Append(GoldenTombstone()).ok());
    entries.push_back(GoldenTombstone());
    ASSERT_EQ(log.used_bytes(), used + each);
  }
  const Memory before = m;
  EXPECT_EQ(log.Append(GoldenTombstone()).code(), StatusCode::kNoSpace);
  EXPECT_EQ(m, before);
  std::vector<LedgerEntry> too_many = entries;
  too_many.push_back(GoldenTombstone());
  EXPECT_EQ(log.Compact(too_many).code(), StatusCode::kNoSpace);
  EXPECT_EQ(log.Read().entries, entries);
  EXPECT_EQ(ReadAll(m).entries, entries);
  ASSERT_TRUE(log.Compact({GoldenTombstone()}).ok());
  EXPECT_EQ(log.used_bytes(), each);
  EXPECT_EQ(ReadAll(m).entries.size(), 1u);
  ASSERT_TRUE(log.Compact(entries).ok()) << "back into the first area";
  EXPECT_EQ(ReadAll(m).entries, entries);
}

// A kill after k bytes of the copy, for every k, in the order in which the header comment of ledger.cc states them.
// ledger_kill_test.cc shows that the code keeps this order.
TEST(Ledger, PrefixesOfAppendAndCompactAreTheOldLog_I25) {
  Memory before = Blank();
  Ledger log = Ledger::Open(Bytes(before)).value();
  const std::vector<LedgerEntry> old = {GoldenTombstone(), ledger::SlotGone{5}};
  for (const LedgerEntry& e : old) ASSERT_TRUE(log.Append(e).ok());
  for (const bool compact : {false, true}) {
    Memory after = before;
    Ledger changed = Ledger::Open(Bytes(after)).value();
    ASSERT_TRUE((compact ? changed.Compact({ledger::SlotGone{6}, GoldenTombstone()}) : changed.Append(ledger::SlotGone{6})).ok());
    Memory torn = before;
    for (size_t i = Ledger::kHeaderBytes; i < kMemoryBytes; ++i) {
      if (Bytes(torn)[i] == Bytes(after)[i]) continue;
      Bytes(torn)[i] = Bytes(after)[i];
      const Ledger::Contents contents = ReadAll(torn);
      ASSERT_EQ(contents.entries, old) << "byte " << i;
      ASSERT_EQ(contents.damaged_entries, 0u);
    }
    EXPECT_NE(ReadAll(after).entries, old);
  }
}

TEST(Ledger, BitFlipsInTheLogLoseOnlyTheEntryTheyHit_F72) {
  Randomizer random(4);
  Memory m = Blank();
  Ledger log = Ledger::Open(Bytes(m)).value();
  std::vector<LedgerEntry> entries;
  std::vector<uint64_t> ends;
  for (size_t type : {1, 2, 4, 7, 8, 9}) {
    entries.push_back(RandomEntry(random, type));
    ASSERT_TRUE(log.Append(entries.back()).ok());
    ends.push_back(log.used_bytes());
  }
  for (uint64_t bit = 0; bit < 8 * log.used_bytes(); ++bit) {
    uint8_t& byte = Bytes(m)[Ledger::kHeaderBytes + bit / 8];
    byte ^= static_cast<uint8_t>(1 << bit % 8);
    std::vector<LedgerEntry> expected = entries;
    const size_t hit = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), bit / 8) - ends.begin());
    expected.erase(expected.begin() + static_cast<std::ptrdiff_t>(hit));
    const Ledger::Contents contents = ReadAll(m);
    ASSERT_EQ(contents.entries, expected) << "bit " << bit;
    ASSERT_EQ(contents.damaged_entries, 1u) << "bit " << bit;
    byte ^= static_cast<uint8_t>(1 << bit % 8);
  }
}

TEST(Ledger, BitFlipsInTheHeaderAreRefusedAndLeftUntouched_F72_I35) {
  Memory m = Blank();
  Ledger log = Ledger::Open(Bytes(m)).value();
  ASSERT_TRUE(log.Append(GoldenTombstone()).ok());
  for (int bit = 0; bit < 8 * 32; ++bit) {
    Bytes(m)[static_cast<size_t>(bit / 8)] ^= static_cast<uint8_t>(1 << bit % 8);
    const Memory before = m;
    const auto opened = Ledger::Open(Bytes(m));
    ASSERT_FALSE(opened.has_value()) << "bit " << bit;
    ASSERT_EQ(opened.error().code(), bit / 8 < 24 ? StatusCode::kProtocol : StatusCode::kCorrupt) << "bit " << bit;
    ASSERT_EQ(m, before);
    Bytes(m)[static_cast<size_t>(bit / 8)] ^= static_cast<uint8_t>(1 << bit % 8);
  }
}

// A text inside a damaged entry holds a whole valid entry: it must not come to life.
TEST(Ledger, TextsInsideADamagedEntryAreNotEntries) {
  const std::vector<uint8_t> forged = EncodeLedgerEntry(ledger::SlotGone{99});
  for (size_t padding = 0; padding < 8; ++padding) {
    Memory m = Blank();
    Ledger log = Ledger::Open(Bytes(m)).value();
    ledger::Tombstone entry;
    entry.reason = std::string(padding, 'x') + std::string(forged.begin(), forged.end());
    ASSERT_TRUE(log.Append(entry).ok());
    ASSERT_TRUE(log.Append(ledger::SlotGone{1}).ok());
    Bytes(m)[Ledger::kHeaderBytes + 17] ^= 1;
    const Ledger::Contents contents = ReadAll(m);
    EXPECT_EQ(contents.entries, std::vector<LedgerEntry>{ledger::SlotGone{1}});
    EXPECT_EQ(contents.damaged_entries, 1u);
  }
}

TEST(Ledger, UnknownVersionAndForeignBytesAreLeftUntouched_I35) {
  Memory m = Blank();
  ASSERT_TRUE(Ledger::Open(Bytes(m)).value().Append(GoldenTombstone()).ok());
  layout::Put(Bytes(m), 8, uint32_t{2});
  const Memory before = m;
  const auto opened = Ledger::Open(Bytes(m));
  ASSERT_FALSE(opened.has_value());
  EXPECT_NE(opened.error().message().find("unknown version 2"), std::string::npos);
  EXPECT_EQ(m, before);

  for (const size_t at : {size_t{100}, Ledger::kHeaderBytes, kMemoryBytes - 1}) {  // A header of zeros before something that is not ours.
    Memory foreign = Blank();
    Bytes(foreign)[at] = 1;
    const Memory copy = foreign;
    EXPECT_FALSE(Ledger::Open(Bytes(foreign)).has_value());
    EXPECT_EQ(foreign, copy);
  }
  Memory small(Ledger::kHeaderBytes / 8);
  EXPECT_EQ(Ledger::Open(Bytes(small)).error().code(), StatusCode::kInvalidArgument);
}

TEST(Ledger, MemoryMayGrowButNotShrink) {
  Memory m = Blank();
  ASSERT_TRUE(Ledger::Open(Bytes(m)).value().Append(GoldenTombstone()).ok());
  Memory grown = m;
  grown.resize(2 * m.size());
  EXPECT_EQ(ReadAll(grown).entries.size(), 1u);
  Memory shrunk = m;
  shrunk.resize(m.size() - 2);
  EXPECT_EQ(Ledger::Open(Bytes(shrunk)).error().code(), StatusCode::kProtocol);
}

// Any bytes as a ledger: refused and untouched, or readable, and then still usable (T-11, T-5).
TEST(Ledger, AnyBytesOpenOrAreRefusedUntouched) {
  Randomizer random(5);
  int opened_count = 0;
  for (int i = 0; i < 2000; ++i) {
    Memory m = Blank();
    if (random.Next() % 4 != 0) {  // Mutations of a real ledger; otherwise noise.
      Ledger log = Ledger::Open(Bytes(m)).value();
      while (random.Next() % 8 != 0) {
        if (!log.Append(RandomEntry(random, random.Next() % kTypes)).ok() && !log.Compact({}).ok()) break;
      }
      for (uint64_t n = random.Next() % 20; n > 0; --n) {
        Bytes(m)[Ledger::kHeaderBytes + random.Next() % (kMemoryBytes - Ledger::kHeaderBytes)] = static_cast<uint8_t>(random.Next());
      }
      if (random.Next() % 4 == 0) Bytes(m)[random.Next() % 40] = static_cast<uint8_t>(random.Next());
    } else {
      for (uint64_t& word : m) word = random.Next();
      if (random.Next() % 2 == 0) layout::Put(Bytes(m), 0, Ledger::kMagic);
    }
    const Memory before = m;
    auto log = Ledger::Open(Bytes(m));
    ASSERT_EQ(m, before);
    if (!log) continue;
    ++opened_count;
    const Ledger::Contents contents = log->Read();
    ASSERT_TRUE(log->Compact(contents.entries).ok()) << "what was read fits again";
    ASSERT_EQ(log->Read().entries, contents.entries);
    ASSERT_EQ(ReadAll(m).damaged_entries, 0u);
  }
  EXPECT_GT(opened_count, 500);
}

}  // namespace
}  // namespace sp
