#include "durable/s3_store.h"

namespace sp {

Result<std::unique_ptr<ObjectStore>> S3Store::Open(const S3Options& options, const Clock&) {
  return Error(StatusCode::kInvalidArgument, S3ObjectUrl(options, "") + ": this build has no s3:// (it was configured with SP_S3=OFF)");
}

}  // namespace sp
