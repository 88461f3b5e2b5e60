#include "durable/open_store.h"

#include "durable/file_store.h"
#include "durable/s3_options.h"
#include "durable/s3_store.h"

namespace sp {
namespace {

const SteadyClock kSteadyClock;

Status UnknownScheme(const std::string& url) {
  return {StatusCode::kInvalidArgument, "\"" + url.substr(0, 200) + "\" is no URL of a store: write file:///absolute/path or s3://bucket/prefix"};
}

}  // namespace

Result<std::shared_ptr<ObjectStore>> OpenStore(const std::string& url, const Clock& clock) {
  if (url.starts_with("file:")) return FileStore::Open(url, clock, FileStore::MissingBase::kRefuse);
  if (!url.starts_with("s3:")) return std::unexpected(UnknownScheme(url));
  SP_ASSIGN_OR_RETURN(const S3Options options, ParseS3Url(url));
  return S3Store::Open(options, clock);
}

Result<std::shared_ptr<ObjectStore>> OpenStoreForReading(const std::string& url) { return OpenStore(url, kSteadyClock); }

CallLimits ReadLimits(uint64_t bytes) {
  CallLimits limits;
  limits.deadline = kSteadyClock.Now() + 30 * kNanosPerSecond + static_cast<Nanos>(bytes / 4'000'000) * kNanosPerSecond;
  return limits;
}

}  // namespace sp
