#include "s3_sink.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <csignal>
#include <cstdlib>
#include <string>
#include <thread>

#include "base/check.h"

namespace sp {
namespace {

constexpr size_t kHeaderBytesMax = 64u << 10;

bool SendAll(int socket, std::string_view text) {
  while (!text.empty()) {
    const ssize_t sent = ::send(socket, text.data(), text.size(), MSG_NOSIGNAL);
    if (sent <= 0) return false;
    text.remove_prefix(static_cast<size_t>(sent));
  }
  return true;
}

// The number behind `name` in the header, or `otherwise`.
uint64_t Number(const std::string& header, const char* name, uint64_t otherwise) {
  const size_t at = header.find(name);
  return at == header.npos ? otherwise : std::strtoull(header.c_str() + at + std::char_traits<char>::length(name), nullptr, 10);
}

bool SendZeros(int socket, int zeros, uint64_t bytes) {
  off_t at = 0;
  while (static_cast<uint64_t>(at) < bytes) {
    if (::sendfile(socket, zeros, &at, bytes - static_cast<uint64_t>(at)) <= 0) return false;
  }
  return true;
}

bool Answer(int socket, int zeros, uint64_t object_bytes, const std::string& header) {
  const std::string length = "Content-Length: ";
  if (header.starts_with("HEAD")) return SendAll(socket, "HTTP/1.1 404 Not Found\r\n" + length + "0\r\n\r\n");
  if (header.starts_with("GET")) {
    const uint64_t begin = Number(header, "range: bytes=", 0);
    const size_t dash = header.find('-', header.find("range: bytes="));
    const uint64_t end = dash == header.npos ? object_bytes - 1 : std::strtoull(header.c_str() + dash + 1, nullptr, 10);
    return SendAll(socket, "HTTP/1.1 206 Partial Content\r\nETag: \"zeros\"\r\n" + length + std::to_string(end - begin + 1) + "\r\nContent-Range: bytes " +
                               std::to_string(begin) + "-" + std::to_string(end) + "/" + std::to_string(object_bytes) + "\r\n\r\n") &&
           SendZeros(socket, zeros, end - begin + 1);
  }
  std::string body;
  if (header.starts_with("POST") && header.find("uploadId=") == header.npos) {
    body = "<InitiateMultipartUploadResult><UploadId>sink</UploadId></InitiateMultipartUploadResult>";
  } else if (header.starts_with("POST")) {
    body = "<CompleteMultipartUploadResult><ETag>\"sink\"</ETag></CompleteMultipartUploadResult>";
  }
  return SendAll(socket, "HTTP/1.1 200 OK\r\nETag: \"sink\"\r\n" + length + std::to_string(body.size()) + "\r\n\r\n" + body);
}

void Serve(int socket, int zeros, uint64_t object_bytes) {
  const int one = 1;
  ::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  std::string data;
  while (true) {
    size_t end;
    while ((end = data.find("\r\n\r\n")) == data.npos && data.size() < kHeaderBytesMax) {
      char buffer[16 << 10];
      const ssize_t got = ::recv(socket, buffer, sizeof buffer, 0);
      if (got <= 0) return (void)::close(socket);
      data.append(buffer, static_cast<size_t>(got));
    }
    std::string header = data.substr(0, end + 4);
    data.erase(0, header.size());
    // Names in lower case, from the end of the request line on.
    std::transform(header.begin() + static_cast<ptrdiff_t>(header.find('\r')), header.end(), header.begin() + static_cast<ptrdiff_t>(header.find('\r')),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    uint64_t left = Number(header, "content-length: ", 0);
    const size_t here = std::min<uint64_t>(left, data.size());
    data.erase(0, here);
    left -= here;
    while (left > 0) {
      const ssize_t got = ::recv(socket, nullptr, std::min<uint64_t>(left, 4u << 20), MSG_TRUNC);  // TCP: discards without copying.
      if (got <= 0) return (void)::close(socket);
      left -= static_cast<uint64_t>(got);
    }
    if (!Answer(socket, zeros, object_bytes, header)) return (void)::close(socket);
  }
}

}  // namespace

S3Sink StartS3Sink(uint64_t object_bytes_max) {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  SP_CHECK(listener >= 0 && ::bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 && ::listen(listener, 64) == 0);
  SP_CHECK(::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) == 0);
  const pid_t pid = ::fork();
  SP_CHECK(pid >= 0);
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int zeros = ::memfd_create("zeros", MFD_CLOEXEC);
    SP_CHECK(zeros >= 0 && ::ftruncate(zeros, static_cast<off_t>(object_bytes_max)) == 0);
    while (true) {
      const int socket = ::accept(listener, nullptr, nullptr);
      if (socket >= 0) std::thread(Serve, socket, zeros, object_bytes_max).detach();
    }
  }
  ::close(listener);
  return {pid, ntohs(address.sin_port)};
}

void StopS3Sink(const S3Sink& sink) {
  ::kill(sink.pid, SIGKILL);
  ::waitpid(sink.pid, nullptr, 0);
}

}  // namespace sp
