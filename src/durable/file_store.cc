#include "durable/file_store.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>

#include "base/aligned_buffer.h"
#include "durable/store_url.h"
#include "format/constants.h"
#include "os/fd.h"
#include "os/file_tree.h"
#include "os/system.h"

namespace sp {
namespace {

constexpr size_t kReadBytes = 8u << 20;  // Between two looks at cancel and deadline.
constexpr size_t kPageObjects = 1000;
constexpr size_t kNameBytesMax = 255;
constexpr int kTriesMax = 10'000;  // Of making folders that somebody else removes as fast as he can: half a second.
constexpr std::string_view kUploadPrefix = ".safepoint-upload-";
constexpr size_t kUploadHexBytes = 32;

std::pair<std::string_view, std::string> Split(std::string_view key) {
  const size_t slash = key.rfind('/');
  if (slash == key.npos) return {{}, std::string(key)};
  return {key.substr(0, slash), std::string(key.substr(slash + 1))};
}

std::string TemporaryName(const std::string& name) {
  return (std::string(kUploadPrefix) + RandomId128().ToHex() + "-" + name).substr(0, kNameBytesMax);
}

// The name that the object was to get, as far as the temporary name has it.
std::optional<std::string> NameOfUpload(std::string_view temporary) {
  if (!temporary.starts_with(kUploadPrefix) || temporary.find('/') != temporary.npos) return std::nullopt;
  if (temporary.size() <= kUploadPrefix.size() + kUploadHexBytes) return std::string();
  return std::string(temporary.substr(kUploadPrefix.size() + kUploadHexBytes + 1));
}

bool IsUpload(std::string_view name) { return name.starts_with(kUploadPrefix); }

// Whether a key that begins with `folder` may begin with `prefix`.
bool CanHold(std::string_view folder, std::string_view prefix) { return folder.starts_with(prefix) || prefix.starts_with(folder); }

class Store final : public ObjectStore {
 public:
  Store(std::string url, Fd base, const Clock& clock) : url_(std::move(url)), base_(std::move(base)), clock_(clock) {}

  const std::string& url() const override { return url_; }

  Result<StoreAbilities> Probe(const CallLimits& limits) override;
  Status Put(const std::string& key, const PutSource& source, const CallLimits& limits) override;
  Result<bool> Create(const std::string& key, ByteSpan content, const CallLimits& limits) override;
  Status ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) override;
  Result<ObjectInfo> Head(const std::string& key, const CallLimits& limits) override;
  Result<ListPage> List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) override;
  Status Delete(const std::string& key, const CallLimits& limits) override;
  Result<std::vector<UnfinishedUpload>> ListUploads(const std::string& prefix, const CallLimits& limits) override;
  Status AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) override;

 private:
  struct Target {  // A file that is being written, and the directories from the base to where it will be.
    std::vector<Fd> directories;
    NewFile file;
  };
  // One call: what it is called in messages, and its bounds.
  struct Call {
    const Store& store;
    const CallLimits& limits;
    std::string what;
    Status Check() const { return CheckLimits(limits, store.clock_.Now(), what); }
    Status Explain(const Status& status) const;
  };

  Call Begin(const char* verb, const std::string& key, const CallLimits& limits) const {
    return {*this, limits, std::string(verb) + " " + url_ + (key.empty() ? "" : "/" + EncodeUrlPath(key))};
  }
  Status CheckOwnKey(const std::string& key) const;
  Result<Target> StartFile(const std::string& key, uint64_t size_bytes) const;
  Result<std::optional<FileFacts>> Find(const std::string& key) const;
  // `source`: its checksums are compared on the way, if it has some.
  Result<bool> Write(const Call& call, const std::string& key, const PutSource& source) const;

  // Calls visit(folder, directory, entry) for all that is no directory, in the order of the keys, until it returns an error or false. Folders none of
  // whose keys begin with `prefix`, or all of whose keys are not above `after`, are left out.
  template <typename Visit>
  Result<bool> Walk(const Call& call, const std::string& folder, std::string_view prefix, std::string_view after, const Visit& visit) const;

  const std::string url_;
  const Fd base_;  // Held: what is written does not wander off with a mount over it.
  const Clock& clock_;
};

