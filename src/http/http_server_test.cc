#include "http/http_server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <thread>

namespace sp {
namespace {

// A blocking client that sends raw bytes and gives up after 10 s.
class Client {
 public:
  explicit Client(uint16_t port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const timeval limit{10, 0};
    setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    connected_ = connect(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  }
  ~Client() { close(fd_); }
  Client(const Client&) = delete;

  bool connected() const { return connected_; }
  void Send(const std::string& text) { (void)!send(fd_, text.data(), text.size(), MSG_NOSIGNAL); }
  // Until the server closes; "TIMEOUT" at the end when it does not.
  std::string ReadAll() {
    std::string out;
    char buffer[4096];
    for (;;) {
      const ssize_t n = recv(fd_, buffer, sizeof buffer, 0);
      if (n < 0) return errno == EAGAIN ? out + "TIMEOUT" : out;
      if (n == 0) return out;
      out.append(buffer, static_cast<size_t>(n));
    }
  }
  // One reply with a Content-Length.
  std::string ReadReply() {
    std::string out;
    char c;
    while (out.find("\r\n\r\n") == std::string::npos && recv(fd_, &c, 1, 0) == 1) out.push_back(c);
    const size_t at = out.find("Content-Length: ");
    size_t left = at == std::string::npos ? 0 : std::stoul(out.substr(at + 16));
    while (left-- > 0 && recv(fd_, &c, 1, 0) == 1) out.push_back(c);
    return out;
  }

 private:
  int fd_;
  bool connected_ = false;
};

class HttpServerTest : public testing::Test {
 protected:
  void Start(HttpLimits limits = {}) {
    auto server = HttpServer::Start("127.0.0.1", 0,
                                    {{"/healthz", [] { return HttpResponse{200, "application/json", "{\"status\":\"ok\"}"}; }},
                                     {"/bad", [] { return HttpResponse{503, "text/plain", "no\n"}; }}},
                                    limits);
    ASSERT_TRUE(server) << server.error().message();
    server_ = std::move(*server);
  }
  std::string Exchange(const std::string& request) {
    Client client(server_->port());
    client.Send(request);
    return client.ReadAll();
  }
  // First line of the reply to a request after which the server closes.
  std::string StatusOf(const std::string& request) {
    const std::string reply = Exchange(request);
    return reply.substr(0, reply.find("\r\n"));
  }
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, ServesPagesByGetAndHead) {
  Start();
  const std::string get = Exchange("GET /healthz?x=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
  EXPECT_TRUE(get.starts_with("HTTP/1.1 200 OK\r\n")) << get;
  EXPECT_TRUE(get.ends_with("\r\n\r\n{\"status\":\"ok\"}")) << get;
  const std::string head = Exchange("HEAD /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
  EXPECT_NE(head.find("Content-Length: 15"), std::string::npos) << head;
  EXPECT_TRUE(head.ends_with("\r\n\r\n")) << head;
  EXPECT_EQ(StatusOf("GET /bad HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"), "HTTP/1.1 503 Service Unavailable");
  EXPECT_EQ(StatusOf("GET /other HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"), "HTTP/1.1 404 Not Found");
  EXPECT_EQ(StatusOf("GET /%68ealthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"), "HTTP/1.1 404 Not Found");
}

TEST_F(HttpServerTest, NoMethodChangesAnything) {
  Start();
  for (const char* method : {"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"}) {
    EXPECT_EQ(StatusOf(std::string(method) + " /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed") << method;
  }
}

TEST_F(HttpServerTest, I40_MalformedAndOversizedRequestsAreRefusedAndClosed) {
  Start();
  const std::string start = "GET /healthz HTTP/1.1\r\nHost: a\r\n";
  EXPECT_EQ(StatusOf("hello\r\n\r\n"), "HTTP/1.1 400 Bad Request");
  EXPECT_EQ(StatusOf(start + "X: " + std::string(20000, 'x') + "\r\n\r\n"), "HTTP/1.1 431 Request Header Fields Too Large");
  std::string many = start;
  for (int i = 0; i < 70; ++i) many += "X" + std::to_string(i) + ": y\r\n";
  EXPECT_EQ(StatusOf(many + "\r\n"), "HTTP/1.1 431 Request Header Fields Too Large");
  EXPECT_EQ(StatusOf("GET /" + std::string(5000, 'a') + " HTTP/1.1\r\nHost: a\r\n\r\n"), "HTTP/1.1 414 URI Too Long");
  EXPECT_EQ(StatusOf(start + "Content-Length: 5\r\n\r\nhello"), "HTTP/1.1 413 Payload Too Large");
  EXPECT_EQ(StatusOf(start + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), "HTTP/1.1 501 Not Implemented");
  EXPECT_EQ(StatusOf(start + "Transfer-Encoding: gzip\r\n\r\n"), "HTTP/1.1 501 Not Implemented");
  EXPECT_EQ(StatusOf(start + "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n"), "HTTP/1.1 400 Bad Request");
  EXPECT_EQ(StatusOf(start + "Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n"), "HTTP/1.1 400 Bad Request");
  EXPECT_EQ(StatusOf(start + "Content-Length: 0\r\nContent-Length: 0\r\n\r\n"), "HTTP/1.1 400 Bad Request");
  for (const char* length : {"+5", "-2", "0x1", "99999999999999999999999"}) {
    EXPECT_EQ(StatusOf(start + "Content-Length: " + length + "\r\n\r\n"), "HTTP/1.1 400 Bad Request") << length;
  }
}

TEST_F(HttpServerTest, KeepsAConnectionForSoManyRequests) {
  HttpLimits limits;
  limits.requests_per_connection_max = 3;
  Start(limits);
  Client client(server_->port());
  const std::string request = "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n";
  client.Send(request + request);  // Pipelined requests are answered in order.
  EXPECT_EQ(client.ReadReply().find("Connection: close"), std::string::npos);
  EXPECT_EQ(client.ReadReply().find("Connection: close"), std::string::npos);
  client.Send(request);
  const std::string last = client.ReadAll();
  EXPECT_NE(last.find("Connection: close"), std::string::npos) << last;
  EXPECT_EQ(last.find("TIMEOUT"), std::string::npos);
}

TEST_F(HttpServerTest, F87_SlowHeaderEndsAtTheDeadline) {
  HttpLimits limits;
  limits.header_timeout = 200 * kNanosPerMilli;
  Start(limits);
  EXPECT_EQ(Exchange(""), "");  // Said nothing: closed without a word.
  EXPECT_EQ(StatusOf("GET /healthz HTTP/1.1\r\nHo"), "HTTP/1.1 408 Request Timeout");
}

TEST_F(HttpServerTest, ConnectionsAreBounded) {
  HttpLimits limits;
  limits.connections_max = 2;
  Start(limits);
  const std::string request = "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n";
  Client first(server_->port()), second(server_->port());
  first.Send(request);
  EXPECT_TRUE(first.ReadReply().starts_with("HTTP/1.1 200"));
  second.Send(request);
  EXPECT_TRUE(second.ReadReply().starts_with("HTTP/1.1 200"));
  Client third(server_->port());
  third.Send(request);
  EXPECT_EQ(third.ReadAll(), "");
  first.Send(request);  // Those that were there are still served.
  EXPECT_TRUE(first.ReadReply().starts_with("HTTP/1.1 200"));
}

TEST_F(HttpServerTest, StopsWithOpenConnections) {
  Start();
  Client idle(server_->port());
  idle.Send("GET /he");
  server_.reset();
  EXPECT_EQ(idle.ReadAll(), "");
}

TEST_F(HttpServerTest, AddressInUseIsReported) {
  Start();
  const auto again = HttpServer::Start("127.0.0.1", server_->port(), {});
  ASSERT_FALSE(again);
  EXPECT_EQ(again.error().code(), StatusCode::kUnavailable);
  EXPECT_NE(again.error().message().find(std::to_string(server_->port())), std::string::npos);
  EXPECT_EQ(HttpServer::Start("192.0.2.1", 0, {}).error().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace sp
