#include "durable/s3_calls.h"

#include <charconv>

#include "durable/s3_checksums.h"
#include "durable/s3_errors.h"
#include "durable/s3_xml.h"

namespace sp {

Result<S3Reply> S3Call(S3Client& client, const S3Request& request, const std::string& what, const CallLimits& limits) {
  SP_ASSIGN_OR_RETURN(S3Reply reply, client.Send(request, what, limits));
  if (reply.failed()) return std::unexpected(S3Failure(reply, what, client.options()));
  return reply;
}

Result<ObjectInfo> S3Head(S3Client& client, const std::string& key, const std::string& what, const CallLimits& limits) {
  S3Request request{.method = "HEAD", .key = key};
  if (client.options().checksums == S3Checksums::kHeader) request.headers = {{"x-amz-checksum-mode", "ENABLED"}};
  SP_ASSIGN_OR_RETURN(const S3Reply reply, S3Call(client, request, what, limits));
  ObjectInfo info;
  const std::string length = reply.header("content-length");
  if (std::from_chars(length.data(), length.data() + length.size(), info.size_bytes).ptr != length.data() + length.size() || length.empty()) {
    return Error(StatusCode::kUnavailable, what + ": the store's reply has no length");
  }
  info.modified_unix_s = UnixSecondsOfDate(reply.header("last-modified"));
  if (reply.header("x-amz-checksum-type") != "COMPOSITE") info.crc32c = CrcFromBase64(reply.header("x-amz-checksum-crc32c"));
  return info;
}

}  // namespace sp
