// The few XML documents of the S3 protocol that are read or written. Pure. Elements it does not know are passed over; what is no whole document
// of the expected kind is kUnavailable, as if nothing had been answered.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "durable/object_store.h"

namespace sp {

// <Error><Code>, also inside a reply with status 200; empty if `document` is not such an error.
std::string XmlErrorCode(std::string_view document);

// The UploadId of an InitiateMultipartUploadResult.
Result<std::string> XmlUploadId(std::string_view document);

// Of a CompleteMultipartUploadResult, which must have been read to its end: the store's own checksum of the whole object, if it says one.
struct XmlCompleted {
  std::string etag;
  std::optional<uint32_t> crc32c;
};
Result<XmlCompleted> XmlCompletedUpload(std::string_view document);

struct XmlPart {
  uint32_t number = 0;
  std::string etag;
  std::optional<uint32_t> crc32c;
};
std::string XmlCompleteRequest(const std::vector<XmlPart>& parts);

// A ListBucketResult: all keys as the store has them, with the base.
Result<ListPage> XmlListPage(std::string_view document);

struct XmlUploads {
  std::vector<UnfinishedUpload> uploads;
  bool more = false;
  std::string next_key, next_id;
};
Result<XmlUploads> XmlUploadList(std::string_view document);

// Seconds since 1970 of an ISO 8601 or RFC 1123 date; 0 if it is none.
int64_t UnixSecondsOfDate(std::string_view date);

}  // namespace sp
