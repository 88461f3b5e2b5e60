// From a URL to a store.
#pragma once

#include <memory>
#include <string>

#include "durable/object_store.h"

namespace sp {

// "file:///absolute/path" or, where it was built in, "s3://bucket/prefix" (docs/operating/durable.md, docs/operating/s3.md). Asks nobody: that the place exists and what it
// can do is for Probe to find out. `clock` must outlive the store. kInvalidArgument says what is wrong with the URL.
Result<std::unique_ptr<ObjectStore>> OpenStore(const std::string& url, const Clock& clock);

// For whoever only reads: nothing is made where it is missing. By the steady clock.
Result<std::shared_ptr<ObjectStore>> OpenStoreForReading(const std::string& url);
// Of a read of so many bytes from such a store: half a minute, and what a link of 4 MB/s needs.
CallLimits ReadLimits(uint64_t bytes);

}  // namespace sp
