// A server on loopback that takes S3 requests, to measure clients with: it costs little and does not wait for a disk. Bodies lie in memory that was
// touched before; one thread per connection.
//
//   s3_sink --port-file=FILE [--mib=N] [--discard] [--tls-cert=FILE --tls-key=FILE]
//
// FILE gets the port, when it is served. N: memory for bodies; 507 when it is full. With --discard bodies of more than kSmallBytes are dropped in the
// kernel and come back as zeros: it measures the client and nothing else. Ends with its parent.
//
// It does what clients of the benchmark ask for and no more. Signatures are not looked at. CRC32C is compared for small bodies only: enough for a
// client that tries whether it is (ObjectStore::Probe), and no work beside the measured one.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/crc32c.h"
#include "durable/s3_checksums.h"

namespace sp {
namespace {

constexpr size_t kHeaderBytesMax = 64u << 10;
constexpr uint64_t kChunkBytes = 1u << 20;
constexpr uint64_t kSmallBytes = kChunkBytes;  // Manifests, checksum lists, probes.
constexpr uint32_t kZeros = 0;                 // The chunk that nobody writes to.

// What a client is connected by.
class Stream {
 public:
  explicit Stream(int socket) : socket_(socket) {}
  virtual ~Stream() { ::close(socket_); }
  virtual ssize_t Read(void* into, size_t bytes) { return ::recv(socket_, into, bytes, 0); }
  virtual ssize_t Drop(size_t bytes) { return ::recv(socket_, nullptr, bytes, MSG_TRUNC); }  // TCP: discards without copying.
  virtual ssize_t Write(const void* from, size_t bytes) { return ::send(socket_, from, bytes, MSG_NOSIGNAL); }
  virtual ssize_t SendFile(int fd, off_t at, const uint8_t* /*mapped*/, size_t bytes) { return ::sendfile(socket_, fd, &at, bytes); }

 private:
  const int socket_;
};

class TlsStream final : public Stream {
 public:
  TlsStream(int socket, SSL* ssl) : Stream(socket), ssl_(ssl) {}
  ~TlsStream() override { SSL_free(ssl_); }
  ssize_t Read(void* into, size_t bytes) override { return SSL_read(ssl_, into, static_cast<int>(std::min(bytes, kChunkBytes))); }
  ssize_t Drop(size_t bytes) override { return Read(scratch_.data(), std::min(bytes, scratch_.size())); }
  ssize_t Write(const void* from, size_t bytes) override { return SSL_write(ssl_, from, static_cast<int>(bytes)); }
  ssize_t SendFile(int, off_t, const uint8_t* mapped, size_t bytes) override { return Write(mapped, bytes); }

 private:
  SSL* const ssl_;
  std::vector<uint8_t> scratch_ = std::vector<uint8_t>(SSL3_RT_MAX_PLAIN_LENGTH);
};

// Memory for bodies, in chunks, touched once. Thread-safe.
class Arena {
 public:
  explicit Arena(uint64_t bytes) : fd_(::memfd_create("bodies", MFD_CLOEXEC)) {
    const uint64_t chunks = bytes / kChunkBytes + 2;
    SP_CHECK(fd_ >= 0 && ::ftruncate(fd_, static_cast<off_t>(chunks * kChunkBytes)) == 0);
    void* const mapped = ::mmap(nullptr, chunks * kChunkBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, 0);
    SP_CHECK(mapped != MAP_FAILED);
    memory_ = static_cast<uint8_t*>(mapped);
    for (uint64_t chunk = chunks; --chunk != kZeros;) free_.push_back(static_cast<uint32_t>(chunk));
  }

  std::optional<std::vector<uint32_t>> Take(size_t count) {
    const std::lock_guard lock(mutex_);
    if (free_.size() < count) return std::nullopt;
    std::vector<uint32_t> taken(free_.end() - static_cast<ptrdiff_t>(count), free_.end());
    free_.resize(free_.size() - count);
    return taken;
  }

  void GiveBack(const std::vector<uint32_t>& chunks) {
    const std::lock_guard lock(mutex_);
    free_.insert(free_.end(), chunks.begin(), chunks.end());
  }

