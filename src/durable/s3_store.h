// S3Store: objects in a bucket of S3 or of a store that speaks its protocol, under a prefix. Thread-safe.
//
// What the interface leaves open:
//   Put      up to part_bytes in one request with If-None-Match, so it overwrites nothing anywhere. More of it in parts, as many at once
//            as there are connections, read from the source as they are sent. Asks with Head before it begins, and sends the condition with the last request,
//            too; stores that ignore it there would let one of two Puts of the same key at the same time replace the other's object.
//   Create   tries again where a reply was lost; if the store then says that there is one already, it may be ours: kUnavailable, read it back.
//   Probe    verifies_checksums: sends an object with a wrong CRC32C and sees whether the store takes it.
//   Head     crc32c: where the store keeps one of the whole object, not one of the checksums of its parts.
//   List     leaves out keys that CheckKey refuses, which somebody else put there.
//
// A redirect is never followed to a host that was not configured; the error says what to configure. Names of regions and endpoints come from the URL
// and the environment variables of ParseS3Url only; credentials from the usual chain, whose results are re-read before they expire and when the store
// says that they have.
#pragma once

#include <memory>

#include "base/clock.h"
#include "base/status.h"
#include "durable/object_store.h"
#include "durable/s3_options.h"

namespace sp {

class S3Store {
 public:
  // Asks nothing of the store yet. `clock` judges deadlines and lives at least as long as the store. kInvalidArgument in a build without s3://.
  static Result<std::unique_ptr<ObjectStore>> Open(const S3Options& options, const Clock& clock);
};

}  // namespace sp
