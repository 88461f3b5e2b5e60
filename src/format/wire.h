// Little-endian encoding of structs that leave the process. Pure.
//
// A struct lists its fields once, `template <class A> void Fields(A& a) { a.U32(x); a.Text(name, kMax); }`, and gets both directions:
// Encode(x) appends bytes, Decode<T>(bytes) reads them back, refusing what is short, too long for its bound, or left over. Decoding never
// allocates more than the input's own size times a constant.
#pragma once

#include <concepts>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"

namespace sp {

class Encoder {
 public:
  static constexpr bool kDecoding = false;
  void U8(const uint8_t& v) { Int(v); }
  void U16(const uint16_t& v) { Int(v); }
  void U32(const uint32_t& v) { Int(v); }
  void U64(const uint64_t& v) { Int(v); }
  template <typename E>
    requires std::is_enum_v<E>
  void Enum(const E& v, E /*last*/) {
    Int(static_cast<std::underlying_type_t<E>>(v));
  }
  void Bool(const bool& v) { Int<uint8_t>(v ? 1 : 0); }
  template <size_t N>
  void Fixed(const FixedBytes<N>& v) {
    Raw(v.bytes.data(), N);
  }
  void Text(const std::string& v, uint64_t /*max*/) {
    Int(static_cast<uint32_t>(v.size()));
    Raw(v.data(), v.size());
  }
  template <typename T, typename F>
  void List(const std::vector<T>& v, uint64_t /*max*/, F&& element) {
    Int(static_cast<uint32_t>(v.size()));
    for (const T& e : v) element(*this, const_cast<T&>(e));
  }
  std::vector<uint8_t> Take() && { return std::move(out_); }

 private:
  template <std::unsigned_integral T>
  void Int(T v) {
    uint8_t bytes[sizeof(T)];
    for (size_t i = 0; i < sizeof(T); ++i) bytes[i] = static_cast<uint8_t>(v >> (8 * i));
    Raw(bytes, sizeof(T));
  }
  void Raw(const void* data, size_t size) {
    if (size == 0) return;
    const size_t at = out_.size();
    out_.resize(at + size);
    std::memcpy(out_.data() + at, data, size);
  }
  std::vector<uint8_t> out_;
};

class Decoder {
 public:
  static constexpr bool kDecoding = true;
  explicit Decoder(ByteSpan in) : in_(in) {}
  void U8(uint8_t& v) { Int(v); }
  void U16(uint16_t& v) { Int(v); }
  void U32(uint32_t& v) { Int(v); }
  void U64(uint64_t& v) { Int(v); }
  template <typename E>
    requires std::is_enum_v<E>
  void Enum(E& v, E last) {
    std::underlying_type_t<E> raw = 0;
    Int(raw);
    if (raw > static_cast<std::underlying_type_t<E>>(last)) Fail("enum value out of range");
    else v = static_cast<E>(raw);
  }
  void Bool(bool& v) {
    uint8_t raw = 0;
    Int(raw);
    if (raw > 1) Fail("bool is neither 0 nor 1");
    v = raw == 1;
  }
  template <size_t N>
  void Fixed(FixedBytes<N>& v) {
    if (ByteSpan b = Bytes(N); b.size() == N) std::memcpy(v.bytes.data(), b.data(), N);
  }
  void Text(std::string& v, uint64_t max) {
    uint32_t n = 0;
    Int(n);
    if (n > max) return Fail("text longer than its bound");
    ByteSpan b = Bytes(n);
    v.assign(b.begin(), b.end());
  }
  template <typename T, typename F>
  void List(std::vector<T>& v, uint64_t max, F&& element) {
    uint32_t n = 0;
    Int(n);
    if (n > max || n > in_.size()) return Fail("list longer than its bound");  // Every element takes at least one byte.
    v.clear();
    for (uint32_t i = 0; i < n && ok(); ++i) element(*this, v.emplace_back());
  }
  bool ok() const { return error_ == nullptr; }
  const char* error() const { return error_; }
  uint64_t remaining() const { return in_.size(); }
  void Fail(const char* why) {
    if (!error_) error_ = why;
    in_ = {};
  }

 private:
  ByteSpan Bytes(uint64_t n) {
    if (n > in_.size()) {
      Fail("input ends early");
      return {};
    }
    ByteSpan b = in_.first(n);
    in_ = in_.subspan(n);
    return b;
  }
  template <std::unsigned_integral T>
  void Int(T& v) {
    ByteSpan b = Bytes(sizeof(T));
    if (b.empty()) return;
    v = 0;
    for (size_t i = 0; i < sizeof(T); ++i) v = static_cast<T>(v | static_cast<T>(T{b[i]} << (8 * i)));
  }
  ByteSpan in_;
  const char* error_ = nullptr;
};

template <typename T>
std::vector<uint8_t> Encode(const T& value) {
  Encoder e;
  const_cast<T&>(value).Fields(e);  // Fields() is shared by both directions; the encoder only reads.
  return std::move(e).Take();
}

template <typename T>
Result<T> Decode(ByteSpan bytes) {
  T value;
  Decoder d(bytes);
  value.Fields(d);
  if (d.ok() && d.remaining() != 0) d.Fail("bytes left over");
  if (!d.ok()) return Error(StatusCode::kProtocol, std::string("malformed ") + T::kName + ": " + d.error());
  return value;
}

}  // namespace sp
