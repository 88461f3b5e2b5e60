#include "http/http_server.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <optional>
#include <set>
#include <thread>

namespace sp {
namespace {

constexpr std::chrono::milliseconds kLongestRun{500};

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = boost::beast::http;
using tcp = boost::asio::ip::tcp;
using boost::system::error_code;

using Pages = std::map<std::string, HttpServer::Handler>;

class Connection;

// What the connections of one server share; outlives them all. Owned by the server's thread.
struct Shared {
  Pages pages;
  HttpLimits limits;
  std::set<Connection*> open;
};

// Shared by the handlers that are pending for it: the last one to finish frees it.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(tcp::socket socket, Shared& shared)
      : socket_(std::move(socket)), timer_(socket_.get_executor()), buffer_(shared.limits.header_bytes_max), shared_(shared) {
    shared_.open.insert(this);
  }
  ~Connection() { shared_.open.erase(this); }

  void ReadRequest() {
    parser_.emplace();
    parser_->header_limit(shared_.limits.header_bytes_max);
    parser_->body_limit(std::uint64_t{0});
    SetDeadline(shared_.limits.header_timeout);
    http::async_read_header(socket_, buffer_, *parser_, [self = shared_from_this()](error_code error, size_t) { self->OnHeader(error); });
  }

  void Refuse(http::status status) {
    keep_alive_ = false;
    HttpResponse response{static_cast<unsigned>(status), "text/plain; charset=utf-8", std::string(http::obsolete_reason(status)) + "\n"};
    Write(response, true);
  }

  void Close() {
    error_code ignored;  // Nothing is left to be done for a peer that is gone already.
    timer_.cancel();
    socket_.close(ignored);
  }

 private:
  // When it passes, the pending operation fails; in reading, the client is told.
  void SetDeadline(Nanos timeout) {
    timed_out_ = false;
    timer_.expires_after(std::chrono::nanoseconds(timeout));
    timer_.async_wait([self = shared_from_this(), id = ++deadline_](error_code error) {
      if (error || id != self->deadline_) return;  // A timer that had fired already when it was cancelled reports no error.
      self->timed_out_ = true;
      error_code ignored;
      self->socket_.cancel(ignored);
    });
  }

  void OnHeader(error_code error) {
    ++deadline_;
    timer_.cancel();
    if (timed_out_) {
      // A silent client is just closed, one that began a request learns why.
      if (buffer_.size() == 0 && !parser_->got_some()) return Close();
      return Refuse(http::status::request_timeout);
    }
    if (error == http::error::header_limit || error == http::error::buffer_overflow) return Refuse(http::status::request_header_fields_too_large);
    if (error == http::error::body_limit) return Refuse(http::status::payload_too_large);
    if (error && error.category() == http::make_error_code(http::error::bad_value).category() && error != http::error::end_of_stream &&
        error != http::error::partial_message) {
      return Refuse(http::status::bad_request);
    }
    if (error) return Close();
    Answer(parser_->get());
  }

  void Answer(const http::request<http::empty_body>& request) {
    ++requests_;
    keep_alive_ = request.keep_alive() && requests_ < shared_.limits.requests_per_connection_max;
    head_ = request.method() == http::verb::head;
    size_t headers = 0;
    for ([[maybe_unused]] const auto& field : request) ++headers;
    if (headers > shared_.limits.headers_max) return Refuse(http::status::request_header_fields_too_large);
    if (request.target().size() > shared_.limits.target_bytes_max) return Refuse(http::status::uri_too_long);
    if (request.count(http::field::content_length) > 1) return Refuse(http::status::bad_request);
    if (request.count(http::field::transfer_encoding) > 0) {
      return Refuse(request.count(http::field::content_length) > 0 ? http::status::bad_request : http::status::not_implemented);
    }
    // A body that is announced and not read would be taken for the next request.
    if (parser_->content_length().value_or(0) != 0) return Refuse(http::status::payload_too_large);
    if (!head_ && request.method() != http::verb::get) return Write({405, "text/plain; charset=utf-8", "only GET and HEAD\n"}, false);
    const std::string target(request.target().substr(0, request.target().find('?')));
    const auto page = shared_.pages.find(target);
    if (page == shared_.pages.end()) return Write({404, "text/plain; charset=utf-8", "no such page\n"}, false);
    Write(page->second(), false);
  }

