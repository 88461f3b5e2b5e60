// Texts and lists of numbers that outsiders choose, many in one allocation: a string or a map node each would take ten times the bytes that were
// sent for it. Pure.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sp {

// --- in a string of bytes: a text (two bytes of length), a number (seven bits a byte). `at` moves behind what was read.
inline void PackText(std::string& bytes, std::string_view text) {
  bytes.push_back(static_cast<char>(text.size() & 0xff));
  bytes.push_back(static_cast<char>(text.size() >> 8));
  bytes += text;
}
inline std::string_view UnpackText(std::string_view bytes, size_t& at) {
  const size_t size = static_cast<uint8_t>(bytes[at]) | static_cast<size_t>(static_cast<uint8_t>(bytes[at + 1])) << 8;
  const std::string_view text = bytes.substr(at + 2, size);
  at += 2 + size;
  return text;
}
inline void PackNumber(std::string& bytes, uint64_t value) {
  for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<char>(value | 0x80));
  bytes.push_back(static_cast<char>(value));
}
inline uint64_t UnpackNumber(std::string_view bytes, size_t& at) {
  uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    const uint8_t byte = static_cast<uint8_t>(bytes[at++]);
    value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
}
inline void UnpackNumbers(std::string_view bytes, size_t& at, size_t count, std::vector<uint64_t>& out) {
  out.resize(count);
  for (uint64_t& n : out) n = UnpackNumber(bytes, at);
}

// Texts of at most 65,535 bytes, in order.
class TextList {
 public:
  void Add(std::string_view text) {
    PackText(bytes_, text);
    ++size_;
  }
  uint32_t size() const { return size_; }
  uint64_t cost() const { return bytes_.size() + uint64_t{8} * size_; }
  void ShrinkToFit() { bytes_.shrink_to_fit(); }
  class Iterator {
   public:
    Iterator(std::string_view bytes, size_t at) : bytes_(bytes), at_(at) {}
    std::string_view operator*() const {
      size_t at = at_;
      return UnpackText(bytes_, at);
    }
    Iterator& operator++() {
      UnpackText(bytes_, at_);
      return *this;
    }
    bool operator!=(const Iterator& other) const { return at_ != other.at_; }

   private:
    std::string_view bytes_;
    size_t at_;
  };
  Iterator begin() const { return {bytes_, 0}; }
  Iterator end() const { return {bytes_, bytes_.size()}; }
  friend bool operator==(const TextList&, const TextList&) = default;

 private:
  std::string bytes_;
  uint32_t size_ = 0;
};

// Keys with what was packed behind each, for look-ups after the last one was added.
class PackedMap {
 public:
  void AddKey(std::string_view key) {
    places_.push_back(static_cast<uint32_t>(bytes_.size()));
    PackText(bytes_, key);
  }
  std::string& value() { return bytes_; }  // Append to it: it belongs to the last key.
  size_t size() const { return places_.size(); }
  bool empty() const { return places_.empty(); }
  // Once, when all are there; false: a key occurs twice, and that is the last key of `repeated`.
  bool Sort(std::string* repeated) {
    const auto key = [&](uint32_t place) { return KeyAt(place); };
    std::ranges::sort(places_, {}, key);
    const auto twice = std::ranges::adjacent_find(places_, {}, key);
    if (twice == places_.end()) return true;
    *repeated = KeyAt(*twice);
    return false;
  }
  // The bytes that begin with the value.
  std::optional<std::string_view> Find(std::string_view key) const {
    const auto found = std::ranges::lower_bound(places_, key, {}, [&](uint32_t place) { return KeyAt(place); });
    if (found == places_.end() || KeyAt(*found) != key) return std::nullopt;
    return Value(*found);
  }
  bool Contains(std::string_view key) const { return Find(key).has_value(); }
  // In the order of the keys.
  std::string_view Key(size_t i) const { return KeyAt(places_[i]); }
  std::string_view ValueOf(size_t i) const { return Value(places_[i]); }

 private:
  std::string_view KeyAt(uint32_t place) const {
    size_t at = place;
    return UnpackText(bytes_, at);
  }
  std::string_view Value(uint32_t place) const {
    size_t at = place;
    UnpackText(bytes_, at);
    return std::string_view(bytes_).substr(at);
  }

  std::string bytes_;
  std::vector<uint32_t> places_;
};

}  // namespace sp