Status Store::Call::Explain(const Status& status) const {
  if (status.ok()) return status;
  // An open directory that somebody removed is empty for ever. "No such object" would then be a guess (I-31).
  if (status.code() == StatusCode::kNotFound && IsRemoved(store.base_.get())) {
    return {StatusCode::kUnavailable, what + ": the base directory has been removed; make it again, or mount it"};
  }
  return WithContext(what, status);
}

Status Store::CheckOwnKey(const std::string& key) const {
  SP_RETURN_IF_ERROR(CheckKey(key));
  if (IsUpload(key) || key.find("/" + std::string(kUploadPrefix)) != key.npos) {
    return {StatusCode::kInvalidArgument, "object key '" + key + "': " + std::string(kUploadPrefix) + "* are the names of temporary files"};
  }
  return {};
}

Result<std::optional<FileFacts>> Store::Find(const std::string& key) const {
  const auto [folder, name] = Split(key);
  const auto directory = OpenDirectoryBelow(base_.get(), folder);
  const auto facts = directory ? StatAt(directory->get(), name) : Result<FileFacts>(std::unexpected(directory.error()));
  if (!facts) {
    if (facts.error().code() == StatusCode::kNotFound && !IsRemoved(base_.get())) return std::nullopt;
    return std::unexpected(facts.error());
  }
  if (facts->kind == FileKind::kLink) return Error(StatusCode::kDenied, "is a symbolic link, which are not followed here: remove it");
  if (facts->kind != FileKind::kFile) return std::nullopt;
  return *facts;
}

Result<Store::Target> Store::StartFile(const std::string& key, uint64_t size_bytes) const {
  const auto [folder, name] = Split(key);
  for (int attempt = 1;; ++attempt) {
    Result<Target> target = [&, &folder = folder, &name = name]() -> Result<Target> {
      SP_ASSIGN_OR_RETURN(std::vector<Fd> directories, MakeDirectoriesBelow(base_.get(), folder));
      SP_ASSIGN_OR_RETURN(NewFile file, NewFile::Create(directories.back().get(), TemporaryName(name), size_bytes));
      return Target{std::move(directories), std::move(file)};
    }();
    // Not found: somebody's Delete removed a folder that was empty for this moment. Until our temporary file is in it.
    if (target || target.error().code() != StatusCode::kNotFound || attempt == kTriesMax || IsRemoved(base_.get())) return target;
  }
}

// True: the object was made. False: there is something of that name, and it is on disk.
Result<bool> Store::Write(const Call& call, const std::string& key, const PutSource& source) const {
  auto target = StartFile(key, source.size_bytes);
  if (!target) return std::unexpected(call.Explain(target.error()));
  // A block at a time: small enough to be still in the cache when it is written, and large enough for the disk.
  const AlignedBuffer buffer(std::min(kBlockBytes, source.size_bytes));
  for (uint64_t at = 0; at < source.size_bytes; at += kBlockBytes) {
    SP_RETURN_IF_ERROR(call.Check());
    const MutableByteSpan chunk = buffer.span().first(std::min(kBlockBytes, source.size_bytes - at));
    if (source.pace) source.pace(chunk.size());
    const Status read = source.block_crcs.empty() ? source.read(at, chunk) : ReadBlock(source, at / kBlockBytes, chunk);
    if (!read.ok()) return std::unexpected(call.Explain(read));
    if (Status status = target->file.Append(chunk); !status.ok()) return std::unexpected(call.Explain(status));
    if (call.limits.progress) call.limits.progress(chunk.size());
  }
  SP_RETURN_IF_ERROR(call.Check());
  if (Status status = target->file.Sync(); !status.ok()) return std::unexpected(call.Explain(status));
  if (Status status = SyncDirectories(target->directories); !status.ok()) return std::unexpected(call.Explain(status));
  SP_RETURN_IF_ERROR(call.Check());
  const auto published = target->file.Publish(Split(key).second);
  if (!published) return std::unexpected(call.Explain(published.error()));
  return *published;
}

