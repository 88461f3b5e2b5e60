#include "durable/memory_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/crc32c.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr size_t kChunkBytes = 8u << 20;
constexpr size_t kPageObjects = 1000;

// kCorrupt, naming the block, where the bytes do not have the checksums that came with them.
Status CompareBlocks(ByteSpan content, const std::vector<uint32_t>& block_crcs) {
  for (size_t block = 0; block < block_crcs.size(); ++block) {
    const uint64_t at = block * kBlockBytes;
    if (Crc32c(0, content.subspan(at, std::min<uint64_t>(kBlockBytes, content.size() - at))) != block_crcs[block]) {
      return {StatusCode::kCorrupt, "block " + std::to_string(block) + " does not have the checksum that came with it"};
    }
  }
  return {};
}

}  // namespace

MemoryStore::MemoryStore(const Clock& clock, StoreAbilities abilities, std::string url)
    : clock_(clock), abilities_(abilities), url_(std::move(url)) {}

Status MemoryStore::Check(const std::string& key, const CallLimits& limits, const std::string& what) const {
  SP_RETURN_IF_ERROR(CheckKey(key));
  return CheckLimits(limits, clock_.Now(), what + " " + url_ + "/" + key);
}

MemoryStore::Object MemoryStore::MakeObject(std::vector<uint8_t> content) const {
  const uint32_t crc32c = Crc32c(0, content);
  return {std::make_shared<const std::vector<uint8_t>>(std::move(content)), crc32c, clock_.Now() / kNanosPerSecond};
}

Result<StoreAbilities> MemoryStore::Probe(const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckLimits(limits, clock_.Now(), "probe " + url_));
  return abilities_;
}

Status MemoryStore::Put(const std::string& key, const PutSource& source, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(Check(key, limits, "put"));
  SP_RETURN_IF_ERROR(CheckSource(source));
  std::vector<uint8_t> content;
  content.resize(source.size_bytes);
  for (uint64_t at = 0; at < content.size(); at += kChunkBytes) {
    SP_RETURN_IF_ERROR(Check(key, limits, "put"));
    const MutableByteSpan chunk = MutableByteSpan(content).subspan(at, std::min<uint64_t>(kChunkBytes, content.size() - at));
    if (source.pace) source.pace(chunk.size());
    SP_RETURN_IF_ERROR(source.read(at, chunk));
    if (limits.progress) limits.progress(chunk.size());
  }
  SP_RETURN_IF_ERROR(Check(key, limits, "put"));
  const std::string what = "put " + url_ + "/" + key;
  if (abilities_.verifies_checksums) {
    if (const Status compared = CompareBlocks(content, source.block_crcs); !compared.ok()) return WithContext(what, compared);
  }
  const uint64_t size = content.size();
  Object object = MakeObject(std::move(content));
  const std::lock_guard lock(mutex_);
  const auto [at, made] = objects_.try_emplace(key, std::move(object));
  if (made || at->second.content->size() == size) return {};
  return {StatusCode::kCorrupt, what + ": there is an object of " + std::to_string(at->second.content->size()) + " bytes already, not of " +
                                    std::to_string(size) + "; it was left as it is"};
}

Result<bool> MemoryStore::Create(const std::string& key, ByteSpan content, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(Check(key, limits, "create"));
  Object object = MakeObject({content.begin(), content.end()});
  const std::lock_guard lock(mutex_);
  if (!abilities_.conditional_create) {
    objects_.insert_or_assign(key, std::move(object));
    return true;
  }
  return objects_.try_emplace(key, std::move(object)).second;
}

Status MemoryStore::ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(Check(key, limits, "read"));
  Content content;
  {
    const std::lock_guard lock(mutex_);
    const auto at = objects_.find(key);
    if (at == objects_.end()) return {StatusCode::kNotFound, "read " + url_ + "/" + key + ": there is no such object"};
    content = at->second.content;
  }
  if (offset > content->size() || out.size() > content->size() - offset) {
    return {StatusCode::kCorrupt, "read " + url_ + "/" + key + ": bytes " + std::to_string(offset) + " to " + std::to_string(offset + out.size()) +
                                      " of an object that has " + std::to_string(content->size())};
  }
  if (!out.empty()) std::memcpy(out.data(), content->data() + offset, out.size());
  return {};
}

Result<ObjectInfo> MemoryStore::Head(const std::string& key, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(Check(key, limits, "head"));
  const std::lock_guard lock(mutex_);
  const auto at = objects_.find(key);
  if (at == objects_.end()) return Error(StatusCode::kNotFound, "head " + url_ + "/" + key + ": there is no such object");
  return ObjectInfo{key, at->second.content->size(), at->second.modified_unix_s, at->second.crc32c};
}

Result<ListPage> MemoryStore::List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckPrefix(prefix));
  SP_RETURN_IF_ERROR(CheckLimits(limits, clock_.Now(), "list " + url_ + "/" + prefix));
  const std::lock_guard lock(mutex_);
  ListPage page;
  for (auto at = cursor < prefix ? objects_.lower_bound(prefix) : objects_.upper_bound(cursor); at != objects_.end(); ++at) {
    if (!at->first.starts_with(prefix)) break;
    if (page.objects.size() == kPageObjects) {
      page.next = page.objects.back().key;
      break;
    }
    page.objects.push_back({at->first, at->second.content->size(), at->second.modified_unix_s, at->second.crc32c});
  }
  return page;
}

Status MemoryStore::Delete(const std::string& key, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(Check(key, limits, "delete"));
  const std::lock_guard lock(mutex_);
  objects_.erase(key);
  return {};
}

Result<std::vector<UnfinishedUpload>> MemoryStore::ListUploads(const std::string& prefix, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckPrefix(prefix));
  SP_RETURN_IF_ERROR(CheckLimits(limits, clock_.Now(), "list uploads " + url_ + "/" + prefix));
  const std::lock_guard lock(mutex_);
  std::vector<UnfinishedUpload> found;
  std::ranges::copy_if(uploads_, std::back_inserter(found), [&](const auto& upload) { return upload.key.starts_with(prefix); });
  return found;
}

Status MemoryStore::AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(Check(upload.key, limits, "abort upload of"));
  const std::lock_guard lock(mutex_);
  std::erase_if(uploads_, [&](const auto& known) { return known.id == upload.id && known.key == upload.key; });
  return {};
}

void MemoryStore::LeaveUnfinishedUpload(const std::string& key) {
  const std::lock_guard lock(mutex_);
  uploads_.push_back({key, "upload-" + std::to_string(++last_upload_), clock_.Now() / kNanosPerSecond});
}

}  // namespace sp
