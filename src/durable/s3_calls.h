// Requests that both S3Store and S3Upload make.
#pragma once

#include <string>

#include "durable/object_store.h"
#include "durable/s3_client.h"

namespace sp {

// Sends one request. A reply that is no success becomes its Status.
Result<S3Reply> S3Call(S3Client& client, const S3Request& request, const std::string& what, const CallLimits& limits);

// HeadObject of `key`, with the base; the info's key is empty. kCorrupt if the reply has no length.
Result<ObjectInfo> S3Head(S3Client& client, const std::string& key, const std::string& what, const CallLimits& limits);

}  // namespace sp
