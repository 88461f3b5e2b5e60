// The upload of one object in parts. Steps, and what a crash after each leaves behind:
//   1. CreateMultipartUpload   an upload without parts, which ListUploads shows and AbortUpload removes
//   2. UploadPart, in parallel the same with parts, which the store keeps and charges for until then
//   3. CompleteMultipartUpload the object, whole; it did not exist in part at any time
// On an error the upload is aborted, within a short time of its own. Not where step 3 may still succeed: what then remains is told apart by Head.
#pragma once

#include <string>
#include <vector>

#include "durable/object_store.h"
#include "durable/s3_client.h"
#include "durable/s3_xml.h"

namespace sp {

// Cuts an object into parts. Pure.
struct S3PartPlan {
  S3PartPlan(uint64_t size_bytes, uint64_t part_bytes);  // part_bytes grows as needed for kPartsMax parts.
  static constexpr uint64_t kPartsMax = 10000;

  size_t count() const { return (size + part_bytes - 1) / part_bytes; }
  uint64_t begin(size_t part) const { return part * part_bytes; }
  uint64_t end(size_t part) const;

  uint64_t size, part_bytes;
};

class S3Upload {
 public:
  S3Upload(S3Client& client, const Clock& clock, std::string key, std::string what) :
      client_(client), clock_(clock), key_(std::move(key)), what_(std::move(what)) {}

  // `key` with the base. The caller found that there is no such object. kNotFound of the bucket, or that somebody removed the upload: kUnavailable.
  // `exists` is set where the store answered that there is one by now.
  Status Run(const PutSource& source, const CallLimits& limits, bool* exists);

 private:
  Status Begin(const CallLimits& limits);
  Status SendParts(const PutSource& source, const CallLimits& limits);
  Status Complete(const PutSource& source, const CallLimits& limits, bool* exists);
  // After a Complete whose reply was lost: is the object there, and is it this one?
  Status LookUp(const PutSource& source, const Status& otherwise, const CallLimits& limits);
  void Abort();
  bool with_checksums() const { return client_.options().checksums == S3Checksums::kHeader; }

  S3Client& client_;
  const Clock& clock_;
  const std::string key_, what_;
  std::string id_;
  std::vector<XmlPart> parts_;
};

}  // namespace sp
