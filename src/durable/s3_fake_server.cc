#include "durable/s3_fake_server.h"

#include <sys/socket.h>

#include <algorithm>
#include <boost/asio/write.hpp>
#include <boost/beast/core/flat_buffer.hpp>

#include "base/crc32c.h"
#include "durable/s3_checksums.h"

namespace sp {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using tcp = asio::ip::tcp;

constexpr size_t kPage = 1000;
constexpr char kDate[] = "2026-11-27T08:00:00.000Z";

std::string Decode(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size()) {
      out.push_back(static_cast<char>(std::stoi(std::string(text.substr(i + 1, 2)), nullptr, 16)));
      i += 2;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

FakeRequest Parse(const http::request<http::string_body>& request) {
  FakeRequest out;
  out.method = std::string(request.method_string());
  std::string_view target(request.target().data(), request.target().size());
  std::string_view query = target.find('?') == target.npos ? "" : target.substr(target.find('?') + 1);
  const std::string path = Decode(target.substr(0, target.find('?')));
  const size_t slash = path.find('/', 1);
  out.key = slash == path.npos ? "" : path.substr(slash + 1);
  while (!query.empty()) {
    const std::string_view pair = query.substr(0, query.find('&'));
    query.remove_prefix(std::min(query.size(), pair.size() + 1));
    out.query[Decode(pair.substr(0, pair.find('=')))] = pair.find('=') == pair.npos ? "" : Decode(pair.substr(pair.find('=') + 1));
  }
  for (const auto& field : request) {
    std::string name(field.name_string());
    std::ranges::transform(name, name.begin(), [](char c) { return static_cast<char>(std::tolower(static_cast<unsigned char>(c))); });
    out.headers[name] = std::string(field.value());
  }
  out.body = request.body();
  return out;
}

std::string Get(const std::map<std::string, std::string>& map, const std::string& name) {
  const auto found = map.find(name);
  return found == map.end() ? "" : found->second;
}

// The text between <name> and </name>, from `at` on.
std::string Element(const std::string& text, const std::string& name, size_t at = 0) {
  const size_t begin = text.find("<" + name + ">", at);
  if (begin == text.npos) return "";
  return text.substr(begin + name.size() + 2, text.find("</" + name + ">", begin) - begin - name.size() - 2);
}

}  // namespace

FakeReply FakeError(unsigned status, const std::string& code) {
  return {.status = status, .body = "<?xml version=\"1.0\"?><Error><Code>" + code + "</Code><Message>AKIDEXAMPLE topsecret</Message></Error>"};
}

FakeS3Server::FakeS3Server(Abilities abilities, Lie lie) : abilities_(abilities), lie_(std::move(lie)) {
  acceptor_.open(tcp::v4());
  acceptor_.bind({asio::ip::address_v4::loopback(), 0});
  acceptor_.listen();
  acceptor_thread_ = std::thread([this] { Accept(); });
}

FakeS3Server::~FakeS3Server() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    stopped_.notify_all();
    for (const int descriptor : open_) ::shutdown(descriptor, SHUT_RDWR);
  }
  ::shutdown(acceptor_.native_handle(), SHUT_RDWR);
  acceptor_thread_.join();
  for (std::thread& thread : threads_) thread.join();
}

std::string FakeS3Server::endpoint() const { return "http://127.0.0.1:" + std::to_string(port()); }

void FakeS3Server::SetLie(Lie lie) {
  const std::lock_guard lock(mutex_);
  lie_ = std::move(lie);
}

size_t FakeS3Server::Count(const std::string& method, const std::string& parameter) const {
  const std::lock_guard lock(mutex_);
  return static_cast<size_t>(std::ranges::count_if(log_, [&](const FakeRequest& request) { return request.Is(method, parameter); }));
}

std::optional<std::string> FakeS3Server::Object(const std::string& key) const {
  const std::lock_guard lock(mutex_);
  const auto found = objects_.find(key);
  return found == objects_.end() ? std::nullopt : std::optional(found->second);
}

void FakeS3Server::SetObject(const std::string& key, const std::string& content) {
  const std::lock_guard lock(mutex_);
  objects_[key] = content;
}

size_t FakeS3Server::uploads() const {
  const std::lock_guard lock(mutex_);
  return uploads_.size();
}

