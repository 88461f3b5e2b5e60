#include "durable/s3_store.h"

#include <algorithm>

#include "base/crc32c.h"
#include "durable/s3_calls.h"
#include "durable/s3_checksums.h"
#include "durable/s3_client.h"
#include "durable/s3_errors.h"
#include "durable/s3_upload.h"
#include "durable/s3_xml.h"
#include "os/system.h"
#include "format/constants.h"

namespace sp {
namespace {

class S3StoreImpl final : public ObjectStore {
 public:
  S3StoreImpl(std::unique_ptr<S3Client> client, const Clock& clock) : client_(std::move(client)), clock_(clock), url_(S3Url(options())) {}

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
  const S3Options& options() const { return client_->options(); }
  std::string What(const char* verb, const std::string& key) const { return std::string(verb) + " " + S3ObjectUrl(options(), key); }
  std::string FullKey(const std::string& key) const { return options().base.empty() ? key : options().base + "/" + key; }
  // False: `key` lies outside the base, or is no key.
  bool StripBase(std::string* key) const {
    if (!options().base.empty()) {
      if (!key->starts_with(options().base + "/")) return false;
      key->erase(0, options().base.size() + 1);
    }
    return CheckKey(*key).ok();
  }
  // One PutObject that fails where there is an object.
  enum class Outcome { kMade, kExists, kPerhapsMade };  // The last: there is one, and the reply to an earlier attempt was lost.
  Result<Outcome> PutNew(const std::string& key, const S3Body& content, uint32_t crc, const std::string& what, const CallLimits& limits);
  // There is an object of this key: kOk if it has this length, and this checksum as far as the store tells one.
  Status Compare(const std::string& key, const PutSource& source, const std::string& what, const CallLimits& limits);
  Result<bool> RefusesWrongChecksum(const std::string& key, const CallLimits& limits);

