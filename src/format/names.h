// Names that outsiders choose. Pure.
#pragma once

#include <string_view>

#include "base/status.h"

namespace sp {

// Namespace: 1-200 characters of [A-Za-z0-9_-]. kInvalidArgument names the first bad character.
Status CheckNamespace(std::string_view name);

}  // namespace sp