  uint8_t* at(uint32_t chunk) const { return memory_ + chunk * kChunkBytes; }
  int fd() const { return fd_; }

 private:
  const int fd_;
  uint8_t* memory_ = nullptr;
  std::mutex mutex_;
  std::vector<uint32_t> free_;
};

// Bytes of one request. Shared by the object, or the upload, and by whoever sends them.
struct Body {
  Arena* arena;
  uint64_t size = 0;
  std::vector<uint32_t> chunks;
  bool zeros = false;

  Body(Arena* from, uint64_t bytes) : arena(from), size(bytes) {}
  ~Body() { arena->GiveBack(chunks); }
  Body(const Body&) = delete;
  Body& operator=(const Body&) = delete;
};
using Bodies = std::vector<std::shared_ptr<const Body>>;

uint64_t SizeOf(const Bodies& bodies) {
  uint64_t size = 0;
  for (const auto& body : bodies) size += body->size;
  return size;
}

uint64_t Number(std::string_view text) {
  uint64_t number = 0;
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

std::string Decoded(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    unsigned value = 0;
    if (text[i] == '%' && i + 2 < text.size() && std::from_chars(text.data() + i + 1, text.data() + i + 3, value, 16).ec == std::errc()) {
      out.push_back(static_cast<char>(value));
      i += 2;
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

struct Request {
  std::string method, key;  // "bucket/key".
  std::map<std::string, std::string> query, headers;  // Headers with names in lower case.

  explicit Request(std::string_view text) {
    const auto line = [&text] {
      const std::string_view found = text.substr(0, text.find("\r\n"));
      text.remove_prefix(found.size() + 2);
      return found;
    };
    const std::string_view first = line();
    method = first.substr(0, first.find(' '));
    std::string_view target = first.substr(std::min(first.size(), method.size() + 2));
    target = target.substr(0, target.find(' '));
    const size_t mark = target.find('?');
    key = Decoded(target.substr(0, mark));
    for (std::string_view rest = mark == target.npos ? "" : target.substr(mark + 1); !rest.empty();) {
      const std::string_view pair = rest.substr(0, rest.find('&'));
      rest.remove_prefix(std::min(rest.size(), pair.size() + 1));
      const size_t equals = pair.find('=');
      query[Decoded(pair.substr(0, equals))] = equals == pair.npos ? "" : Decoded(pair.substr(equals + 1));
    }
    for (std::string_view header = line(); !header.empty(); header = line()) {
      const size_t colon = header.find(':');
      std::string name(header.substr(0, colon));
      std::ranges::transform(name, name.begin(), [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      const size_t value = colon == header.npos ? colon : header.find_first_not_of(' ', colon + 1);
      headers[name] = value == header.npos ? "" : header.substr(value);
    }
  }

  std::string header(const std::string& name) const {
    const auto found = headers.find(name);
    return found == headers.end() ? "" : found->second;
  }
  bool asks(const char* name) const { return query.contains(name); }
};

struct Answer {
  const char* status = "200 OK";
  std::string body, headers;
  Bodies bodies;  // What is sent after `body`: `size` bytes of them from `begin` on.
  uint64_t begin = 0, size = 0;
};

// Objects and uploads. Thread-safe.
class Objects {
 public:
  Answer Put(const Request& request, std::shared_ptr<const Body> body) {
    const std::lock_guard lock(mutex_);
    if (request.asks("uploadId")) {
      uploads_[request.query.at("uploadId")][Number(request.query.at("partNumber"))] = std::move(body);
      return {};
    }
    if (const std::string source = Decoded(request.header("x-amz-copy-source")); !source.empty()) {
      const auto found = objects_.find(source.starts_with('/') ? source.substr(1) : source);
      if (found == objects_.end()) return {.status = "404 Not Found"};
      objects_[request.key] = found->second;
      return {.body = "<CopyObjectResult><ETag>\"sink\"</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></CopyObjectResult>"};
    }
    if (request.headers.contains("if-none-match") && objects_.contains(request.key)) return {.status = "412 Precondition Failed"};
    objects_[request.key] = {std::move(body)};
    return {};
  }

  Answer Post(const Request& request) {
    const std::lock_guard lock(mutex_);
    if (request.asks("uploads")) {
      const std::string id = std::to_string(++last_upload_);
      uploads_[id];
      const size_t slash = request.key.find('/');
      return {.body = "<InitiateMultipartUploadResult><Bucket>" + request.key.substr(0, slash) + "</Bucket><Key>" + request.key.substr(slash + 1) +
                      "</Key><UploadId>" + id + "</UploadId></InitiateMultipartUploadResult>"};
    }
    Bodies& object = objects_[request.key];
    object.clear();
    for (auto& [number, part] : uploads_[request.query.at("uploadId")]) object.push_back(std::move(part));
    uploads_.erase(request.query.at("uploadId"));
    return {.body = "<CompleteMultipartUploadResult><ETag>\"sink\"</ETag></CompleteMultipartUploadResult>"};
  }

  Answer Get(const Request& request) {
    const std::lock_guard lock(mutex_);
    if (request.key.find('/') == request.key.npos || request.key.ends_with('/')) return GetBucket(request);
    const auto found = objects_.find(request.key);
    if (found == objects_.end()) return {.status = "404 Not Found", .body = request.method == "HEAD" ? "" : "<Error><Code>NoSuchKey</Code></Error>"};
    Answer answer{.headers = "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nAccept-Ranges: bytes\r\n", .bodies = found->second};
    answer.size = SizeOf(answer.bodies);
    if (const std::string range = request.header("range"); range.starts_with("bytes=")) {
      const uint64_t whole = answer.size;
      const std::string_view first = std::string_view(range).substr(6), last = first.substr(first.find('-') + 1);
      answer.begin = std::min(Number(first), whole);
      answer.size = std::min(last.empty() ? whole : Number(last) + 1, whole) - answer.begin;
      answer.status = "206 Partial Content";
      answer.headers += "Content-Range: bytes " + std::to_string(answer.begin) + "-" + std::to_string(answer.begin + answer.size - 1) + "/" +
                        std::to_string(whole) + "\r\n";
    }
    return answer;
  }

  Answer Delete(const Request& request) {
    const std::lock_guard lock(mutex_);
    if (request.asks("uploadId")) uploads_.erase(request.query.at("uploadId"));
    else objects_.erase(request.key);
    return {.status = "204 No Content"};
  }

 private:
  Answer GetBucket(const Request& request) {
    if (request.asks("location")) return {.body = "<LocationConstraint xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"/>"};
    if (request.asks("uploads")) return {.body = "<ListMultipartUploadsResult></ListMultipartUploadsResult>"};
    const std::string bucket = request.key.substr(0, request.key.find('/')) + "/";
    const auto asked = request.query.find("prefix");
    const std::string prefix = bucket + (asked == request.query.end() ? "" : asked->second);
    Answer answer{.body = "<ListBucketResult><IsTruncated>false</IsTruncated>"};
    for (auto object = objects_.lower_bound(prefix); object != objects_.end() && object->first.starts_with(prefix); ++object) {
      answer.body += "<Contents><Key>" + object->first.substr(bucket.size()) + "</Key><Size>" + std::to_string(SizeOf(object->second)) +
                     "</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>\"sink\"</ETag><StorageClass>STANDARD</StorageClass></Contents>";
    }
    answer.body += "</ListBucketResult>";
    return answer;
  }

  std::mutex mutex_;
  std::map<std::string, Bodies> objects_;
  std::map<std::string, std::map<uint64_t, std::shared_ptr<const Body>>> uploads_;  // By id and part number.
  uint64_t last_upload_ = 0;
};

// One client, from its first request to its last.
class Connection {
 public:
  Connection(std::unique_ptr<Stream> stream, Arena& arena, Objects& objects, bool discard)
      : stream_(std::move(stream)), arena_(arena), objects_(objects), discard_(discard) {}

  void Serve() {
    while (const std::optional<std::string> head = ReadUntil("\r\n\r\n")) {
      if (!ServeOne(Request(*head))) return;
    }
  }

 private:
  bool ServeOne(const Request& request) {
    uint64_t left = Number(request.header("content-length"));
    if (request.headers.contains("expect") && !Send("HTTP/1.1 100 Continue\r\n\r\n")) return false;
    if (request.method == "PUT") {
      uint64_t size = left;
      if (const std::string decoded = request.header("x-amz-decoded-content-length"); !decoded.empty()) {
        // Of aws-chunked one chunk with the checksum behind it: so aws-c-s3 sends parts.
        const std::optional<std::string> line = ReadUntil("\r\n");
        size = Number(decoded);
        if (!line || std::strtoull(line->c_str(), nullptr, 16) != size) return false;
        left -= line->size();
      }
      const std::shared_ptr<Body> body = Receive(size);
      if (body == nullptr || !Skip(left - size)) return false;
      const std::string crc = request.header("x-amz-checksum-crc32c");
      if (!crc.empty() && body->chunks.size() == 1 && crc != CrcToBase64(Crc32c(0, {arena_.at(body->chunks[0]), size}))) {
        return Reply(request, {.status = "400 Bad Request", .body = "<Error><Code>BadDigest</Code></Error>"});
      }
      return Reply(request, objects_.Put(request, body));
    }
    if (!Skip(left)) return false;
    if (request.method == "POST") return Reply(request, objects_.Post(request));
    if (request.method == "DELETE") return Reply(request, objects_.Delete(request));
    return Reply(request, objects_.Get(request));
  }

  bool Reply(const Request& request, const Answer& answer) {
    const uint64_t length = answer.body.size() + answer.size;
    const std::string head = std::string("HTTP/1.1 ") + answer.status + "\r\nETag: \"sink\"\r\n" + answer.headers +
                             "Content-Length: " + std::to_string(length) + "\r\n\r\n";
    if (request.method == "HEAD") return Send(head);
    if (!Send(head + answer.body)) return false;
    uint64_t skip = answer.begin, left = answer.size;
    for (const auto& body : answer.bodies) {
      if (skip >= body->size) {
        skip -= body->size;
        continue;
      }
      const uint64_t end = std::min(body->size, skip + left);
      left -= end - skip;
      for (uint64_t at = skip; at < end;) {
        const uint32_t chunk = body->zeros ? kZeros : body->chunks[at / kChunkBytes];
        const uint64_t within = at % kChunkBytes, bytes = std::min(end - at, kChunkBytes - within);
        const ssize_t sent = stream_->SendFile(arena_.fd(), static_cast<off_t>(chunk * kChunkBytes + within), arena_.at(chunk) + within, bytes);
        if (sent <= 0) return false;
        at += static_cast<uint64_t>(sent);
      }
      skip = 0;
    }
    return true;
  }

  bool Send(std::string_view text) {
    while (!text.empty()) {
      const ssize_t sent = stream_->Write(text.data(), text.size());
      if (sent <= 0) return false;
      text.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }

  // The bytes up to the end of the next `mark`.
  std::optional<std::string> ReadUntil(std::string_view mark) {
    size_t end;
    while ((end = data_.find(mark)) == data_.npos) {
      char buffer[16 << 10];
      const ssize_t got = data_.size() < kHeaderBytesMax ? stream_->Read(buffer, sizeof buffer) : 0;
      if (got <= 0) return std::nullopt;
      data_.append(buffer, static_cast<size_t>(got));
    }
    const std::string found = data_.substr(0, end + mark.size());
    data_.erase(0, found.size());
    return found;
  }

  bool Skip(uint64_t bytes) {
    const size_t here = std::min<uint64_t>(bytes, data_.size());
    data_.erase(0, here);
    for (bytes -= here; bytes > 0;) {
      const ssize_t got = stream_->Drop(std::min<uint64_t>(bytes, 4u << 20));
      if (got <= 0) return false;
      bytes -= static_cast<uint64_t>(got);
    }
    return true;
  }

  // Null: the client is gone, or there is no memory.
  std::shared_ptr<Body> Receive(uint64_t size) {
    auto body = std::make_shared<Body>(&arena_, size);
    if (discard_ && size > kSmallBytes) {
      body->zeros = true;
      return Skip(size) ? body : nullptr;
    }
    auto chunks = arena_.Take((size + kChunkBytes - 1) / kChunkBytes);
    if (!chunks) {
      Send("HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 0\r\n\r\n");
      return nullptr;
    }
    body->chunks = std::move(*chunks);
    for (uint64_t at = 0; at < size;) {
      uint8_t* const into = arena_.at(body->chunks[at / kChunkBytes]) + at % kChunkBytes;
      const uint64_t room = std::min(size - at, kChunkBytes - at % kChunkBytes);
      const size_t here = std::min<uint64_t>(room, data_.size());
      std::copy_n(data_.begin(), here, into);
      data_.erase(0, here);
      const ssize_t got = here > 0 ? static_cast<ssize_t>(here) : stream_->Read(into, room);
      if (got <= 0) return nullptr;
      at += static_cast<uint64_t>(got);
    }
    return body;
  }

  const std::unique_ptr<Stream> stream_;
  Arena& arena_;
  Objects& objects_;
  const bool discard_;
  std::string data_;  // Read and not used yet.
};

struct Options {
  std::string port_file, tls_cert, tls_key;
  uint64_t bytes = uint64_t{4} << 30;
  bool discard = false;
};

// Null without TLS.
SSL_CTX* MakeTls(const Options& options) {
  if (options.tls_cert.empty()) return nullptr;
  SSL_CTX* const context = SSL_CTX_new(TLS_server_method());
  SP_CHECK(context != nullptr && SSL_CTX_use_certificate_file(context, options.tls_cert.c_str(), SSL_FILETYPE_PEM) == 1 &&
           SSL_CTX_use_PrivateKey_file(context, options.tls_key.c_str(), SSL_FILETYPE_PEM) == 1);
  return context;
}

[[noreturn]] void Run(const Options& options) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::signal(SIGPIPE, SIG_IGN);  // OpenSSL writes without MSG_NOSIGNAL.
  SSL_CTX* const tls = MakeTls(options);
  Arena arena(options.bytes);
  Objects objects;
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  SP_CHECK(listener >= 0 && ::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 && ::listen(listener, 64) == 0);
  SP_CHECK(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  const std::string part = options.port_file + ".part";
  std::FILE* const file = std::fopen(part.c_str(), "w");
  SP_CHECK(file != nullptr && std::fprintf(file, "%d", ntohs(address.sin_port)) > 0 && std::fclose(file) == 0);
  SP_CHECK(std::rename(part.c_str(), options.port_file.c_str()) == 0);
  while (true) {
    const int socket = ::accept(listener, nullptr, nullptr);
    if (socket < 0) continue;
    const int one = 1;
    ::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    std::thread([&, socket] {
      std::unique_ptr<Stream> stream;
      if (tls == nullptr) {
        stream = std::make_unique<Stream>(socket);
      } else {
        SSL* const ssl = SSL_new(tls);
        SP_CHECK(ssl != nullptr && SSL_set_fd(ssl, socket) == 1);
        stream = std::make_unique<TlsStream>(socket, ssl);
        if (SSL_accept(ssl) != 1) return;
      }
      Connection(std::move(stream), arena, objects, options.discard).Serve();
    }).detach();
  }
}

}  // namespace
}  // namespace sp

int main(int argc, char** argv) {
  sp::Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i], name = argument.substr(0, argument.find('='));
    const std::string value(argument.substr(std::min(argument.size(), name.size() + 1)));
    if (name == "--port-file") options.port_file = value;
    if (name == "--mib") options.bytes = sp::Number(value) << 20;
    if (name == "--discard") options.discard = true;
    if (name == "--tls-cert") options.tls_cert = value;
    if (name == "--tls-key") options.tls_key = value;
  }
  if (options.port_file.empty()) {
    std::fputs("usage: s3_sink --port-file=FILE [--mib=N] [--discard] [--tls-cert=FILE --tls-key=FILE]\n", stderr);
    return 2;
  }
  sp::Run(options);
}