Result<StoreAbilities> Store::Probe(const CallLimits& limits) {
  const std::string key = std::string(kProbeFolder) + RandomId128().ToHex();
  const Call call = Begin("probe", "", limits);
  StoreAbilities abilities;
  const Status status = [&]() -> Status {
    constexpr std::array<uint8_t, 2> kContent = {'o', 'k'};
    std::array<uint8_t, 2> read{};
    SP_ASSIGN_OR_RETURN(const bool first, Create(key, kContent, limits));
    SP_ASSIGN_OR_RETURN(const bool second, Create(key, kContent, limits));
    SP_RETURN_IF_ERROR(ReadRange(key, 0, read, limits));
    if (read != kContent) return call.Explain({StatusCode::kCorrupt, "what was written is not what is read back; that disk cannot be used"});
    abilities.conditional_create = first && !second;
    return {};
  }();
  const Status deleted = Delete(key, status.ok() ? limits : CallLimits{});
  SP_RETURN_IF_ERROR(status);
  SP_RETURN_IF_ERROR(deleted);
  return abilities;
}

Status Store::Put(const std::string& key, const PutSource& source, const CallLimits& limits) {
  const Call call = Begin("put", key, limits);
  SP_RETURN_IF_ERROR(CheckOwnKey(key));
  SP_RETURN_IF_ERROR(CheckSource(source));
  SP_RETURN_IF_ERROR(call.Check());
  const uint64_t size = source.size_bytes;
  auto found = Find(key);  // Before: so that what is there already costs no bytes.
  if (found && !*found) {
    SP_ASSIGN_OR_RETURN(const bool published, Write(call, key, source));
    if (published) return {};
    found = Find(key);
  }
  if (!found) return call.Explain(found.error());
  if (!*found) return call.Explain({StatusCode::kInvalidArgument, "something that is no object has this name; remove it"});
  if ((*found)->size_bytes != size) {
    return call.Explain({StatusCode::kCorrupt, "there is an object of " + std::to_string((*found)->size_bytes) + " bytes already, not of " +
                                                   std::to_string(size) + "; it was left as it is"});
  }
  // Whoever made it may not have come to syncing the directories.
  const auto directories = MakeDirectoriesBelow(base_.get(), Split(key).first);
  return call.Explain(directories ? SyncDirectories(*directories) : directories.error());
}

Result<bool> Store::Create(const std::string& key, ByteSpan content, const CallLimits& limits) {
  const Call call = Begin("create", key, limits);
  SP_RETURN_IF_ERROR(CheckOwnKey(key));
  SP_RETURN_IF_ERROR(call.Check());
  CallLimits quiet = limits;
  quiet.progress = nullptr;
  return Write({*this, quiet, call.what}, key, PutSource::OfMemory(content, {}));
}

Status Store::ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) {
  const Call call = Begin("read", key, limits);
  SP_RETURN_IF_ERROR(CheckOwnKey(key));
  SP_RETURN_IF_ERROR(call.Check());
  const auto [folder, name] = Split(key);
  const auto directory = OpenDirectoryBelow(base_.get(), folder);
  if (!directory) return call.Explain(directory.error());
  const auto file = OpenFileAt(directory->get(), name);
  if (!file) return call.Explain(file.error());
  const auto facts = StatOpen(file->get());
  if (!facts) return call.Explain(facts.error());
  if (offset > facts->size_bytes || out.size() > facts->size_bytes - offset) {
    return call.Explain({StatusCode::kCorrupt, "bytes " + std::to_string(offset) + " to " + std::to_string(offset + out.size()) +
                                                   " of an object that has " + std::to_string(facts->size_bytes)});
  }
  bool direct = limits.past_cache && out.size() >= kBlockBytes && GoPastPageCache(file->get());
  while (!out.empty()) {
    SP_RETURN_IF_ERROR(call.Check());
    size_t length = std::min(out.size(), kReadBytes);
    if (direct) {
      const bool aligned = (reinterpret_cast<uintptr_t>(out.data()) | offset) % kDirectAlignment == 0 && length >= kDirectAlignment;
      if (aligned) length = length / kDirectAlignment * kDirectAlignment;
      else UsePageCache(file->get()), direct = false;
    }
    const MutableByteSpan chunk = out.first(length);
    if (Status status = ReadFileExact(file->get(), chunk, offset); !status.ok()) {
      if (!direct) return call.Explain(status);
      UsePageCache(file->get());  // It may want another alignment; what is wrong with the disk comes again.
      direct = false;
      continue;
    }
    offset += chunk.size();
    out = out.subspan(chunk.size());
  }
  return {};
}

