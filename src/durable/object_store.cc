#include "durable/object_store.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "base/crc32c.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr size_t kKeyBytesMax = 900;  // S3 has 1,024 for base and key together.

bool IsKeyByte(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || std::string_view("._=+@%-").find(c) != std::string_view::npos;
}

Status Refuse(const char* what, const std::string& text, const std::string& why) {
  // Foreign bytes do not belong in a log.
  std::string shown = text.substr(0, 100);
  std::ranges::replace_if(shown, [](char c) { return c < ' ' || c > '~'; }, '?');
  return {StatusCode::kInvalidArgument, std::string(what) + " '" + shown + "': " + why};
}

Status CheckText(const char* what, const std::string& text, bool may_end_anywhere) {
  if (text.size() > kKeyBytesMax) return Refuse(what, text, "longer than " + std::to_string(kKeyBytesMax) + " bytes");
  std::string_view rest = text;
  while (true) {
    const size_t slash = rest.find('/');
    const std::string_view segment = rest.substr(0, slash);
    const bool open_end = may_end_anywhere && slash == rest.npos;  // What is missing may still follow.
    if (!open_end && segment.empty()) return Refuse(what, text, "has an empty segment");
    if (!open_end && (segment == "." || segment == "..")) return Refuse(what, text, "has the segment '" + std::string(segment) + "'");
    if (!std::ranges::all_of(segment, IsKeyByte)) return Refuse(what, text, "only letters, digits and ._=+@%- may be in a segment");
    if (slash == rest.npos) return {};
    rest = rest.substr(slash + 1);
  }
}

}  // namespace

PutSource PutSource::OfMemory(ByteSpan bytes, std::vector<uint32_t> block_crcs) {
  return {bytes.size(), std::move(block_crcs), [bytes](uint64_t offset, MutableByteSpan out) -> Status {
            std::memcpy(out.data(), bytes.data() + offset, out.size());
            return {};
          }};
}

PutSource PutSource::OfMemory(ByteSpan bytes) {
  std::vector<uint32_t> crcs;
  for (uint64_t at = 0; at < bytes.size(); at += kBlockBytes) crcs.push_back(Crc32c(0, bytes.subspan(at, std::min(kBlockBytes, bytes.size() - at))));
  return OfMemory(bytes, std::move(crcs));
}

Status ForEachObject(ObjectStore& store, const std::string& prefix, const CallLimits& limits, const std::function<void(const ObjectInfo&)>& on_object) {
  std::string cursor;
  do {
    SP_ASSIGN_OR_RETURN(ListPage page, store.List(prefix, cursor, limits));
    for (const ObjectInfo& object : page.objects) on_object(object);
    cursor = std::move(page.next);
  } while (!cursor.empty());
  return {};
}

Result<std::vector<ObjectInfo>> ListAll(ObjectStore& store, const std::string& prefix, const CallLimits& limits) {
  std::vector<ObjectInfo> objects;
  SP_RETURN_IF_ERROR(ForEachObject(store, prefix, limits, [&](const ObjectInfo& object) { objects.push_back(object); }));
  return objects;
}

std::string ObjectUrl(const ObjectStore& store, const std::string& key) {
  const std::string& url = store.url();
  const size_t parameters = std::min(url.find('?'), url.size());
  return url.substr(0, parameters) + "/" + key;
}

Status CheckKey(const std::string& key) { return CheckText("object key", key, false); }

Status CheckPrefix(const std::string& prefix) { return CheckText("prefix of object keys", prefix, true); }

Status CheckLimits(const CallLimits& limits, Nanos now, const std::string& what) {
  if (limits.cancelled != nullptr && limits.cancelled->load(std::memory_order_relaxed)) return {StatusCode::kClosed, what + ": cancelled"};
  if (now > limits.deadline) return {StatusCode::kDeadline, what + ": not done by the deadline"};
  return {};
}

Status CheckSource(const PutSource& source) {
  const uint64_t blocks = BlockCount(source.size_bytes);
  if (source.block_crcs.size() != blocks) {
    return {StatusCode::kInvalidArgument,
            "an object of " + std::to_string(blocks) + " blocks came with " + std::to_string(source.block_crcs.size()) + " checksums"};
  }
  return {};
}

Status ReadBlock(const PutSource& source, uint64_t block, MutableByteSpan out) {
  SP_RETURN_IF_ERROR(source.read(block * kBlockBytes, out));
  return Crc32c(0, out) == source.block_crcs[block] ? Status() : BlockDiffers(block);
}

Status BlockDiffers(uint64_t block) {
  return {StatusCode::kCorrupt, "block " + std::to_string(block) + " of what is to be written does not match its checksum"};
}

Status WithContext(const std::string& what, const Status& status) { return {status.code(), what + ": " + status.message()}; }

}  // namespace sp