  const std::unique_ptr<S3Client> client_;
  const Clock& clock_;
  const std::string url_;
};

Result<StoreAbilities> S3StoreImpl::Probe(const CallLimits& limits) {
  const std::string key = std::string(kProbeFolder) + RandomId128().ToHex(), other = key + "-wrong-checksum";
  StoreAbilities abilities;
  const std::string first = "safepoint probe, first", second = "safepoint probe, second";
  SP_ASSIGN_OR_RETURN(const bool made, Create(key, AsBytes(first), limits));
  if (!made) return Error(StatusCode::kUnavailable, What("probe", key) + ": the store says that this new key is taken");
  const Result<bool> again = Create(key, AsBytes(second), limits);
  if (!again) {
    (void)Delete(key, limits);  // The error that is told is the first one.
    return std::unexpected(again.error());
  }
  const bool made_again = *again;
  std::string found(first.size(), '\0');
  const Status read = ReadRange(key, 0, {reinterpret_cast<uint8_t*>(found.data()), found.size()}, limits);
  abilities.conditional_create = !made_again && found == first;
  const Result<bool> refuses = read.ok() ? RefusesWrongChecksum(other, limits) : Result<bool>(std::unexpected(read));
  const Status deleted = Delete(key, limits);  // Also where the probe has failed: it is repeated, and would leave one each time.
  if (!refuses) return std::unexpected(refuses.error());
  if (!deleted.ok()) return std::unexpected(deleted);
  abilities.verifies_checksums = *refuses;
  return abilities;
}

Result<bool> S3StoreImpl::RefusesWrongChecksum(const std::string& key, const CallLimits& limits) {
  if (options().checksums == S3Checksums::kNone) return false;
  const std::string content = "safepoint probe, wrong checksum";
  const auto made = PutNew(key, AsBytes(content), ~Crc32c(0, AsBytes(content)), What("probe", key), limits);
  if (!made && made.error().code() == StatusCode::kCorrupt) return true;
  // A store that refuses it for another reason may do so for every request with a checksum: Put would tell.
  if (!made && made.error().code() != StatusCode::kInvalidArgument) return std::unexpected(made.error());
  if (made) SP_RETURN_IF_ERROR(Delete(key, limits));
  return false;
}

Status S3StoreImpl::Put(const std::string& key, const PutSource& source, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckKey(key));
  SP_RETURN_IF_ERROR(CheckSource(source));
  const std::string what = What("put", key);
  const uint64_t size = source.size_bytes;
  if (size <= options().part_bytes) {
    if (source.pace) source.pace(size);
    SP_ASSIGN_OR_RETURN(const Outcome outcome, PutNew(key, S3Body(source, 0, size), CrcOfRange(source.block_crcs, size, 0, size), what, limits));
    if (outcome != Outcome::kMade) return Compare(key, source, what, limits);
    if (limits.progress) limits.progress(size);
    return {};
  }
  const auto present = S3Head(*client_, FullKey(key), what, limits);
  bool exists = present.has_value();
  if (!exists && present.error().code() != StatusCode::kNotFound) return present.error();
  if (!exists) SP_RETURN_IF_ERROR(S3Upload(*client_, clock_, FullKey(key), what).Run(source, limits, &exists));
  return exists ? Compare(key, source, what, limits) : Status();
}

Result<S3StoreImpl::Outcome> S3StoreImpl::PutNew(const std::string& key, const S3Body& content, uint32_t crc, const std::string& what, const CallLimits& limits) {
  S3Request request{.method = "PUT", .key = FullKey(key), .headers = {{"if-none-match", "*"}}, .body = content};
  if (options().checksums == S3Checksums::kHeader) request.headers.emplace_back("x-amz-checksum-crc32c", CrcToBase64(crc));
  SP_ASSIGN_OR_RETURN(const S3Reply reply, client_->Send(request, what, limits));
  if (!reply.failed()) return Outcome::kMade;
  if (reply.http_status == 412 || reply.http_status == 409) return reply.maybe_done ? Outcome::kPerhapsMade : Outcome::kExists;
  return std::unexpected(S3Failure(reply, what, options()));
}

Status S3StoreImpl::Compare(const std::string& key, const PutSource& source, const std::string& what, const CallLimits& limits) {
  const uint64_t size = source.size_bytes;
  SP_ASSIGN_OR_RETURN(const ObjectInfo info, S3Head(*client_, FullKey(key), what, limits));
  if (info.size_bytes == size && info.crc32c && *info.crc32c != CrcOfRange(source.block_crcs, size, 0, size)) {
    return {StatusCode::kCorrupt, what + ": there is another object of this length, with another checksum"};
  }
  if (info.size_bytes == size) return {};
  return {StatusCode::kCorrupt, what + ": there is another object of " + std::to_string(info.size_bytes) + " bytes instead of " + std::to_string(size)};
}

Result<bool> S3StoreImpl::Create(const std::string& key, ByteSpan content, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckKey(key));
  const std::string what = What("create", key);
  SP_ASSIGN_OR_RETURN(const Outcome outcome, PutNew(key, content, Crc32c(0, content), what, limits));
  if (outcome != Outcome::kPerhapsMade) return outcome == Outcome::kMade;
  return Error(StatusCode::kUnavailable, what + ": there is an object, perhaps made by an attempt whose reply was lost: read it back");
}

Status S3StoreImpl::ReadRange(const std::string& key, uint64_t offset, MutableByteSpan out, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckKey(key));
  const std::string what = What("read", key);
  if (out.empty()) {  // No range of HTTP is empty.
    SP_ASSIGN_OR_RETURN(const ObjectInfo info, S3Head(*client_, FullKey(key), what, limits));
    if (offset > info.size_bytes) return {StatusCode::kCorrupt, what + ": the object ends before byte " + std::to_string(offset)};
    return {};
  }
  const uint64_t piece = options().part_bytes;
  const auto bytes_of = [&](size_t index) { return out.subspan(index * piece, std::min<uint64_t>(piece, out.size() - index * piece)); };
  const auto make = [&](size_t index) -> Result<S3Request> {
    return S3Request{.key = FullKey(key), .into = bytes_of(index), .offset = offset + index * piece};
  };
  const auto done = [&](size_t index, S3Reply&& reply) -> Status {
    if (reply.failed()) return S3Failure(reply, what, options());
    if (reply.received_bytes == bytes_of(index).size()) return {};
    return {StatusCode::kCorrupt, what + ": the object ends before byte " + std::to_string(offset + out.size())};
  };
  return client_->SendAll((out.size() + piece - 1) / piece, make, done, what, limits);
}