Result<ObjectInfo> Store::Head(const std::string& key, const CallLimits& limits) {
  const Call call = Begin("head", key, limits);
  SP_RETURN_IF_ERROR(CheckOwnKey(key));
  SP_RETURN_IF_ERROR(call.Check());
  const auto found = Find(key);
  if (!found) return std::unexpected(call.Explain(found.error()));
  if (!*found) return std::unexpected(call.Explain({StatusCode::kNotFound, "there is no such object"}));
  return ObjectInfo{key, (*found)->size_bytes, (*found)->modified_unix_s, std::nullopt};
}

Status Store::Delete(const std::string& key, const CallLimits& limits) {
  const Call call = Begin("delete", key, limits);
  SP_RETURN_IF_ERROR(CheckOwnKey(key));
  SP_RETURN_IF_ERROR(call.Check());
  const auto [folder, name] = Split(key);
  const auto directory = OpenDirectoryBelow(base_.get(), folder);
  const auto removed = directory ? RemoveFileAt(directory->get(), name) : Result<bool>(std::unexpected(directory.error()));
  if (!removed && (removed.error().code() != StatusCode::kNotFound || IsRemoved(base_.get()))) return call.Explain(removed.error());
  if (removed) RemoveEmptyDirectoriesBelow(base_.get(), folder);
  return {};
}

template <typename Visit>
Result<bool> Store::Walk(const Call& call, const std::string& folder, std::string_view prefix, std::string_view after, const Visit& visit) const {
  SP_RETURN_IF_ERROR(call.Check());
  const auto directory = OpenDirectoryBelow(base_.get(), folder.empty() ? folder : folder.substr(0, folder.size() - 1));
  auto entries = directory ? ReadDirectory(directory->get()) : Result<std::vector<DirectoryEntry>>(std::unexpected(directory.error()));
  if (!entries) {
    // Removed, or replaced by something else, since its name was read: nothing to list.
    if (entries.error().code() == StatusCode::kNotFound && !IsRemoved(base_.get())) return true;
    return std::unexpected(call.Explain(entries.error()));
  }
  if (folder.empty() && IsRemoved(base_.get())) return std::unexpected(call.Explain({StatusCode::kNotFound, "nothing to list"}));
  // A folder sorts as what its keys begin with: "a/" is behind "a.b" and before "a0".
  for (DirectoryEntry& entry : *entries) {
    if (entry.kind == FileKind::kDirectory) entry.name += '/';
  }
  std::ranges::sort(*entries, {}, &DirectoryEntry::name);
  for (const DirectoryEntry& entry : *entries) {
    const std::string path = folder + entry.name;
    if (entry.kind != FileKind::kDirectory) {
      SP_ASSIGN_OR_RETURN(const bool more, visit(folder, *directory, entry));
      if (!more) return false;
      continue;
    }
    if (!CanHold(path, prefix) || (path < after && !after.starts_with(path))) continue;
    if (!CheckKey(path.substr(0, path.size() - 1)).ok()) continue;
    SP_ASSIGN_OR_RETURN(const bool more, Walk(call, path, prefix, after, visit));
    if (!more) return false;
  }
  return true;
}

