// From a URL to a store.
#pragma once

#include <memory>
#include <string>

#include "durable/object_store.h"

namespace sp {

// "file:///absolute/path" or "s3://bucket/prefix" (docs/operating/durable.md, docs/operating/s3.md). kInvalidArgument says what is wrong with the URL.
// kNotFound: a directory that is missing is not made, for it may be a file system that is not mounted. What the place can do is for Probe to find out.
// `clock` must outlive the store.
Result<std::shared_ptr<ObjectStore>> OpenStore(const std::string& url, const Clock& clock);

// By the steady clock, for whoever only reads.
Result<std::shared_ptr<ObjectStore>> OpenStoreForReading(const std::string& url);
// Of a read of so many bytes from such a store: half a minute, and what a link of 4 MB/s needs.
CallLimits ReadLimits(uint64_t bytes);

}  // namespace sp
