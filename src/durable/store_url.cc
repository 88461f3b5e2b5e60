#include "durable/store_url.h"

#include <optional>

#include "durable/s3_options.h"

namespace sp {
namespace {

constexpr std::string_view kScheme = "file://";

std::optional<int> HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return std::nullopt;
}

}  // namespace

std::string EncodeUrlPath(std::string_view path) {
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : path) {
    const bool alphanumeric = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (alphanumeric || std::string_view("/._~=+@-").find(c) != std::string_view::npos) {
      out.push_back(c);
    } else {
      out += {'%', kDigits[static_cast<uint8_t>(c) >> 4], kDigits[static_cast<uint8_t>(c) & 15]};
    }
  }
  return out;
}

std::string ShownUrl(std::string_view url) {
  constexpr size_t kShownMax = 200;
  const size_t scheme = url.find("://");
  if (scheme != url.npos && url.find_first_of("@?", scheme) != url.npos) return std::string(url.substr(0, std::min(scheme, kShownMax))) + "://...";
  return std::string(url.substr(0, kShownMax));
}

std::string FileUrl(std::string_view path) { return std::string(kScheme) + EncodeUrlPath(path); }

Result<std::string> PathOfFileUrl(const std::string& url) {
  const auto refuse = [&](const std::string& why) {
    return Error(StatusCode::kInvalidArgument, "URL '" + ShownUrl(url) + "': " + why + "; expected file:///absolute/path");
  };
  if (!url.starts_with(kScheme)) return refuse("not a file URL");
  const std::string_view rest = std::string_view(url).substr(kScheme.size());
  if (!rest.starts_with('/')) return refuse("names a host or a relative path");
  std::string path;
  for (size_t i = 0; i < rest.size(); ++i) {
    char c = rest[i];
    if (c == '?' || c == '#') {
      return refuse(std::string("has a '") + c + "', which must be written as " + (c == '?' ? "%3F" : "%23") + " if it is part of the path");
    }
    if (c == '%') {
      const auto high = i + 2 < rest.size() ? HexDigit(rest[i + 1]) : std::nullopt;
      const auto low = high ? HexDigit(rest[i + 2]) : std::nullopt;
      if (!low) return refuse("has a '%' without two hexadecimal digits behind it");
      c = static_cast<char>(*high << 4 | *low);
      if (c == '/' || c == '\0') return refuse("has an encoded slash or zero byte");
      i += 2;
    }
    path.push_back(c);
  }
  while (path.ends_with('/')) path.pop_back();
  if (path.empty()) return refuse("names the root directory");
  for (size_t at = 0; at != path.npos;) {
    const size_t next = path.find('/', at + 1);
    const std::string name = path.substr(at + 1, next == path.npos ? next : next - at - 1);
    if (name.empty() || name == "." || name == "..") return refuse("has the segment '" + name + "'");
    at = next;
  }
  return path;
}

Result<std::string> ResolveStoreUrl(const std::string& url) {
  if (url.starts_with("file:")) {
    SP_ASSIGN_OR_RETURN(const std::string path, PathOfFileUrl(url));
    return FileUrl(path);
  }
  if (url.starts_with("s3:")) {
    SP_ASSIGN_OR_RETURN(const S3Options options, ParseS3Url(url));
    return S3Url(options);
  }
  return Error(StatusCode::kInvalidArgument,
               "\"" + ShownUrl(url) + "\" is no URL of a store: write file:///absolute/path or s3://bucket/prefix");
}

}  // namespace sp
