#include "node/ledger_keeping.h"

#include "os/memfd.h"

namespace sp {
namespace {

constexpr Nanos kCompactEvery = kNanosPerSecond;

bool IsWriting(MessageType type) {
  return type == MessageType::kOpenGeneration || type == MessageType::kPrepareSlots || type == MessageType::kReserve;
}
bool IsReading(MessageType type) { return type == MessageType::kOpenRead || type == MessageType::kPinStep; }

}  // namespace

Result<LedgerKeeping> LedgerKeeping::Open(int fd, uint64_t size_bytes) {
  SP_RETURN_IF_ERROR(CheckSealedSize(fd, size_bytes));
  SP_ASSIGN_OR_RETURN(Mapping mapping, Mapping::MapShared(fd, size_bytes, MapMode::kReadWrite, true));
  SP_ASSIGN_OR_RETURN(Ledger ledger, Ledger::Open(mapping.mutable_bytes()));
  return LedgerKeeping(std::move(mapping), std::move(ledger));
}

Status LedgerKeeping::Append(const LedgerEntry& entry, const std::function<std::vector<LedgerEntry>()>& snapshot) {
  if (in_snapshot_) return {};
  const Status appended = ledger_.Append(entry);
  if (appended.code() != StatusCode::kNoSpace) return appended;
  SP_RETURN_IF_ERROR(Compact(snapshot));
  in_snapshot_ = true;
  return {};
}

Status LedgerKeeping::Compact(const std::function<std::vector<LedgerEntry>()>& snapshot) {
  SP_RETURN_IF_ERROR(ledger_.Compact(snapshot()));
  ++compactions_;
  compacted_bytes_ = used_bytes();
  return {};
}

Status LedgerKeeping::Admit(MessageType type, Nanos now, const std::function<std::vector<LedgerEntry>()>& snapshot) {
  if (!IsWriting(type) && !IsReading(type)) return {};
  const double limit = IsWriting(type) ? kRefuseWriters : kRefuseReaders;
  const auto full = [&] { return static_cast<double>(used_bytes()) > limit * static_cast<double>(area_bytes()); };
  if (!full()) return {};
  // A log of facts in use does not become shorter by being written again. So only when much was appended since the last time, or after a
  // while: a few entries can end many facts.
  if (used_bytes() - compacted_bytes_ >= area_bytes() / 32 || now - compacted_at_ >= kCompactEvery) {
    compacted_at_ = now;
    SP_RETURN_IF_ERROR(Compact(snapshot));
    if (!full()) return {};
  }
  return Status(StatusCode::kNoSpace, "the daemon's ledger is full (" + std::to_string(used_bytes()) + " of " + std::to_string(area_bytes()) +
                                          " bytes are facts in use); raise the setting ledger");
}

}  // namespace sp
