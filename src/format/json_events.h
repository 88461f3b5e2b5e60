// Reads JSON that outsiders wrote, as events with a bounded stack: nothing is built that the reader did not ask for. Pure.
#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "format/constants.h"

namespace sp {

// Derive and override what the document may contain; everything else is refused. Refused always: text that is not strict JSON in valid UTF-8,
// nesting beyond kJsonDepthMax, anything but an object at the top, and byte order marks or zero bytes (the parser would skip them or stop there).
// Repeated keys are the derived class's business, because only it knows which objects are large.
class JsonEvents : public nlohmann::json_sax<nlohmann::json> {
 public:
  // kProtocol, beginning with `what`.
  Status Parse(std::string_view text, const char* what) {
    if (text.empty() || text[0] != '{' || text.find('\0') != std::string_view::npos) Fail("not a JSON object");
    else if (!nlohmann::json::sax_parse(text, this) && error_.empty()) Fail("not JSON");
    if (error_.empty()) return {};
    return {StatusCode::kProtocol, std::string(what) + ": " + error_};
  }

  // The parser's side of the interface; not for others.
  bool null() final { return OnOther(); }
  bool boolean(bool) final { return OnOther(); }
  bool number_integer(number_integer_t) final { return OnOther(); }
  bool number_unsigned(number_unsigned_t value) final { return OnUint(value); }
  bool number_float(number_float_t, const string_t&) final { return OnOther(); }
  bool string(string_t& value) final { return OnText(value); }
  bool binary(binary_t&) final { return OnOther(); }
  bool key(string_t& value) final {
    stack_.back() = std::move(value);
    return OnKey();
  }
  bool start_object(std::size_t) final { return (stack_.empty() || OnObject()) && Push(); }
  bool start_array(std::size_t) final { return OnArray() && Push(); }
  bool end_object() final { return Pop(); }
  bool end_array() final { return Pop(); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) final {
    return Fail("not JSON at byte " + std::to_string(position));
  }

 protected:
  // All of these return whether to go on. `depth()` is 1 for what lies directly in the top object; KeyAt(d) is the key at depth d that leads here
  // (empty inside an array).
  virtual bool OnObject() { return Unexpected("object"); }
  virtual bool OnArray() { return Unexpected("array"); }
  virtual bool OnEnd() { return true; }  // Of the object or array that began at this depth.
  virtual bool OnKey() { return true; }
  virtual bool OnUint(uint64_t) { return Unexpected("number"); }
  virtual bool OnText(std::string&) { return Unexpected("string"); }
  virtual bool OnOther() { return Unexpected("value"); }  // null, bool, negative, fractional or huge number

  size_t depth() const { return stack_.size(); }
  const std::string& KeyAt(size_t depth) const { return stack_[depth - 1]; }
  bool Fail(std::string why) {
    if (error_.empty()) error_ = std::move(why);
    return false;
  }
  bool Unexpected(const char* what) { return Fail(std::string("unexpected ") + what + Where()); }
  std::string Where() const {  // For messages; cut, because keys are somebody else's text.
    std::string path;
    for (const std::string& k : stack_) path += (path.empty() ? "" : "/") + k.substr(0, 200);
    return path.empty() ? "" : " at " + path;
  }

 private:
  bool Push() {
    if (stack_.size() == kJsonDepthMax) return Fail("nested too deeply");
    stack_.emplace_back();
    return true;
  }
  bool Pop() {
    stack_.pop_back();
    return stack_.empty() || OnEnd();
  }

  std::vector<std::string> stack_;  // Per open object or array: the key last seen in it.
  std::string error_;
};

}  // namespace sp
