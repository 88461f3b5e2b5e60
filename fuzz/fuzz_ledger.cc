// Ledgers (T-5, T-11). Properties: an entry that decodes encodes to the same bytes; any memory opens or is refused untouched; what was read fits
// again. What the daemon makes of the entries is fuzz_readopt.cc's business.
#include "format/ledger.h"

#include <algorithm>

#include "base/crc32c.h"
#include "format/fixed_layout.h"
#include "fuzz.h"

namespace {

using namespace sp;

constexpr size_t kMemoryBytes = Ledger::kHeaderBytes + 2 * 2048;

struct Memory {
  alignas(8) std::array<uint8_t, kMemoryBytes> bytes{};
};

void TryEntry(ByteSpan bytes) {
  fuzz::AllocationMeter meter;
  uint64_t consumed = 0;
  const auto entry = DecodeLedgerEntry(bytes, &consumed);
  SP_CHECK(meter.bytes() <= 32 * bytes.size() + 4096);
  if (!entry) {
    SP_CHECK(entry.error().code() == StatusCode::kProtocol && consumed == 0);
    return;
  }
  SP_CHECK(consumed <= bytes.size());
  SP_CHECK(std::ranges::equal(EncodeLedgerEntry(*entry), bytes.first(consumed)));
}

void TryMemory(Memory& memory) {
  const Memory before = memory;
  auto log = Ledger::Open(memory.bytes);
  if (!log) {
    SP_CHECK(log.error().code() == StatusCode::kProtocol || log.error().code() == StatusCode::kCorrupt);
    SP_CHECK(memory.bytes == before.bytes);
    return;
  }
  const Ledger::Contents contents = log->Read();
  if (!log->Append(ledger::SlotGone{1}).ok()) SP_CHECK(log->area_bytes() - log->used_bytes() < 32);
  SP_CHECK(log->Compact(contents.entries).ok());
  SP_CHECK(Ledger::Open(memory.bytes)->Read().entries == contents.entries);
}

// Sets the checks of one entry at `at` right, as docs/formats/ledger.md places them. Returns its framed size.
size_t FixEntry(std::vector<uint8_t>& bytes, size_t at) {
  const std::span<uint8_t> entry(bytes.data() + at, bytes.size() - at);
  layout::Put(entry, 0, uint32_t{0x454c5053});
  layout::Put(entry, 8, static_cast<uint32_t>(std::min<size_t>(layout::Get<uint32_t>(entry, 8), entry.size() - 16)));
  layout::Put(entry, 14, static_cast<uint16_t>(Crc32c(0, entry.subspan(8, 6))));
  const size_t framed = AlignUp(16 + layout::Get<uint32_t>(entry, 8), 8);
  layout::Put(entry, 4, Crc32c(0, entry.subspan(8, framed - 8)));
  return framed;
}

// The header of a whole memory: its check, and a commit word that says that `tail` bytes of area 0 or 1 are in use.
void FixHeader(std::span<uint8_t> memory) {
  std::array<uint8_t, 20> checked{};
  layout::Put(checked, 0, Ledger::kMagic);
  layout::Put(checked, 8, Ledger::kVersion);
  layout::Put(checked, 12, layout::Get<uint64_t>(memory, 16));
  layout::Put(memory, 12, Crc32c(0, checked));
  const uint64_t low = layout::Get<uint64_t>(memory, 24) & ((uint64_t{1} << 40) - 1);
  std::array<uint8_t, 8> word{};
  layout::Put(word, 0, low);
  layout::Put(memory, 24, low | uint64_t{Crc32c(0, ByteSpan(word).first(5))} << 40);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  TryEntry({data, size});
  // All checksums set right: gets behind them.
  std::vector<uint8_t> fixed(data, data + size / 8 * 8);
  for (size_t at = 0; at + 16 <= fixed.size();) {
    const size_t framed = FixEntry(fixed, at);
    TryEntry(ByteSpan(fixed).subspan(at));
    at += framed;
  }
  // As a whole memory, as one with a header whose checks are right, and as the log of a memory with a good header.
  Memory memory;
  std::copy(data, data + std::min(size, kMemoryBytes), memory.bytes.begin());
  Memory checked = memory;
  TryMemory(memory);
  FixHeader(checked.bytes);
  TryMemory(checked);
  for (const ByteSpan log : {ByteSpan(data, size), ByteSpan(fixed)}) {
    Memory framed;
    Ledger ledger = Ledger::Open(framed.bytes).value();
    while (ledger.used_bytes() + 32 <= std::min<size_t>(log.size(), ledger.area_bytes())) SP_CHECK(ledger.Append(ledger::SlotGone{0}).ok());
    std::copy(log.begin(), log.begin() + static_cast<std::ptrdiff_t>(ledger.used_bytes()), framed.bytes.begin() + Ledger::kHeaderBytes);
    TryMemory(framed);
  }
  SP_CHECK(!Ledger::Open(std::span(memory.bytes).first(size % Ledger::kHeaderBytes / 8 * 8)).has_value());
  return 0;
}

std::vector<sp::fuzz::Input> sp::fuzz::Seeds() {
  SealRecord r;
  r.key.ns = "run";
  r.attempt = r.key.AttemptId();
  r.world_size = 1;
  ledger::Sealed sealed{1, 1, {}};
  sealed.record.bytes = r.Encode();
  const std::vector<LedgerEntry> entries = {
      ledger::Generation{1000, "run", 1, {}, 8}, ledger::Slot{1, {}, {1, 2, 3}},       ledger::SlotGone{1},     ledger::Lease{},
      ledger::LeaseEnded{1, true},               sealed,                               ledger::Manifest{},      ledger::Tombstone{1, "run", {}, {}, "why"},
      ledger::Quarantine{},                      ledger::OperatorPin{1, "run", {}, true}, ledger::ReadPin{1, {}, "run"},
      ledger::DurableWish{1, "run", {}, true, "why"}, ledger::StoredShard{},           ledger::StoredManifest{}, ledger::Evicted{1, "run", {}}};
  std::vector<Input> seeds;
  Input all;
  for (const LedgerEntry& e : entries) {
    seeds.push_back(EncodeLedgerEntry(e));
    all.insert(all.end(), seeds.back().begin(), seeds.back().end());
  }
  seeds.push_back(all);
  Memory memory;
  Ledger log = Ledger::Open(memory.bytes).value();
  for (const LedgerEntry& e : {entries[0], entries[1], entries[2]}) SP_CHECK(log.Append(e).ok());
  const size_t used = Ledger::kHeaderBytes + log.used_bytes();
  seeds.push_back(Input(memory.bytes.begin(), memory.bytes.begin() + static_cast<std::ptrdiff_t>(used)));
  const Input whole = seeds.back();
  // Bad ones: another version, an area that does not fit, a damaged commit word, a blank memory, a list of 2^32-1, an entry cut short, type 0.
  for (const size_t at : {8, 17, 24, 30, 100}) {
    seeds.push_back(whole);
    seeds.back()[at] ^= 0x41;
  }
  seeds.push_back(Input(40, 0));
  seeds.push_back(seeds[1]);
  for (size_t i = 0; i < 4; ++i) seeds.back()[16 + 40 + i] = 0xff;
  seeds.push_back(Input(seeds[1].begin(), seeds[1].end() - 8));
  seeds.push_back(seeds[2]);
  seeds.back()[12] = 0;
  seeds.push_back(seeds[2]);
  seeds.back()[12] = 99;
  seeds.push_back(all);
  seeds.back()[70] ^= 1;
  return seeds;
}
