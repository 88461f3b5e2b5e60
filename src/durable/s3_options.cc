#include "durable/s3_options.h"

#include <algorithm>
#include <cstdlib>

#include "durable/object_store.h"
#include "format/constants.h"

namespace sp {
namespace {

constexpr uint64_t kPartBytesMin = 5u << 20;  // S3's own bounds of a part.
constexpr uint64_t kPartBytesMax = uint64_t{5} << 30;
constexpr std::string_view kScheme = "s3://";

Status Refuse(const std::string& why) { return {StatusCode::kInvalidArgument, "s3 URL: " + why}; }

bool IsAlnum(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9'); }

bool All(std::string_view text, std::string_view besides) {
  return std::ranges::all_of(text, [&](char c) { return IsAlnum(c) || besides.find(c) != besides.npos; });
}

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<std::string> PercentDecode(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out.push_back(text[i]);
      continue;
    }
    if (i + 2 >= text.size() || HexDigit(text[i + 1]) < 0 || HexDigit(text[i + 2]) < 0) return std::nullopt;
    out.push_back(static_cast<char>(HexDigit(text[i + 1]) << 4 | HexDigit(text[i + 2])));
    i += 2;
  }
  return out;
}

// An endpoint is a scheme, a host and perhaps a port. Never a user and password: the URL is printed.
Status CheckEndpoint(const std::string& endpoint) {
  std::string_view rest = endpoint;
  if (rest.starts_with("https://")) rest.remove_prefix(8);
  else if (rest.starts_with("http://")) rest.remove_prefix(7);
  else return Refuse("the endpoint must begin with https:// or http://");
  if (rest.find('@') != rest.npos) return Refuse("an endpoint with a user name or a password in it; credentials come from the usual AWS places");
  std::string_view host = rest, port;
  const size_t colon = rest.rfind(':');
  const bool bracketed = rest.starts_with("[");
  if (colon != rest.npos && (!bracketed || rest[colon - 1] == ']')) {
    host = rest.substr(0, colon);
    port = rest.substr(colon + 1);
    if (port.empty() || port.size() > 5 || !std::ranges::all_of(port, [](char c) { return c >= '0' && c <= '9'; }) ||
        std::strtoul(std::string(port).c_str(), nullptr, 10) > 65535) {
      return Refuse("the endpoint '" + endpoint + "' has no valid port");
    }
  }
  if (host.empty() || !All(host, bracketed ? ".-:[]" : ".-")) return Refuse("the endpoint must be https://host or https://host:port, without a path");
  return {};
}

Status SetParameter(std::string_view name, std::string value, S3Options* options) {
  if (name == "endpoint") {
    while (value.ends_with('/')) value.pop_back();
    options->endpoint = std::move(value);
  } else if (name == "region") {
    options->region = std::move(value);
  } else if (name == "path_style") {
    if (value != "true" && value != "false") return Refuse("path_style is true or false");
    options->path_style = value == "true";
  } else if (name == "checksums") {
    if (value != "header" && value != "none") return Refuse("checksums is header or none");
    options->checksums = value == "none" ? S3Checksums::kNone : S3Checksums::kHeader;
  } else if (name == "ca_file") {
    options->ca_file = std::move(value);
  } else {
    return Refuse("parameters are endpoint, region, path_style, checksums and ca_file; not '" + PercentEncode(name.substr(0, 40), false) + "'");
  }
  return {};
}

std::string Endpoint(const S3Options& options) {
  if (!options.endpoint.empty()) return options.endpoint;
  return "https://s3." + options.region + (options.region.starts_with("cn-") ? ".amazonaws.com.cn" : ".amazonaws.com");
}

}  // namespace

std::string ProcessEnvironment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

