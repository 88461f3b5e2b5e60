#include "durable/faulty_store.h"

#include <algorithm>
#include <set>
#include <utility>

#include "base/check.h"
#include "base/crc32c.h"
#include "format/constants.h"

namespace sp {
namespace {

bool Fits(const Fault& fault) {
  const StoreCall call = fault.call;
  switch (fault.kind) {
    case FaultKind::kFailBefore:
    case FaultKind::kFailAfter:
    case FaultKind::kHang:
      return true;
    case FaultKind::kArriveLate:
      return call == StoreCall::kPut || call == StoreCall::kCreate || call == StoreCall::kDelete;
    case FaultKind::kTruncateStored:
    case FaultKind::kFlipStored:
    case FaultKind::kLoseStored:
      return call == StoreCall::kPut || call == StoreCall::kCreate;
    case FaultKind::kFlipRead:
      return call == StoreCall::kReadRange;
    case FaultKind::kDropUpload:
    case FaultKind::kLeaveUpload:
      return call == StoreCall::kPut;
    case FaultKind::kListLags:
    case FaultKind::kListLosesRest:
      return call == StoreCall::kList;
  }
  return false;
}

bool DamagesStored(const std::optional<Fault>& fault) {
  return fault && (fault->kind == FaultKind::kTruncateStored || fault->kind == FaultKind::kFlipStored || fault->kind == FaultKind::kLoseStored);
}

PutSource WholeSource(ByteSpan content) {
  PutSource source{{content}, {}};
  for (uint64_t at = 0; at < content.size(); at += kBlockBytes) {
    source.block_crcs.push_back(Crc32c(0, content.subspan(at, std::min<uint64_t>(kBlockBytes, content.size() - at))));
  }
  return source;
}

}  // namespace

void FaultyStore::Add(Fault fault) {
  SP_CHECK(Fits(fault));
  const std::lock_guard lock(mutex_);
  scripted_.push_back({std::move(fault)});
}

void FaultyStore::AddChance(unsigned percent, Fault fault) {
  SP_CHECK(Fits(fault) && percent <= 100);
  const std::lock_guard lock(mutex_);
  chances_.push_back({std::move(fault), percent});
}

void FaultyStore::Clear() {
  const std::lock_guard lock(mutex_);
  scripted_.clear();
  chances_.clear();
}

void FaultyStore::OnHang(std::function<void(const CallLimits&)> hook) {
  const std::lock_guard lock(mutex_);
  on_hang_ = std::move(hook);
}

std::vector<Status> FaultyStore::DeliverLate() {
  std::vector<std::function<Status()>> late;
  {
    const std::lock_guard lock(mutex_);
    late = std::exchange(late_, {});
  }
  std::vector<Status> answers;
  for (const auto& run : late) answers.push_back(run());
  return answers;
}

uint64_t FaultyStore::calls(StoreCall call) const {
  const std::lock_guard lock(mutex_);
  return calls_[static_cast<size_t>(call)];
}

uint64_t FaultyStore::faults() const {
  const std::lock_guard lock(mutex_);
  return faults_;
}

uint64_t FaultyStore::Random() {  // SplitMix64.
  uint64_t z = random_ += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

std::optional<Fault> FaultyStore::Take(StoreCall call, const std::string& key) {
  const std::lock_guard lock(mutex_);
  ++calls_[static_cast<size_t>(call)];
  std::optional<Fault> struck;
  // All count the call, also those that come too late for it.
  for (Armed& armed : scripted_) {
    if (armed.fault.call != call || key.find(armed.fault.key_part) == key.npos) continue;
    ++armed.seen;
    if (!struck && armed.seen >= armed.fault.nth && armed.seen - armed.fault.nth < armed.fault.times) struck = armed.fault;
  }
  for (const Armed& armed : chances_) {
    if (armed.fault.call != call || key.find(armed.fault.key_part) == key.npos) continue;
    if (Random() % 100 < armed.percent && !struck) struck = armed.fault;
  }
  faults_ += struck.has_value();
  return struck;
}

Status FaultyStore::Hang(const std::string& what, const CallLimits& limits) {
  std::function<void(const CallLimits&)> hook;
  {
    const std::lock_guard lock(mutex_);
    hook = on_hang_;
  }
  if (hook) hook(limits);
  if (limits.cancelled != nullptr && *limits.cancelled) return {StatusCode::kClosed, what + ": cancelled"};
  return {StatusCode::kDeadline, what + ": no answer"};
}

Status FaultyStore::Late(const std::string& what, std::function<Status()> run) {
  const std::lock_guard lock(mutex_);
  late_.push_back(std::move(run));
  return {StatusCode::kDeadline, what + ": no answer"};
}

template <typename Run>
auto FaultyStore::Through(const std::optional<Fault>& fault, const std::string& what, const CallLimits& limits, const Run& run) -> decltype(run()) {
  if (!fault) return run();
  if (fault->kind == FaultKind::kFailBefore) return internal::ToReturn(WithContext(what, fault->status));
  if (fault->kind == FaultKind::kHang) return internal::ToReturn(Hang(what, limits));
  if (fault->kind != FaultKind::kFailAfter) return run();
  [[maybe_unused]] const auto lost = run();
  return internal::ToReturn(WithContext(what, fault->status));
}

// Behind the store's back, so that it believes what it has: its checksums are those of the damaged bytes.
Status FaultyStore::Damage(const std::string& key, const Fault& fault) {
  SP_ASSIGN_OR_RETURN(const ObjectInfo info, inner_.Head(key, {}));
  std::vector<uint8_t> content(info.size_bytes);
  SP_RETURN_IF_ERROR(inner_.ReadRange(key, 0, content, {}));
  SP_RETURN_IF_ERROR(inner_.Delete(key, {}));
  if (fault.kind == FaultKind::kLoseStored) return {};
  SP_CHECK(!content.empty());
  if (fault.kind == FaultKind::kTruncateStored) content.pop_back();
  else content[std::min<uint64_t>(fault.at, content.size() - 1)] ^= 1;
  return inner_.Put(key, WholeSource(content), {});
}

void FaultyStore::Written(const std::string& key) {
  const std::lock_guard lock(mutex_);
  std::erase(written_, key);
  written_.push_back(key);
}

Status FaultyStore::HalfPut(const std::string& key, const PutSource& source, const CallLimits& limits, const Fault& fault) {
  SP_RETURN_IF_ERROR(CheckKey(key));
  if (limits.progress && source.size_bytes() / 2 > 0) limits.progress(source.size_bytes() / 2);
  if (fault.kind == FaultKind::kLeaveUpload) {
    const std::lock_guard lock(mutex_);
    uploads_.push_back({key, "faulty-" + std::to_string(++last_upload_), clock_.Now() / kNanosPerSecond});
  }
  return WithContext("put " + url() + "/" + key, fault.status);
}

Result<StoreAbilities> FaultyStore::Probe(const CallLimits& limits) {
  return Through(Take(StoreCall::kProbe, ""), "probe " + url(), limits, [&] { return inner_.Probe(limits); });
}

Status FaultyStore::Put(const std::string& key, const PutSource& source, const CallLimits& limits) {
  const auto fault = Take(StoreCall::kPut, key);
  const std::string what = "put " + url() + "/" + key;
  if (fault && (fault->kind == FaultKind::kDropUpload || fault->kind == FaultKind::kLeaveUpload)) return HalfPut(key, source, limits, *fault);
  if (fault && fault->kind == FaultKind::kArriveLate) {
    std::vector<uint8_t> content;  // The caller's memory is his again when this returns.
    for (const ByteSpan range : source.ranges) content.insert(content.end(), range.begin(), range.end());
    return Late(what, [this, key, content = std::move(content), crcs = source.block_crcs] {
      const Status put = inner_.Put(key, {{ByteSpan(content)}, crcs}, {});
      if (put.ok()) Written(key);
      return put;
    });
  }
  return Through(fault, what, limits, [&]() -> Status {
    SP_RETURN_IF_ERROR(inner_.Put(key, source, limits));
    Written(key);
    return DamagesStored(fault) ? Damage(key, *fault) : Status();
  });
}

Result<bool> FaultyStore::Create(const std::string& key, ByteSpan content, const CallLimits& limits) {
  const auto fault = Take(StoreCall::kCreate, key);
  const std::string what = "create " + url() + "/" + key;
  if (fault && fault->kind == FaultKind::kArriveLate) {
    return std::unexpected(Late(what, [this, key, copy = std::vector<uint8_t>(content.begin(), content.end())]() -> Status {
      const auto made = inner_.Create(key, copy, {});
      if (made && *made) Written(key);
      return made ? Status() : made.error();
    }));
  }
  return Through(fault, what, limits, [&]() -> Result<bool> {
    SP_ASSIGN_OR_RETURN(const bool made, inner_.Create(key, content, limits));
    if (!made) return false;
    Written(key);
    if (DamagesStored(fault)) SP_RETURN_IF_ERROR(Damage(key, *fault));
    return true;
  });
}

Status FaultyStore::ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) {
  const auto fault = Take(StoreCall::kReadRange, key);
  return Through(fault, "read " + url() + "/" + key, limits, [&]() -> Status {
    SP_RETURN_IF_ERROR(inner_.ReadRange(key, offset, out, limits));
    if (fault && fault->kind == FaultKind::kFlipRead && !out.empty()) out[std::min<uint64_t>(fault->at, out.size() - 1)] ^= 1;
    return {};
  });
}

Result<ObjectInfo> FaultyStore::Head(const std::string& key, const CallLimits& limits) {
  return Through(Take(StoreCall::kHead, key), "head " + url() + "/" + key, limits, [&] { return inner_.Head(key, limits); });
}

Result<ListPage> FaultyStore::List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) {
  const auto fault = Take(StoreCall::kList, prefix);
  return Through(fault, "list " + url() + "/" + prefix, limits, [&]() -> Result<ListPage> {
    SP_ASSIGN_OR_RETURN(ListPage page, inner_.List(prefix, cursor, limits));
    if (fault && fault->kind == FaultKind::kListLosesRest) {
      page.objects.resize(std::min<size_t>(page.objects.size(), 1));
      page.next.clear();
    }
    if (fault && fault->kind == FaultKind::kListLags) {
      const std::lock_guard lock(mutex_);
      const size_t hidden = std::min<uint64_t>(fault->at, written_.size());
      const std::set<std::string> recent(written_.end() - static_cast<std::ptrdiff_t>(hidden), written_.end());
      std::erase_if(page.objects, [&](const ObjectInfo& info) { return recent.contains(info.key); });
    }
    return page;
  });
}

