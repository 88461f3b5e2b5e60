// One JSON line per event on stderr. The keeper's own, so that the process that must not die depends on no logging
// library, and needs no memory to say that it has none.
#pragma once

#include <concepts>
#include <cstdint>
#include <initializer_list>
#include <string_view>

#include "base/status.h"

namespace sp {

// Refers to what it was made from, which outlives the call of KeeperLog.
struct KeeperLogField {
  std::string_view key;
  std::string_view text;
  const Status* status = nullptr;  // Follows the text, after a colon if there is one.
  bool is_number = false;
  int64_t number = 0;

  KeeperLogField(std::string_view key, std::string_view text) : key(key), text(text) {}
  KeeperLogField(std::string_view key, const Status& status) : key(key), status(&status) {}
  KeeperLogField(std::string_view key, std::string_view text, const Status& status)
      : key(key), text(text), status(status.ok() ? nullptr : &status) {}
  template <std::integral T>
  KeeperLogField(std::string_view key, T number) : key(key), is_number(true), number(static_cast<int64_t>(number)) {}
};

// `level` is "info", "warn" or "error"; `event` a name in snake_case. Text beyond what one line of 2 KiB holds is cut.
void KeeperLog(std::string_view level, std::string_view event, std::initializer_list<KeeperLogField> fields) noexcept;

}  // namespace sp