Result<ObjectInfo> S3StoreImpl::Head(const std::string& key, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckKey(key));
  SP_ASSIGN_OR_RETURN(ObjectInfo info, S3Head(*client_, FullKey(key), What("head", key), limits));
  info.key = key;
  return info;
}

Result<ListPage> S3StoreImpl::List(const std::string& prefix, const std::string& cursor, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckPrefix(prefix));
  const std::string what = What("list", prefix);
  S3Request request{.query = {{"list-type", "2"}, {"prefix", FullKey(prefix)}}};
  if (!cursor.empty()) request.query.emplace_back("continuation-token", cursor);
  SP_ASSIGN_OR_RETURN(const S3Reply reply, S3Call(*client_, request, what, limits));
  auto page = XmlListPage(reply.body);
  if (!page) return std::unexpected(WithContext(what, page.error()));
  std::erase_if(page->objects, [&](ObjectInfo& info) { return !StripBase(&info.key); });
  return page;
}

Status S3StoreImpl::Delete(const std::string& key, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckKey(key));
  const std::string what = What("delete", key);
  SP_ASSIGN_OR_RETURN(const S3Reply reply,
                      client_->Send({.method = "DELETE", .key = FullKey(key)}, what, limits));
  if (reply.failed() && S3ErrorCode(reply) != "NoSuchKey") return S3Failure(reply, what, options());
  return {};
}

Result<std::vector<UnfinishedUpload>> S3StoreImpl::ListUploads(const std::string& prefix, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckPrefix(prefix));
  const std::string what = What("list uploads of", prefix);
  std::vector<UnfinishedUpload> uploads;
  XmlUploads page;
  do {
    S3Request request{.query = {{"uploads", ""}, {"prefix", FullKey(prefix)}}};
    if (page.more) {
      request.query.emplace_back("key-marker", page.next_key);
      request.query.emplace_back("upload-id-marker", page.next_id);
    }
    SP_ASSIGN_OR_RETURN(const S3Reply reply, S3Call(*client_, request, what, limits));
    auto next = XmlUploadList(reply.body);
    if (!next) return std::unexpected(WithContext(what, next.error()));
    // A store that answers with the same page again and again is not asked for ever.
    if (page.more && next->more && next->next_key == page.next_key && next->next_id == page.next_id) {
      return Error(StatusCode::kUnavailable, what + ": the store's list of uploads does not end");
    }
    page = std::move(*next);
    for (UnfinishedUpload& upload : page.uploads) {
      if (StripBase(&upload.key)) uploads.push_back(std::move(upload));
    }
  } while (page.more);
  return uploads;
}

Status S3StoreImpl::AbortUpload(const UnfinishedUpload& upload, const CallLimits& limits) {
  SP_RETURN_IF_ERROR(CheckKey(upload.key));
  const std::string what = What("abort upload of", upload.key);
  const S3Request request{
      .method = "DELETE", .key = FullKey(upload.key), .query = {{"uploadId", upload.id}}};
  SP_ASSIGN_OR_RETURN(const S3Reply reply, client_->Send(request, what, limits));
  if (reply.failed() && S3ErrorCode(reply) != "NoSuchUpload") return S3Failure(reply, what, options());
  return {};
}

}  // namespace

Result<std::unique_ptr<ObjectStore>> S3Store::Open(const S3Options& options, const Clock& clock) {
  SP_ASSIGN_OR_RETURN(auto client, S3Client::Open(options, clock));
  return std::make_unique<S3StoreImpl>(std::move(client), clock);
}

}  // namespace sp
