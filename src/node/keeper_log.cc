#include "node/keeper_log.h"

#include <charconv>
#include <cstdio>
#include <cstring>

namespace sp {
namespace {

class Line {
 public:
  void Put(std::string_view text) {
    if (size_ + text.size() > kTextBytesMax) return;
    std::memcpy(bytes_ + size_, text.data(), text.size());
    size_ += text.size();
  }

  void Escaped(std::string_view text) {
    static constexpr char kDigits[] = "0123456789abcdef";
    for (const char c : text) {
      const auto byte = static_cast<unsigned char>(c);
      const char control[] = {'\\', 'u', '0', '0', kDigits[byte >> 4], kDigits[byte & 15]};
      const char quoted[] = {'\\', c};
      if (byte < 0x20) Put({control, sizeof control});
      else if (c == '"' || c == '\\') Put({quoted, sizeof quoted});
      else Put({&c, 1});
    }
  }

  void Field(const KeeperLogField& field) {
    // A field that might not fit with its quotes is left out whole, so that the line stays JSON.
    if (size_ + field.key.size() + kFieldReserve > kTextBytesMax) return;
    Put(",\"");
    Put(field.key);
    if (field.is_number) {
      char digits[24];
      const auto end = std::to_chars(digits, digits + sizeof digits, field.number).ptr;
      Put("\":");
      Put({digits, static_cast<size_t>(end - digits)});
      return;
    }
    Put("\":\"");
    Escaped(field.text);
    if (field.status != nullptr) {
      if (!field.text.empty()) Put(": ");
      Put(StatusCodeName(field.status->code()));
      Put(": ");
      Escaped(field.status->message());
    }
    End("\"");
  }

  void Begin(std::string_view level, std::string_view event) {
    Put("{\"level\":\"");
    Put(level);
    Put("\",\"component\":\"keeper\",\"event\":\"");
    Put(event);
    Put("\"");
  }

  // For what closes something: there is always room.
  void End(std::string_view text) {
    std::memcpy(bytes_ + size_, text.data(), text.size());
    size_ += text.size();
  }

  std::string_view text() const { return {bytes_, size_}; }

 private:
  static constexpr size_t kTextBytesMax = 2000;
  static constexpr size_t kFieldReserve = 32;
  char bytes_[2048];
  size_t size_ = 0;
};

}  // namespace

void KeeperLog(std::string_view level, std::string_view event, std::initializer_list<KeeperLogField> fields) noexcept {
  Line line;
  line.Begin(level, event);
  for (const KeeperLogField& field : fields) line.Field(field);
  line.End("}\n");
  // One call per line, so that lines of keeper and worker on the same stderr do not mix.
  std::fwrite(line.text().data(), 1, line.text().size(), stderr);
}

}  // namespace sp
