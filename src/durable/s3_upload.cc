#include "durable/s3_upload.h"

#include <algorithm>
#include <limits>

#include "durable/s3_calls.h"
#include "durable/s3_checksums.h"
#include "durable/s3_errors.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr Nanos kAbortTime = 2 * kNanosPerSecond;

}  // namespace

S3PartPlan::S3PartPlan(uint64_t size_bytes, uint64_t wanted) : size(size_bytes), part_bytes(wanted) {
  part_bytes = std::max(part_bytes, AlignUp((size + kPartsMax - 1) / kPartsMax, kBlockBytes));
}

uint64_t S3PartPlan::end(size_t part) const { return std::min(size, (part + 1) * part_bytes); }

Status S3Upload::Run(const PutSource& source, const CallLimits& limits, bool* exists) {
  SP_RETURN_IF_ERROR(Begin(limits));
  Status status = SendParts(source, limits);
  if (status.ok()) status = CheckLimits(limits, clock_.Now(), what_);
  if (!status.ok()) {
    Abort();
    return status;
  }
  return Complete(source, limits, exists);
}

Status S3Upload::Begin(const CallLimits& limits) {
  S3Request request{.method = "POST", .key = key_, .query = {{"uploads", ""}}};
  if (with_checksums()) request.headers = {{"x-amz-checksum-algorithm", "CRC32C"}, {"x-amz-checksum-type", "FULL_OBJECT"}};
  SP_ASSIGN_OR_RETURN(const S3Reply reply, S3Call(client_, request, what_, limits));
  auto id = XmlUploadId(reply.body);
  if (!id) return WithContext(what_, id.error());
  id_ = std::move(*id);
  return {};
}

Status S3Upload::SendParts(const PutSource& source, const CallLimits& limits) {
  const S3PartPlan plan(source.size_bytes, client_.options().part_bytes);
  parts_.resize(plan.count());
  const auto make = [&](size_t index) -> Result<S3Request> {
    S3Request request{.method = "PUT", .key = key_};
    parts_[index].number = static_cast<uint32_t>(index + 1);
    request.query = {{"partNumber", std::to_string(index + 1)}, {"uploadId", id_}};
    if (source.pace) source.pace(plan.end(index) - plan.begin(index));
    request.body = S3Body(source, plan.begin(index), plan.end(index));
    if (with_checksums()) {
      parts_[index].crc32c = CrcOfRange(source.block_crcs, plan.size, plan.begin(index), plan.end(index));
      request.headers = {{"x-amz-checksum-crc32c", CrcToBase64(*parts_[index].crc32c)}};
    }
    return request;
  };
  const auto done = [&](size_t index, S3Reply&& reply) -> Status {
    const std::string what = what_ + ", part " + std::to_string(index + 1);
    if (S3ErrorCode(reply) == "NoSuchUpload") {  // F62: the next Put begins a new one.
      return {StatusCode::kUnavailable, what + ": somebody aborted the upload, perhaps a lifecycle rule of the bucket"};
    }
    if (reply.failed()) return S3Failure(reply, what, client_.options());
    parts_[index].etag = reply.header("etag");
    if (parts_[index].etag.empty()) return {StatusCode::kUnavailable, what + ": the store's reply has no ETag"};
    const auto stored = CrcFromBase64(reply.header("x-amz-checksum-crc32c"));
    if (stored && parts_[index].crc32c && *stored != *parts_[index].crc32c) return {StatusCode::kCorrupt, what + ": the store has another checksum"};
    if (limits.progress) limits.progress(plan.end(index) - plan.begin(index));
    return {};
  };
  return client_.SendAll(plan.count(), make, done, what_, limits);
}

Status S3Upload::Complete(const PutSource& source, const CallLimits& limits, bool* exists) {
  S3Request request{.method = "POST", .key = key_, .query = {{"uploadId", id_}}};
  const std::string body = XmlCompleteRequest(parts_);
  request.body = AsBytes(body);
  request.headers = {{"content-type", "application/xml"}, {"if-none-match", "*"}};
  if (with_checksums()) request.headers.emplace_back("x-amz-checksum-type", "FULL_OBJECT");
  auto sent = client_.Send(request, what_, limits);
  if (!sent) return sent.error();  // Too late or cancelled. It may still succeed, so it is not aborted.
  const S3Reply& reply = *sent;
  if (!reply.failed()) {
    // A 200 is only the beginning of the answer: the error may stand in the body (F59).
    const auto completed = XmlCompletedUpload(reply.body);
    if (completed) {
      const uint64_t size = source.size_bytes;
      const bool other = completed->crc32c && with_checksums() && *completed->crc32c != CrcOfRange(source.block_crcs, size, 0, size);
      return other ? Status(StatusCode::kCorrupt, what_ + ": the store has another checksum of the object") : Status();
    }
    const std::string code = S3ErrorCode(reply);
    return LookUp(source,
                  {StatusCode::kUnavailable, what_ + ": HTTP 200 with " + (code.empty() ? completed.error().message() : "the error " + code) + " inside"},
                  limits);
  }
  if (reply.http_status == 412 || reply.http_status == 409) {
    Abort();
    if (reply.maybe_done) return LookUp(source, S3Failure(reply, what_, client_.options()), limits);
    *exists = true;
    return {};
  }
  Status failure = S3Failure(reply, what_, client_.options());
  const bool gone = S3ErrorCode(reply) == "NoSuchUpload";
  if (gone) failure = Status(StatusCode::kUnavailable, what_ + ": somebody aborted the upload, perhaps a lifecycle rule of the bucket");
  // NoSuchUpload is also what a repeated request gets when the first one succeeded and its reply was lost (F60).
  if (gone || reply.maybe_done || S3MayBeDone(reply)) return LookUp(source, failure, limits);
  Abort();
  return failure;
}

Status S3Upload::LookUp(const PutSource& source, const Status& otherwise, const CallLimits& limits) {
  const auto info = S3Head(client_, key_, what_, limits);
  if (!info) {
    Abort();
    return info.error().code() == StatusCode::kNotFound ? otherwise : info.error();
  }
  const uint64_t size = source.size_bytes;
  if (info->size_bytes != size) return {StatusCode::kCorrupt, what_ + ": there is an object of " + std::to_string(info->size_bytes) + " bytes"};
  if (info->crc32c && source.block_crcs.size() == BlockCount(size) && *info->crc32c != CrcOfRange(source.block_crcs, size, 0, size)) {
    return {StatusCode::kCorrupt, what_ + ": there is an object with another checksum"};
  }
  return {};
}

void S3Upload::Abort() {
  // By its own deadline: the caller's may have passed, and his cancel is why we are here.
  CallLimits limits;
  limits.deadline = clock_.Now() + kAbortTime;
  const S3Request request{.method = "DELETE", .key = key_, .query = {{"uploadId", id_}}};
  // Whatever comes of it: the sweep removes what is left.
  (void)client_.Send(request, what_, limits);
}

}  // namespace sp
