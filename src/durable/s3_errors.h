// What an S3 reply means: whether to try again, and the Status for the caller. Pure.
//
// Messages hold the operation, the URL of the object, the store's error code and its request id; never the store's own text, which may quote what
// was signed, and never a credential.
#pragma once

#include <string>

#include "base/status.h"
#include "durable/s3_options.h"
#include "durable/s3_request.h"

namespace sp {

// The <Code> of an error document, as far as it consists of letters and digits; empty if there is none.
std::string S3ErrorCode(const S3Reply& reply);

// Worth trying again: no connection, 5xx, throttling.
bool S3IsTransient(const S3Reply& reply);
// The store may have done what it was asked although this is no success.
bool S3MayBeDone(const S3Reply& reply);
// New credentials may help.
bool S3WantsNewCredentials(const S3Reply& reply);

// The Status of a failed reply. `what` is e.g. "put s3://bucket/key".
Status S3Failure(const S3Reply& reply, const std::string& what, const S3Options& options);

}  // namespace sp
