#include "durable/s3_errors.h"

#include <aws/auth/auth.h>
#include <aws/common/error.h>
#include <aws/http/http.h>
#include <aws/io/io.h>

#include <algorithm>

#include "durable/s3_xml.h"

namespace sp {
namespace {

constexpr size_t kCodeBytesMax = 64;

// What a server sent, fit for a log.
std::string Clean(std::string text) {
  std::erase_if(text, [](char c) { return !((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '.'); });
  return text.substr(0, kCodeBytesMax);
}

bool IsAuthFailure(int failure) {
  return failure >= static_cast<int>(AWS_ERROR_ENUM_BEGIN_RANGE(AWS_C_AUTH_PACKAGE_ID)) &&
         failure <= static_cast<int>(AWS_ERROR_ENUM_END_RANGE(AWS_C_AUTH_PACKAGE_ID));
}

bool IsSkewed(const std::string& code) { return code == "RequestTimeTooSkewed"; }

// A reply to HEAD has no document, so an expired token is a 400 like any other.
bool IsUnexplained(const S3Reply& reply) { return reply.failure == 0 && reply.http_status == 400 && reply.body.empty(); }

bool IsExpired(const std::string& code) { return code == "ExpiredToken" || code == "ExpiredTokenException" || code == "TokenRefreshRequired"; }

bool IsElsewhere(const S3Reply& reply, const std::string& code) {
  return (reply.http_status >= 300 && reply.http_status < 400) || code == "PermanentRedirect" || code == "TemporaryRedirect" ||
         code == "AuthorizationHeaderMalformed" || code == "IllegalLocationConstraintException";
}

bool IsThrottling(const S3Reply& reply, const std::string& code) {
  return reply.http_status == 429 || code == "TooManyRequests" || code == "SlowDown" || code == "ServiceUnavailable" || code == "RequestTimeout" ||
         code == "InternalError" || code == "OperationAborted";
}

bool IsFull(const S3Reply& reply, const std::string& code) {
  static constexpr auto kFull = {"QuotaExceeded", "InsufficientCapacity", "InsufficientStorage", "XMinioStorageFull"};
  return reply.http_status == 507 || std::ranges::find(kFull, code) != kFull.end();
}

Status ByHttpStatus(const S3Reply& reply, const std::string& code, const std::string& message) {
  static constexpr auto kBadBytes = {"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody"};
  if (std::ranges::find(kBadBytes, code) != kBadBytes.end()) return {StatusCode::kCorrupt, message + ": the store received other bytes than were sealed"};
  if (IsFull(reply, code)) return {StatusCode::kNoSpace, message + "; the store is full or its quota used up: delete something (safepoint gc), or raise it"};
  if (IsUnexplained(reply)) return {StatusCode::kInvalidArgument, message + " without a reason; expired credentials can be one"};
  if (reply.http_status == 501) return {StatusCode::kInvalidArgument, message + ": the store cannot do that"};
  if (IsThrottling(reply, code) || reply.http_status >= 500) return {StatusCode::kUnavailable, message};
  if (code == "AccessDenied") return {StatusCode::kDenied, message + "; check the credentials and what their policy allows"};
  switch (reply.http_status) {
    case 200: return {StatusCode::kUnavailable, message + " inside, so it was not done"};  // F59: S3 asks to try that again.
    case 401:
    case 403: return {StatusCode::kDenied, message + "; check the credentials and what their policy allows"};
    case 404: return {StatusCode::kNotFound, message};
    case 408: return {StatusCode::kUnavailable, message};
    case 416: return {StatusCode::kCorrupt, message + ": the object is shorter"};
    default: return {StatusCode::kInvalidArgument, message + "; check region, endpoint, path_style and checksums of the store's URL"};
  }
}

}  // namespace

std::string S3ErrorCode(const S3Reply& reply) { return Clean(XmlErrorCode(reply.body)); }

bool S3IsTransient(const S3Reply& reply) {
  if (!reply.failed() || !reply.source.ok() || reply.wrong_content) return false;
  if (reply.failure != 0) return !IsAuthFailure(reply.failure) && reply.failure != AWS_ERROR_INVALID_ARGUMENT && reply.failure != AWS_ERROR_OOM;
  const std::string code = S3ErrorCode(reply);
  if (IsSkewed(code) || IsFull(reply, code) || IsElsewhere(reply, code)) return false;
  return IsThrottling(reply, code) || reply.http_status == 408 || (reply.http_status >= 500 && reply.http_status != 501);
}

bool S3MayBeDone(const S3Reply& reply) {
  if (!reply.failed() || !reply.sent || !reply.source.ok()) return false;
  return reply.failure != 0 || reply.http_status >= 500 || reply.http_status < 300;
}

bool S3WantsNewCredentials(const S3Reply& reply) { return reply.failed() && (IsExpired(S3ErrorCode(reply)) || IsUnexplained(reply)); }

Status S3Failure(const S3Reply& reply, const std::string& what, const S3Options& options) {
  if (!reply.source.ok()) return WithContext(what, reply.source);
  const std::string code = S3ErrorCode(reply);
  std::string message = what + " at " + S3Authority(options) + ": ";
  if (reply.failure == 0) message += "HTTP " + std::to_string(reply.http_status) + (code.empty() ? "" : " " + code);
  else message += aws_error_str(reply.failure);
  if (const std::string id = Clean(reply.header("x-amz-request-id")); !id.empty()) message += " (request " + id + ")";
  if (reply.attempts > 1) message += ", after " + std::to_string(reply.attempts) + " attempts";

  if (IsSkewed(code)) {
    return {StatusCode::kInvalidArgument, message + "; the clocks of this machine and of the store are more than 15 minutes apart: set this one by NTP"};
  }
  if (IsExpired(code)) {
    if (options.credentials) return {StatusCode::kDenied, message + "; the given credentials have expired"};
    return {StatusCode::kUnavailable, message + "; the credentials have expired and the chain has no newer ones yet"};
  }
  if (IsElsewhere(reply, code)) {
    const std::string region = Clean(reply.header("x-amz-bucket-region"));
    return {StatusCode::kInvalidArgument, message + "; the bucket is not served here" + (region.empty() ? "" : ", its region is " + region) +
                                              ": set region and endpoint of the URL (now " + options.region + "). Redirects are not followed"};
  }
  if (code == "NoSuchBucket" && reply.http_status == 404) {
    return {StatusCode::kNotFound, message + "; make the bucket, or name another one in the store's URL: a missing one is never made"};
  }
  if (IsAuthFailure(reply.failure)) return {StatusCode::kUnavailable, message + "; no credentials could be had from the usual AWS places"};
  if (reply.wrong_content) return {StatusCode::kCorrupt, message + ": the reply is not what was asked for"};
  if (reply.failure == AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE) {
    return {StatusCode::kUnavailable, message + "; if the certificate is not signed by an authority that the system trusts, name it with ca_file"};
  }
  if (reply.failure == AWS_ERROR_INVALID_ARGUMENT) return {StatusCode::kInternal, message};
  if (reply.failure != 0) return {StatusCode::kUnavailable, message + (reply.sent ? "" : "; check the endpoint of the store's URL, and that it is reachable from here")};
  return ByHttpStatus(reply, code, message);
}

}  // namespace sp