void FakeS3Server::Accept() {
  while (!stopping_) {
    error_code error;
    auto socket = std::make_shared<Socket>(acceptor_.accept(error));  // Owned by its thread.
    if (error) return;
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    open_.push_back(socket->native_handle());
    threads_.emplace_back([this, socket] {
      Serve(*socket);
      const std::lock_guard closing(mutex_);
      std::erase(open_, socket->native_handle());
      error_code ignored;
      socket->close(ignored);
    });
  }
}

void FakeS3Server::Serve(Socket& socket) {
  boost::beast::flat_buffer buffer;
  while (true) {
    error_code error;
    http::request_parser<http::string_body> parser;
    parser.body_limit(uint64_t{256} << 20);
    http::read(socket, buffer, parser, error);
    if (error) return;
    const FakeRequest request = Parse(parser.get());
    ++requests_;
    FakeReply reply;
    {
      const std::lock_guard lock(mutex_);
      log_.push_back(request);
      log_.back().body.clear();
      const auto lie = lie_ ? lie_(request) : std::nullopt;
      reply = lie ? *lie : AnswerLocked(request);
    }
    if (!Reply(socket, request, reply, parser.get().keep_alive())) return;
  }
}

void FakeS3Server::HangUntilStopped() {
  std::unique_lock lock(mutex_);
  stopped_.wait(lock, [&] { return stopping_.load(); });
}

bool FakeS3Server::Reply(Socket& socket, const FakeRequest& request, const FakeReply& reply, bool keep_alive) {
  error_code error;
  if (reply.hang && reply.missing_bytes == 0) {
    HangUntilStopped();
    return false;
  }
  if (!reply.raw.empty()) {
    asio::write(socket, asio::buffer(reply.raw), error);
    socket.shutdown(Socket::shutdown_both, error);
    return false;
  }
  if (reply.drop) {
    socket.shutdown(Socket::shutdown_both, error);
    return false;
  }
  http::response<http::string_body> response(static_cast<http::status>(reply.status), 11);
  response.keep_alive(keep_alive);
  for (const auto& [name, value] : reply.headers) response.set(name, value);
  if (!reply.headers.contains("content-length")) response.content_length(reply.body.size());
  if (request.method != "HEAD") response.body() = reply.body.substr(0, reply.body.size() - reply.missing_bytes);
  http::response_serializer<http::string_body> serializer(response);
  if (request.method == "HEAD" || response.body().empty()) http::write_header(socket, serializer, error);
  else http::write(socket, serializer, error);
  if (reply.hang) HangUntilStopped();
  if (reply.missing_bytes != 0) socket.shutdown(Socket::shutdown_both, error);
  return !error && reply.missing_bytes == 0 && keep_alive;
}

FakeReply FakeS3Server::Answer(const FakeRequest& request) {
  const std::lock_guard lock(mutex_);
  return AnswerLocked(request);
}

FakeReply FakeS3Server::AnswerLocked(const FakeRequest& request) {
  if (request.query.contains("uploads") || request.query.contains("uploadId")) return AnswerUpload(request);
  if (request.key.empty()) return request.method == "GET" ? AnswerList(request) : FakeReply{};
  if (request.method == "PUT") return Store(request, request.body, abilities_.conditions);
  if (request.method == "GET" || request.method == "HEAD") return AnswerGet(request);
  if (request.method == "DELETE") {
    objects_.erase(request.key);
    return {.status = 204};
  }
  return FakeError(400, "InvalidRequest");
}

FakeReply FakeS3Server::Store(const FakeRequest& request, const std::string& content, bool conditions) {
  if (conditions && Get(request.headers, "if-none-match") == "*" && objects_.contains(request.key)) return FakeError(412, "PreconditionFailed");
  const std::string crc = Get(request.headers, "x-amz-checksum-crc32c");
  if (abilities_.checksums && !crc.empty() && crc != CrcToBase64(Crc32c(0, AsBytes(content)))) return FakeError(400, "BadDigest");
  objects_[request.key] = content;
  return {.headers = {{"etag", "\"object\""}}};
}