Result<ListPage> Store::List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) {
  const Call call = Begin("list", prefix, limits);
  SP_RETURN_IF_ERROR(CheckPrefix(prefix));
  ListPage page;
  const auto visit = [&](const std::string& folder, const Fd& directory, const DirectoryEntry& entry) -> Result<bool> {
    const std::string key = folder + entry.name;
    if (folder.starts_with(kProbeFolder)) return true;
    if (entry.kind != FileKind::kFile || !key.starts_with(prefix) || (!cursor.empty() && key <= cursor) || !CheckOwnKey(key).ok()) return true;
    if (page.objects.size() == kPageObjects) return false;
    const auto facts = StatAt(directory.get(), entry.name);
    if (!facts && facts.error().code() == StatusCode::kNotFound) return true;  // Deleted this moment.
    if (!facts) return std::unexpected(call.Explain(facts.error()));
    page.objects.push_back({key, facts->size_bytes, facts->modified_unix_s, std::nullopt});
    return true;
  };
  SP_ASSIGN_OR_RETURN(const bool all, Walk(call, "", prefix, cursor, visit));
  if (!all) page.next = page.objects.back().key;
  return page;
}

Result<std::vector<UnfinishedUpload>> Store::ListUploads(const std::string& prefix, const CallLimits& limits) {
  const Call call = Begin("list uploads", prefix, limits);
  SP_RETURN_IF_ERROR(CheckPrefix(prefix));
  std::vector<UnfinishedUpload> uploads;
  const auto visit = [&](const std::string& folder, const Fd& directory, const DirectoryEntry& entry) -> Result<bool> {
    const auto name = NameOfUpload(entry.name);
    if (entry.kind != FileKind::kFile || !name || !(folder + *name).starts_with(prefix)) return true;
    const auto writer = WriterOf(directory.get(), entry.name);
    const auto facts = StatAt(directory.get(), entry.name);
    for (const Status& status : {writer ? Status() : writer.error(), facts ? Status() : facts.error()}) {
      if (status.code() == StatusCode::kNotFound) return true;  // Gone this moment.
      if (!status.ok()) return std::unexpected(call.Explain(status));
    }
    if (*writer == Writer::kAlive) return true;
    uploads.push_back({folder + *name, entry.name, facts->modified_unix_s, *writer == Writer::kGone});
    return true;
  };
  SP_ASSIGN_OR_RETURN([[maybe_unused]] const bool all, Walk(call, "", prefix, "", visit));
  return uploads;
}

Status Store::AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) {
  const Call call = Begin("abort upload of", upload.key, limits);
  const auto folder = Split(upload.key).first;
  if (!folder.empty()) SP_RETURN_IF_ERROR(CheckKey(std::string(folder)));
  if (!NameOfUpload(upload.id)) return call.Explain({StatusCode::kInvalidArgument, "'" + upload.id + "' is no temporary file of ours"});
  SP_RETURN_IF_ERROR(call.Check());
  const auto directory = OpenDirectoryBelow(base_.get(), folder);
  if (!directory) return directory.error().code() == StatusCode::kNotFound && !IsRemoved(base_.get()) ? Status() : call.Explain(directory.error());
  if (Status status = RemoveAbandonedFile(directory->get(), upload.id); !status.ok()) return call.Explain(status);
  RemoveEmptyDirectoriesBelow(base_.get(), folder);
  return {};
}

}  // namespace

Result<std::unique_ptr<ObjectStore>> FileStore::Open(const std::string& url, const Clock& clock, MissingBase missing_base) {
  SP_ASSIGN_OR_RETURN(const std::string path, PathOfFileUrl(url));
  auto base = OpenDirectory(path);
  if (!base && base.error().code() == StatusCode::kNotFound && missing_base == MissingBase::kMake) {
    const Status made = MakeDirectory(path, 0700);
    base = made.ok() ? OpenDirectory(path) : Result<Fd>(std::unexpected(made));
  }
  if (!base) {
    const char* cure = base.error().code() == StatusCode::kNotFound ? "; mount or make that directory first" : "";
    return Error(base.error().code(), "open store " + url + ": " + base.error().message() + cure);
  }
  return std::make_unique<Store>(FileUrl(path), std::move(*base), clock);
}

}  // namespace sp