Status FaultyStore::Delete(const std::string& key, const CallLimits& limits) {
  const auto fault = Take(StoreCall::kDelete, key);
  const std::string what = "delete " + url() + "/" + key;
  if (fault && fault->kind == FaultKind::kArriveLate) return Late(what, [this, key] { return inner_.Delete(key, {}); });
  return Through(fault, what, limits, [&] { return inner_.Delete(key, limits); });
}

Result<std::vector<UnfinishedUpload>> FaultyStore::ListUploads(const std::string& prefix, const CallLimits& limits) {
  const auto fault = Take(StoreCall::kListUploads, prefix);
  return Through(fault, "list uploads " + url() + "/" + prefix, limits, [&]() -> Result<std::vector<UnfinishedUpload>> {
    SP_ASSIGN_OR_RETURN(std::vector<UnfinishedUpload> found, inner_.ListUploads(prefix, limits));
    const std::lock_guard lock(mutex_);
    std::ranges::copy_if(uploads_, std::back_inserter(found), [&](const auto& upload) { return upload.key.starts_with(prefix); });
    return found;
  });
}

Status FaultyStore::AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) {
  return Through(Take(StoreCall::kAbortUpload, upload.key), "abort upload of " + url() + "/" + upload.key, limits, [&]() -> Status {
    {
      const std::lock_guard lock(mutex_);
      if (std::erase_if(uploads_, [&](const auto& known) { return known.id == upload.id && known.key == upload.key; }) != 0) return {};
    }
    return inner_.AbortUpload(upload, limits);
  });
}

}  // namespace sp
