#include "durable/open_store.h"

#include "durable/file_store.h"
#include "durable/s3_options.h"
#include "durable/s3_store.h"
#include "durable/store_url.h"

namespace sp {
namespace {

const SteadyClock kSteadyClock;

}  // namespace

Result<std::shared_ptr<ObjectStore>> OpenStore(const std::string& url, const Clock& clock) {
  SP_ASSIGN_OR_RETURN(const std::string resolved, ResolveStoreUrl(url));
  if (resolved.starts_with("file:")) return FileStore::Open(resolved, clock, FileStore::MissingBase::kRefuse);
  SP_ASSIGN_OR_RETURN(const S3Options options, ParseS3Url(resolved));
  return S3Store::Open(options, clock);
}

Result<std::shared_ptr<ObjectStore>> OpenStoreForReading(const std::string& url) { return OpenStore(url, kSteadyClock); }

CallLimits ReadLimits(uint64_t bytes) {
  CallLimits limits;
  limits.deadline = kSteadyClock.Now() + 30 * kNanosPerSecond + static_cast<Nanos>(bytes / 4'000'000) * kNanosPerSecond;
  return limits;
}

}  // namespace sp
