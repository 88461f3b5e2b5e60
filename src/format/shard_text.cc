#include "format/shard_text.h"

#include <algorithm>
#include <charconv>
#include <system_error>
#include <vector>

#include "format/constants.h"

namespace sp {
namespace {

void AppendUint(std::string& out, uint64_t value) {
  char digits[20];
  const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
  out.append(digits, end);
}

void AppendList(std::string& out, std::span<const uint64_t> values) {
  out += '[';
  for (size_t i = 0; i < values.size(); ++i) {
    if (i != 0) out += ',';
    AppendUint(out, values[i]);
  }
  out += ']';
}

void AppendEscape(std::string& out, uint32_t unit) {
  static constexpr char kDigits[] = "0123456789abcdef";
  out += "\\u";
  for (int shift = 12; shift >= 0; shift -= 4) out += kDigits[unit >> shift & 15];
}

// Takes one character from the front of valid UTF-8.
uint32_t TakeCharacter(std::string_view& text) {
  const auto first = static_cast<uint8_t>(text[0]);
  const size_t size = first < 0x80 ? 1 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  uint32_t character = size == 1 ? first : first & (0x7fu >> size);
  for (size_t i = 1; i < size && i < text.size(); ++i) character = character << 6 | (static_cast<uint8_t>(text[i]) & 0x3fu);
  text.remove_prefix(std::min(size, text.size()));
  return character;
}

void AppendCharacter(std::string& out, uint32_t c) {
  switch (c) {
    case '"': out += "\\\""; return;
    case '\\': out += "\\\\"; return;
    case '\n': out += "\\n"; return;
    case '\r': out += "\\r"; return;
    case '\t': out += "\\t"; return;
    case '\f': out += "\\f"; return;
    case '\b': out += "\\b"; return;
    default: break;
  }
  if (c >= ' ' && c <= '~') {
    out += static_cast<char>(c);
  } else if (c < 0x10000) {
    AppendEscape(out, c);
  } else {
    AppendEscape(out, 0xd800 + ((c - 0x10000) >> 10));
    AppendEscape(out, 0xdc00 + ((c - 0x10000) & 0x3ff));
  }
}

constexpr std::string_view kBeforeSharding = R"(,"format":"pt","DCP_VERSION":"1.0","DCP_SHARDING_INFO":)";
constexpr std::string_view kBeforeSafepoint = R"(,"safepoint":)";

// Reads from the front of a text; every function returns whether it found what it names.
class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}
  std::string_view rest() const { return text_; }

  bool Take(std::string_view literal) {
    if (!text_.starts_with(literal)) return false;
    text_.remove_prefix(literal.size());
    return true;
  }

  // A string of printable ASCII without escapes.
  bool TakePlain(std::string_view& out) {
    if (!Take("\"")) return false;
    size_t size = 0;
    while (size < text_.size() && IsPlain(text_[size])) ++size;
    out = text_.substr(0, size);
    text_.remove_prefix(size);
    return Take("\"");
  }

  // A string of printable ASCII in which quotes and backslashes are escaped.
  bool TakeEscaped(std::string& out) {
    if (!Take("\"")) return false;
    for (;;) {
      size_t size = 0;
      while (size < text_.size() && IsPlain(text_[size])) ++size;
      out.append(text_.substr(0, size));
      text_.remove_prefix(size);
      if (Take("\"")) return true;
      if (Take("\\\"")) out += '"';
      else if (Take("\\\\")) out += '\\';
      else return false;
    }
  }

  // As JSON writes whole numbers: no sign, no leading zero.
  bool TakeUint(uint64_t& out) {
    const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), out);
    const size_t size = static_cast<size_t>(end - text_.data());
    if (error != std::errc() || (size > 1 && text_[0] == '0')) return false;
    text_.remove_prefix(size);
    return true;
  }

  bool TakeList(std::vector<uint64_t>& out) {
    out.clear();
    if (!Take("[")) return false;
    if (Take("]")) return true;
    for (;;) {
      if (out.size() == kTensorRankMax || !TakeUint(out.emplace_back())) return false;
      if (Take("]")) return true;
      if (!Take(",")) return false;
    }
  }

 private:
  static bool IsPlain(char c) { return c >= ' ' && c <= '~' && c != '"' && c != '\\'; }

  std::string_view text_;
};

}  // namespace

void AppendJsonString(std::string& out, std::string_view text) {
  out += '"';
  while (!text.empty()) {
    size_t plain = 0;  // Most names need no escape at all.
    while (plain < text.size() && text[plain] >= ' ' && text[plain] <= '~' && text[plain] != '"' && text[plain] != '\\') ++plain;
    out.append(text.substr(0, plain));
    text.remove_prefix(plain);
    if (!text.empty()) AppendCharacter(out, TakeCharacter(text));
  }
  out += '"';
}

std::string WriteStaticPart(std::span<const StaticEntry> entries, std::string_view safepoint) {
  std::string sharding = "{";
  std::string tensors;
  for (const StaticEntry& e : entries) {
    if (&e != entries.data()) sharding += ',', tensors += ',';
    AppendJsonString(sharding, e.key);
    sharding += ":{\"saved_offsets\":";
    AppendList(sharding, e.offsets);
    sharding += '}';
    AppendJsonString(tensors, e.key);
    tensors += ":{\"dtype\":";
    AppendJsonString(tensors, e.dtype);
    tensors += ",\"shape\":";
    AppendList(tensors, e.shape);
    tensors += ",\"data_offsets\":[";
    AppendUint(tensors, e.begin);
    tensors += ',';
    AppendUint(tensors, e.end);
    tensors += "]}";
  }
  sharding += '}';
  std::string out(kBeforeSharding);
  out.reserve(2 * sharding.size() + safepoint.size() + tensors.size() + kAlignBytes);
  AppendJsonString(out, sharding);
  out += kBeforeSafepoint;
  AppendJsonString(out, safepoint);
  out += '}';
  if (!entries.empty()) out += ',';
  out += tensors;
  out += '}';
  out.resize(AlignUp(out.size(), kAlignBytes), ' ');
  return out;
}

std::optional<StaticTexts> SplitStaticPart(std::string_view static_part) {
  StaticTexts texts;
  Scanner scanner(static_part);
  if (!scanner.Take(kBeforeSharding) || !scanner.TakeEscaped(texts.sharding) || !scanner.Take(kBeforeSafepoint) ||
      !scanner.TakeEscaped(texts.safepoint) || !scanner.Take("}")) {
    return std::nullopt;
  }
  texts.entries = static_part.size() - scanner.rest().size();
  return texts;
}

bool ReadEntries(std::string_view text, const std::function<bool(const StaticEntry&)>& add) {
  Scanner scanner(text);
  std::vector<uint64_t> shape;
  while (!scanner.Take("}")) {
    StaticEntry entry;
    const bool read = scanner.Take(",") && scanner.TakePlain(entry.key) && scanner.Take(":{\"dtype\":") && scanner.TakePlain(entry.dtype) &&
                      scanner.Take(",\"shape\":") && scanner.TakeList(shape) && scanner.Take(",\"data_offsets\":[") &&
                      scanner.TakeUint(entry.begin) && scanner.Take(",") && scanner.TakeUint(entry.end) && scanner.Take("]}");
    entry.shape = shape;
    if (!read || !add(entry)) return false;
  }
  return scanner.rest().find_first_not_of(' ') == std::string_view::npos;
}

}  // namespace sp
