#include "format/names.h"

#include "format/constants.h"

namespace sp {
namespace {

bool IsNameCharacter(char c) {
  return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
}

// A byte of somebody's input, safe to print in a message and a log.
std::string Printable(char c) {
  static constexpr char kDigits[] = "0123456789abcdef";
  const auto byte = static_cast<uint8_t>(c);
  if (byte > 0x20 && byte < 0x7f) return std::string("'") + c + "'";
  return std::string("byte 0x") + kDigits[byte >> 4] + kDigits[byte & 15];
}

}  // namespace

Status CheckNamespace(std::string_view name) {
  if (name.empty()) return {StatusCode::kInvalidArgument, "namespace is empty"};
  if (name.size() > kNamespaceBytesMax) {
    return {StatusCode::kInvalidArgument, "namespace has " + std::to_string(name.size()) + " characters, the limit is " +
                                              std::to_string(kNamespaceBytesMax)};
  }
  for (size_t i = 0; i < name.size(); ++i) {
    if (IsNameCharacter(name[i])) continue;
    return {StatusCode::kInvalidArgument, "namespace contains " + Printable(name[i]) + " at position " + std::to_string(i) +
                                              "; allowed are letters, digits, '_' and '-'"};
  }
  return {};
}

}  // namespace sp
