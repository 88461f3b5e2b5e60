#include "format/ledger.h"

#include <algorithm>
#include <atomic>
#include <optional>

#include "base/check.h"
#include "base/crc32c.h"
#include "base/plant.h"
#include "format/fixed_layout.h"

// Order of stores. Format: area size, version, commit word, then the magic. Append: the entry's bytes behind the tail, then the commit word.
// Compact: the snapshot into the area that is not active, then the commit word. A reader looks only at what the commit word covers.
namespace sp {
namespace {

using layout::AllZero;
using layout::Get;
using layout::Put;

// Offsets in the header page: docs/formats/ledger.md.
namespace at {
constexpr size_t kMagic = 0;      // u64
constexpr size_t kVersion = 8;    // u32
constexpr size_t kCheck = 12;     // u32, CRC32C over magic, version, area size
constexpr size_t kAreaBytes = 16; // u64
constexpr size_t kCommit = 24;    // u64
constexpr size_t kZero = 32;      // to the end of the page
}  // namespace at

namespace entry_at {
constexpr size_t kMagic = 0;   // u32
constexpr size_t kCrc = 4;     // u32, CRC32C over everything behind it, padding included
constexpr size_t kLength = 8;  // u32, bytes of the body
constexpr size_t kType = 12;   // u16
constexpr size_t kCheck = 14;  // u16, low half of the CRC32C over length and type
constexpr size_t kBody = 16;
}  // namespace entry_at

constexpr uint32_t kEntryMagic = 0x454c5053;  // "SPLE"
constexpr uint64_t kEntryAlign = 8;

// Commit word: tail in units of bytes (39 bits), active area (1 bit), check (24 bits of the CRC32C over the five bytes below it).
constexpr int kTailBits = 39;
constexpr uint64_t kTailMax = (uint64_t{1} << kTailBits) - 1;

uint64_t MakeCommit(uint32_t active, uint64_t tail) {
  const uint64_t value = tail | uint64_t{active} << kTailBits;
  std::array<uint8_t, 8> bytes{};
  Put(bytes, 0, value);
  return value | uint64_t{Crc32c(0, ByteSpan(bytes).first(5))} << 40;
}

struct Commit {
  uint32_t active;
  uint64_t tail;
};
std::optional<Commit> ReadCommit(uint64_t word) {
  const Commit commit{static_cast<uint32_t>(word >> kTailBits & 1), word & kTailMax};
  if (MakeCommit(commit.active, commit.tail) != word) return std::nullopt;
  return commit;
}

uint32_t HeaderCheck(uint64_t area_bytes) {
  std::array<uint8_t, 20> bytes{};
  Put(bytes, 0, Ledger::kMagic);
  Put(bytes, 8, Ledger::kVersion);
  Put(bytes, 12, area_bytes);
  return Crc32c(0, bytes);
}

template <typename T>
std::atomic_ref<T> Word(MutableByteSpan memory, size_t offset) {
  return std::atomic_ref<T>(*reinterpret_cast<T*>(memory.data() + offset));
}

template <typename T>
void Release(MutableByteSpan memory, size_t offset, T value) {
  std::array<uint8_t, sizeof(T)> bytes;
  Put(bytes, 0, value);
  T word;
  std::memcpy(&word, bytes.data(), sizeof word);  // The bytes are little-endian on every machine.
  Word<T>(memory, offset).store(word, std::memory_order_release);
}

// A fresh memory, or one whose formatting was cut short: zeros, except for fields that already have the value they are going to get.
bool IsBlank(ByteSpan memory, uint64_t area_bytes) {
  const auto zero_or = [&](uint64_t found, uint64_t wanted) { return found == 0 || found == wanted; };
  return Get<uint64_t>(memory, at::kMagic) == 0 && zero_or(Get<uint32_t>(memory, at::kVersion), Ledger::kVersion) &&
         zero_or(Get<uint32_t>(memory, at::kCheck), HeaderCheck(area_bytes)) &&
         zero_or(Get<uint64_t>(memory, at::kAreaBytes), area_bytes) &&
         zero_or(Get<uint64_t>(memory, at::kCommit), MakeCommit(0, 0)) && AllZero(memory.subspan(at::kZero));
}

uint64_t FramedBytes(uint64_t body_bytes) { return AlignUp(entry_at::kBody + body_bytes, kEntryAlign); }

// Decodes into the alternative with the given index; kProtocol if there is none.
template <size_t I = 0>
Result<LedgerEntry> DecodeBody(size_t index, ByteSpan body) {
  if constexpr (I == std::variant_size_v<LedgerEntry>) {
    return Error(StatusCode::kProtocol, "ledger entry: unknown type " + std::to_string(index + 1));
  } else {
    if (index != I) return DecodeBody<I + 1>(index, body);
    auto value = Decode<std::variant_alternative_t<I, LedgerEntry>>(body);
    if (!value) return std::unexpected(std::move(value).error());
    return LedgerEntry(std::in_place_index<I>, std::move(*value));
  }
}

uint16_t LengthCheck(ByteSpan entry) {
  return static_cast<uint16_t>(Crc32c(0, entry.subspan(entry_at::kLength, entry_at::kCheck - entry_at::kLength)));
}

// Where to go on after an entry that cannot be read: behind it, if its length can be believed, because the texts inside come from outsiders and
// must not be taken for entries; else at the next place where a valid entry begins.
uint64_t Resynchronise(ByteSpan log, uint64_t position) {
  const ByteSpan rest = log.subspan(position);
  if (rest.size() >= entry_at::kBody && LengthCheck(rest) == Get<uint16_t>(rest, entry_at::kCheck)) {
    const uint64_t framed = FramedBytes(Get<uint32_t>(rest, entry_at::kLength));
    if (framed <= rest.size()) return position + framed;
  }
  for (uint64_t skipped = kEntryAlign; skipped < rest.size(); skipped += kEntryAlign) {
    uint64_t size;
    if (DecodeLedgerEntry(rest.subspan(skipped), &size)) return position + skipped;
  }
  return log.size();
}

}  // namespace

std::vector<uint8_t> EncodeLedgerEntry(const LedgerEntry& entry) {
  const std::vector<uint8_t> body = std::visit([](const auto& e) { return Encode(e); }, entry);
  std::vector<uint8_t> out(FramedBytes(body.size()));
  Put(out, entry_at::kMagic, kEntryMagic);
  Put(out, entry_at::kLength, static_cast<uint32_t>(body.size()));
  Put(out, entry_at::kType, static_cast<uint16_t>(entry.index() + 1));
  Put(out, entry_at::kCheck, LengthCheck(out));
  std::copy(body.begin(), body.end(), out.begin() + entry_at::kBody);
  Put(out, entry_at::kCrc, Crc32c(0, ByteSpan(out).subspan(entry_at::kLength)));
  return out;
}

Result<LedgerEntry> DecodeLedgerEntry(ByteSpan bytes, uint64_t* consumed) {
  const auto bad = [](const char* why) { return Error(StatusCode::kProtocol, std::string("ledger entry: ") + why); };
  if (bytes.size() < entry_at::kBody) return bad("shorter than its header");
  if (Get<uint32_t>(bytes, entry_at::kMagic) != kEntryMagic) return bad("bad magic");
  const uint64_t length = Get<uint32_t>(bytes, entry_at::kLength);
  const uint64_t framed = FramedBytes(length);
  if (framed > bytes.size()) return bad("longer than what is there");
  if (Crc32c(0, bytes.subspan(entry_at::kLength, framed - entry_at::kLength)) != Get<uint32_t>(bytes, entry_at::kCrc) &&
      !SP_PLANTED(ledger_checksum_ignored)) {
    return bad("checksum mismatch");
  }
  if (Get<uint16_t>(bytes, entry_at::kCheck) != LengthCheck(bytes)) return bad("length check mismatch");
  if (!AllZero(bytes.subspan(entry_at::kBody + length, framed - entry_at::kBody - length))) return bad("padding is not zero");
  const uint16_t type = Get<uint16_t>(bytes, entry_at::kType);
  if (type == 0) return bad("unknown type 0");
  SP_ASSIGN_OR_RETURN(LedgerEntry entry, DecodeBody(type - 1u, bytes.subspan(entry_at::kBody, length)));
  *consumed = framed;
  return entry;
}

Result<Ledger> Ledger::Open(MutableByteSpan memory) {
  SP_CHECK(reinterpret_cast<uintptr_t>(memory.data()) % kEntryAlign == 0);
  if (memory.size() < kHeaderBytes + 2 * kAreaBytesMin) {
    return Error(StatusCode::kInvalidArgument, "ledger: " + std::to_string(memory.size()) + " bytes are too few");
  }
  const uint64_t area_max = std::min<uint64_t>((memory.size() - kHeaderBytes) / 2 / kEntryAlign * kEntryAlign, kTailMax - kTailMax % 8);
  if (IsBlank(memory, area_max)) {
    Release<uint64_t>(memory, at::kAreaBytes, area_max);
    Release<uint32_t>(memory, at::kVersion, kVersion);
    Release<uint32_t>(memory, at::kCheck, HeaderCheck(area_max));
    Release<uint64_t>(memory, at::kCommit, MakeCommit(0, 0));
    Release<uint64_t>(memory, at::kMagic, kMagic);
    return Ledger(memory, area_max, 0, 0);
  }
  if (Get<uint64_t>(memory, at::kMagic) != kMagic) return Error(StatusCode::kProtocol, "ledger: bad magic");
  if (const auto version = Get<uint32_t>(memory, at::kVersion); version != kVersion) {
    return Error(StatusCode::kProtocol, "ledger: unknown version " + std::to_string(version));
  }
  const uint64_t area_bytes = Get<uint64_t>(memory, at::kAreaBytes);
  if (Get<uint32_t>(memory, at::kCheck) != HeaderCheck(area_bytes)) return Error(StatusCode::kProtocol, "ledger: header checksum mismatch");
  if (area_bytes < kAreaBytesMin || area_bytes > area_max || area_bytes % kEntryAlign != 0) {
    return Error(StatusCode::kProtocol, "ledger: areas of " + std::to_string(area_bytes) + " bytes do not fit the memory");
  }
  const uint64_t word = Word<uint64_t>(memory, at::kCommit).load(std::memory_order_acquire);
  std::array<uint8_t, 8> bytes;
  std::memcpy(bytes.data(), &word, sizeof word);
  const std::optional<Commit> commit = ReadCommit(Get<uint64_t>(bytes, 0));
  if (!commit || commit->tail > area_bytes || commit->tail % kEntryAlign != 0) {
    return Error(StatusCode::kCorrupt, "ledger: commit word is damaged");
  }
  return Ledger(memory, area_bytes, commit->active, commit->tail);
}

MutableByteSpan Ledger::Area(uint32_t which) const { return memory_.subspan(kHeaderBytes + which * area_bytes_, area_bytes_); }

void Ledger::Publish(uint32_t active, uint64_t tail) {
  Release<uint64_t>(memory_, at::kCommit, MakeCommit(active, tail));
  active_ = active;
  tail_ = tail;
}

Ledger::Contents Ledger::Read() const {
  Contents contents;
  const ByteSpan log = ByteSpan(Area(active_)).first(tail_);
  for (uint64_t position = 0; position < log.size();) {
    uint64_t size = 0;
    if (auto entry = DecodeLedgerEntry(log.subspan(position), &size)) {
      contents.entries.push_back(std::move(*entry));
      position += size;
    } else {
      ++contents.damaged_entries;
      position = Resynchronise(log, position);
    }
  }
  return contents;
}

Status Ledger::Append(const LedgerEntry& entry) {
  const std::vector<uint8_t> bytes = EncodeLedgerEntry(entry);
  if (bytes.size() > area_bytes_ - tail_) {
    return {StatusCode::kNoSpace, "ledger: " + std::to_string(bytes.size()) + " bytes do not fit behind " + std::to_string(tail_) + " of " +
                                      std::to_string(area_bytes_)};
  }
  const uint64_t at = tail_;
  if (SP_PLANTED(ledger_tail_first)) Publish(active_, at + bytes.size());
  std::memcpy(Area(active_).data() + at, bytes.data(), bytes.size());
  Publish(active_, at + bytes.size());
  return {};
}

Status Ledger::Compact(const std::vector<LedgerEntry>& snapshot) {
  const uint32_t other = 1 - active_;
  const MutableByteSpan area = Area(other);
  uint64_t tail = 0;
  for (const LedgerEntry& entry : snapshot) {
    const std::vector<uint8_t> bytes = EncodeLedgerEntry(entry);
    if (bytes.size() > area.size() - tail) {
      return {StatusCode::kNoSpace, "ledger: a snapshot of " + std::to_string(snapshot.size()) + " entries does not fit into " +
                                        std::to_string(area_bytes_) + " bytes"};
    }
    std::memcpy(area.data() + tail, bytes.data(), bytes.size());
    tail += bytes.size();
  }
  Publish(other, tail);
  return {};
}

uint64_t Ledger::used_bytes() const { return tail_; }

}  // namespace sp