std::string PercentEncode(std::string_view text, bool keep_slash) {
  static constexpr char kDigits[] = "0123456789ABCDEF";
  std::string out;
  for (const char c : text) {
    if (IsAlnum(c) || c == '-' || c == '.' || c == '_' || c == '~' || (c == '/' && keep_slash)) {
      out.push_back(c);
    } else {
      const auto byte = static_cast<uint8_t>(c);
      out += {'%', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  return out;
}

Result<S3Options> ParseS3Url(std::string_view url, const Environment& environment) {
  if (!url.starts_with(kScheme)) return std::unexpected(Refuse("must begin with s3://"));
  if (url.find('#') != url.npos) return std::unexpected(Refuse("has a fragment"));
  url.remove_prefix(kScheme.size());
  const size_t question = url.find('?');
  std::string_view path = url.substr(0, question);
  std::string_view query = question == url.npos ? std::string_view() : url.substr(question + 1);
  S3Options options;
  const size_t slash = path.find('/');
  options.bucket = path.substr(0, slash);
  if (slash != path.npos) options.base = path.substr(slash + 1);
  while (options.base.ends_with('/')) options.base.pop_back();
  bool style_given = false;
  while (!query.empty()) {
    const std::string_view pair = query.substr(0, query.find('&'));
    query.remove_prefix(std::min(query.size(), pair.size() + 1));
    const size_t equals = pair.find('=');
    const auto value = PercentDecode(equals == pair.npos ? std::string_view() : pair.substr(equals + 1));
    if (!value) return std::unexpected(Refuse("has a % that no two hexadecimal digits follow"));
    SP_RETURN_IF_ERROR(SetParameter(pair.substr(0, equals), *value, &options));
    style_given |= pair.substr(0, equals) == "path_style";
  }
  for (const char* name : {"AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"}) {
    if (options.endpoint.empty()) SP_RETURN_IF_ERROR(SetParameter("endpoint", environment(name), &options));
  }
  for (const char* name : {"AWS_REGION", "AWS_DEFAULT_REGION"}) {
    if (options.region.empty()) options.region = environment(name);
  }
  if (options.region.empty() && !options.endpoint.empty()) options.region = "us-east-1";
  if (!style_given) options.path_style = !options.endpoint.empty();
  SP_RETURN_IF_ERROR(CheckS3Options(options));
  return options;
}

Status CheckS3Options(const S3Options& options) {
  if (options.bucket.size() < 3 || options.bucket.size() > 63 || !All(options.bucket, ".-_")) {
    return Refuse("the bucket must be 3 to 63 letters, digits and .-_");
  }
  if (!options.base.empty()) SP_RETURN_IF_ERROR(CheckKey(options.base));
  if (options.region.empty()) return Refuse("no region: add ?region=... or set AWS_REGION (or name an endpoint)");
  if (options.region.size() > 64 || !All(options.region, "-_")) return Refuse("the region must be letters, digits and -_");
  if (!options.endpoint.empty()) SP_RETURN_IF_ERROR(CheckEndpoint(options.endpoint));
  if (options.endpoint.find('[') != std::string::npos && !options.path_style) return Refuse("an endpoint by address needs path_style=true");
  if (options.part_bytes % kBlockBytes != 0 || options.part_bytes < kPartBytesMin || options.part_bytes > kPartBytesMax) {
    return {StatusCode::kInvalidArgument, "s3: part_bytes must be a multiple of 1 MiB from 5 MiB to 5 GiB"};
  }
  if (options.connections_max == 0 || options.threads == 0 || options.attempts_max == 0 || options.fragment_bytes < 4096) {
    return {StatusCode::kInvalidArgument, "s3: connections_max, threads and attempts_max must not be 0, fragment_bytes not below 4096"};
  }
  return {};
}

std::string S3Url(const S3Options& options) {
  std::string url = S3ObjectUrl(options, "") + "?region=" + PercentEncode(options.region, false);
  url += "&endpoint=" + Endpoint(options);
  url += options.path_style ? "&path_style=true" : "&path_style=false";
  if (options.checksums == S3Checksums::kNone) url += "&checksums=none";
  if (!options.ca_file.empty()) url += "&ca_file=" + PercentEncode(options.ca_file, true);
  return url;
}

std::string S3ObjectUrl(const S3Options& options, const std::string& key) {
  std::string url = std::string(kScheme) + options.bucket;
  if (!options.base.empty()) url += "/" + options.base;
  if (!key.empty()) url += "/" + key;
  return url;
}

std::string S3Authority(const S3Options& options) {
  std::string endpoint = Endpoint(options);
  if (options.path_style) return endpoint;
  return endpoint.insert(endpoint.find("://") + 3, options.bucket + ".");
}

}  // namespace sp
