#include "base/sha256.h"

#include <openssl/evp.h>

#include <memory>
#include <new>

#include "base/check.h"

namespace sp {

Hash256 Sha256(ByteSpan data) { return Sha256({data}); }

Hash256 Sha256(std::initializer_list<ByteSpan> parts) {
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> ctx(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  // SHA-256 of OpenSSL fails for want of memory only.
  if (!ctx || EVP_DigestInit_ex(ctx.get(), EVP_sha256(), nullptr) != 1) throw std::bad_alloc();
  for (ByteSpan part : parts) SP_CHECK(EVP_DigestUpdate(ctx.get(), part.data(), part.size()) == 1);
  Hash256 out;
  unsigned int len = 0;
  SP_CHECK(EVP_DigestFinal_ex(ctx.get(), out.bytes.data(), &len) == 1 && len == out.bytes.size());
  return out;
}

}  // namespace sp
