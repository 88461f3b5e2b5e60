// SHA-256 (OpenSSL's implementation behind a small value type). Pure.
#pragma once

#include <initializer_list>

#include "base/bytes.h"

namespace sp {

// Both throw std::bad_alloc.
Hash256 Sha256(ByteSpan data);
// Hash of the concatenation of `parts`.
Hash256 Sha256(std::initializer_list<ByteSpan> parts);

}  // namespace sp
