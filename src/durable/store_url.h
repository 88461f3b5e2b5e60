// URLs of stores as texts: what they mean, without asking anybody. Thread-safe.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"

namespace sp {

// The URL of the same store with everything in it that is taken from the environment (docs/operating/s3.md), so that another process opens the same one.
// kInvalidArgument says what is wrong: no scheme that is known, a relative path, a query where there can be none.
Result<std::string> ResolveStoreUrl(const std::string& url);

// What of a URL that nobody has looked at yet may stand in a message: credentials may have been written into it, where there can be none (I-41).
std::string ShownUrl(std::string_view url);

// The path of a file URL, without a slash at its end.
Result<std::string> PathOfFileUrl(const std::string& url);
// And back.
std::string FileUrl(std::string_view path);
// %XX for what a URL's path cannot have.
std::string EncodeUrlPath(std::string_view path);

}  // namespace sp