  void Write(const HttpResponse& response, bool whole_body) {
    reply_.emplace(static_cast<http::status>(response.status), 11);
    reply_->set(http::field::content_type, response.content_type);
    reply_->set(http::field::cache_control, "no-store");
    reply_->set("X-Content-Type-Options", "nosniff");
    if (response.status == 405) reply_->set(http::field::allow, "GET, HEAD");
    reply_->keep_alive(keep_alive_);
    reply_->content_length(response.body.size());
    if (whole_body || !head_) reply_->body() = response.body;
    SetDeadline(shared_.limits.write_timeout);
    const auto done = [self = shared_from_this()](error_code error, size_t) { self->OnWritten(error); };
    if (head_ && !whole_body) {
      serializer_.emplace(*reply_);
      http::async_write_header(socket_, *serializer_, done);
    } else {
      http::async_write(socket_, *reply_, done);
    }
  }

  void OnWritten(error_code error) {
    ++deadline_;
    timer_.cancel();
    serializer_.reset();
    if (!error && keep_alive_) return ReadRequest();
    // Ends the stream in order, so that the reply is not lost to a reset because of bytes we did not read.
    error_code ignored;
    socket_.shutdown(tcp::socket::shutdown_send, ignored);
    if (error || timed_out_) return Close();
    SetDeadline(kNanosPerSecond);
    Drain();
  }

  // Reads and forgets what the client still sends, for at most a second.
  void Drain() {
    socket_.async_read_some(asio::buffer(drain_), [self = shared_from_this()](error_code error, size_t) {
      if (error || self->timed_out_) return self->Close();
      self->Drain();
    });
  }

  tcp::socket socket_;
  asio::steady_timer timer_;
  beast::flat_buffer buffer_;
  Shared& shared_;
  std::optional<http::request_parser<http::empty_body>> parser_;
  std::optional<http::response<http::string_body>> reply_;
  std::optional<http::response_serializer<http::string_body>> serializer_;
  std::array<char, 4096> drain_;
  uint64_t deadline_ = 0;  // Number of the deadline that counts.
  uint32_t requests_ = 0;
  bool keep_alive_ = true, head_ = false, timed_out_ = false;
};

}  // namespace

class HttpServer::Impl {
 public:
  Impl(Pages pages, HttpLimits limits) : shared_{std::move(pages), limits, {}}, acceptor_(context_), retry_(context_) {}
  ~Impl() {
    // With the loop stopped, no handler runs any more; destroying the context destroys the handlers and with them the connections.
    context_.stop();
    if (thread_.joinable()) thread_.join();
  }

  Status Listen(const std::string& host, uint16_t port) {
    error_code error;
    const auto address = asio::ip::make_address(host, error);
    if (error) return Status(StatusCode::kInvalidArgument, "\"" + host + "\" is not a numeric address");
    const tcp::endpoint endpoint(address, port);
    const std::string name = "http " + host + ":" + std::to_string(port) + ": ";
    const auto failed = [&] {
      return Status(error == asio::error::address_in_use ? StatusCode::kUnavailable : StatusCode::kInvalidArgument, name + error.message());
    };
    if (acceptor_.open(endpoint.protocol(), error)) return failed();
    if (acceptor_.set_option(tcp::acceptor::reuse_address(true), error)) return failed();
    if (acceptor_.bind(endpoint, error)) return failed();
    if (acceptor_.listen(static_cast<int>(shared_.limits.connections_max), error)) return failed();
    port_ = acceptor_.local_endpoint(error).port();
    if (error) return failed();
    Accept();
    thread_ = std::thread([this] {
      // Not one long run: where the system had refused Asio the event by which `stop` wakes it, nothing would, and a worker that is to end
      // would wait for this thread for ever.
      while (!context_.stopped()) context_.run_for(kLongestRun);
    });
    return {};
  }

  uint16_t port() const { return port_; }

 private:
  void Accept() {
    acceptor_.async_accept([this](error_code error, tcp::socket socket) {
      if (error) {
        // Most likely no descriptor is free. Waiting gives one a chance and keeps the thread from spinning.
        retry_.expires_after(std::chrono::milliseconds(100));
        retry_.async_wait([this](error_code cancelled) {
          if (!cancelled) Accept();
        });
        return;
      }
      const bool full = shared_.open.size() >= shared_.limits.connections_max;
      if (!full) std::make_shared<Connection>(std::move(socket), shared_)->ReadRequest();
      Accept();  // When full, `socket` closes here: a refused client costs nothing.
    });
  }

  Shared shared_;  // Before the context, whose handlers refer to it until they are destroyed.
  asio::io_context context_{1};
  tcp::acceptor acceptor_;
  asio::steady_timer retry_;
  uint16_t port_ = 0;
  std::thread thread_;
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;
uint16_t HttpServer::port() const { return impl_->port(); }

Result<std::unique_ptr<HttpServer>> HttpServer::Start(const std::string& host, uint16_t port, std::map<std::string, Handler> pages, HttpLimits limits) {
  auto impl = std::make_unique<Impl>(std::move(pages), limits);
  SP_RETURN_IF_ERROR(impl->Listen(host, port));
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

}  // namespace sp