FakeReply FakeS3Server::AnswerUpload(const FakeRequest& request) {
  if (request.method == "GET") {
    std::string body = "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>";
    for (const auto& [id, upload] : uploads_) {
      if (!upload.key.starts_with(Get(request.query, "prefix"))) continue;
      body += "<Upload><Key>" + upload.key + "</Key><UploadId>" + id + "</UploadId><Initiated>" + kDate + "</Initiated></Upload>";
    }
    return {.body = body + "</ListMultipartUploadsResult>"};
  }
  if (request.query.contains("uploads")) {
    const std::string id = "upload-" + std::to_string(++last_upload_);
    uploads_[id].key = request.key;
    return {.body = "<InitiateMultipartUploadResult><UploadId>" + id + "</UploadId></InitiateMultipartUploadResult>"};
  }
  const auto found = uploads_.find(Get(request.query, "uploadId"));
  if (found == uploads_.end() || found->second.key != request.key) return FakeError(404, "NoSuchUpload");
  if (request.method == "DELETE") {
    uploads_.erase(found);
    return {.status = 204};
  }
  if (request.method == "PUT") {
    const std::string crc = Get(request.headers, "x-amz-checksum-crc32c");
    const std::string real = CrcToBase64(Crc32c(0, AsBytes(request.body)));
    if (abilities_.checksums && !crc.empty() && crc != real) return FakeError(400, "BadDigest");
    const auto number = static_cast<unsigned>(std::stoul(Get(request.query, "partNumber")));
    found->second.parts[number] = request.body;
    FakeReply reply{.headers = {{"etag", "\"part-" + std::to_string(number) + "\""}}};
    if (abilities_.checksums) reply.headers["x-amz-checksum-crc32c"] = real;
    return reply;
  }
  std::string content;
  size_t listed = 0;
  for (const auto& [number, part] : found->second.parts) {
    const size_t at = request.body.find("<PartNumber>" + std::to_string(number) + "</PartNumber>");
    if (at == std::string::npos || Element(request.body, "ETag", at) != "\"part-" + std::to_string(number) + "\"") return FakeError(400, "InvalidPart");
    ++listed;
    content += part;
  }
  for (size_t at = request.body.find("<Part>"); at != std::string::npos; at = request.body.find("<Part>", at + 1)) --listed;
  if (listed != 0) return FakeError(400, "InvalidPart");
  FakeRequest whole = request;
  const FakeReply stored = Store(whole, content, abilities_.conditions && abilities_.conditions_on_complete);
  if (stored.status != 200) return stored;
  uploads_.erase(found);
  std::string body = "<CompleteMultipartUploadResult><ETag>\"whole\"</ETag>";
  if (abilities_.checksums) {
    body += "<ChecksumCRC32C>" + CrcToBase64(Crc32c(0, AsBytes(content))) + "</ChecksumCRC32C><ChecksumType>FULL_OBJECT</ChecksumType>";
  }
  return {.body = body + "</CompleteMultipartUploadResult>"};
}

FakeReply FakeS3Server::AnswerList(const FakeRequest& request) {
  std::string keys, last;
  size_t count = 0;
  bool more = false;
  for (auto object = objects_.upper_bound(Get(request.query, "continuation-token")); object != objects_.end(); ++object) {
    if (!object->first.starts_with(Get(request.query, "prefix"))) continue;
    if (count == kPage) {
      more = true;
      break;
    }
    ++count;
    last = object->first;
    keys += "<Contents><Key>" + object->first + "</Key><LastModified>" + kDate + "</LastModified><Size>" + std::to_string(object->second.size()) +
            "</Size></Contents>";
  }
  if (more) keys += "<NextContinuationToken>" + last + "</NextContinuationToken>";
  return {.body = "<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><IsTruncated>" + std::string(more ? "true" : "false") +
                  "</IsTruncated>" + keys + "</ListBucketResult>"};
}

FakeReply FakeS3Server::AnswerGet(const FakeRequest& request) {
  const auto found = objects_.find(request.key);
  if (found == objects_.end()) return FakeError(404, "NoSuchKey");
  const std::string& content = found->second;
  FakeReply reply{.headers = {{"etag", "\"object\""}, {"last-modified", "Fri, 27 Nov 2026 08:00:00 GMT"}}};
  if (request.method == "HEAD") {
    reply.headers["content-length"] = std::to_string(content.size());
    if (abilities_.checksums) reply.headers["x-amz-checksum-crc32c"] = CrcToBase64(Crc32c(0, AsBytes(content)));
    return reply;
  }
  unsigned long long begin = 0, end = 0;
  if (std::sscanf(Get(request.headers, "range").c_str(), "bytes=%llu-%llu", &begin, &end) != 2) {
    reply.body = content;
    return reply;
  }
  if (begin >= content.size()) return FakeError(416, "InvalidRange");
  end = std::min<unsigned long long>(end, content.size() - 1);
  reply.status = 206;
  reply.body = content.substr(begin, end - begin + 1);
  reply.headers["content-range"] = "bytes " + std::to_string(begin) + "-" + std::to_string(end) + "/" + std::to_string(content.size());
  return reply;
}

}  // namespace sp
