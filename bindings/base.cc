// Functions that need no daemon.
#include "base/crc32c.h"

#include "client/copy_kernel.h"
#include "convert.h"
#include "errors.h"
#include "module.h"
#include "os/system.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sp::python {

void BindBase(nb::module_& m) {
  m.def("kernel_name", [] { return FindCopyKernel(KernelKind::kAuto)->name; },
        "Name of the copy loop in use on this CPU.");
  m.def(
      "crc32c",
      [](const Buffer& data, uint32_t crc) {
        const BufferView view(data);
        return Unlocked([&] { return Crc32c(crc, view.bytes()); });
      },
      "data"_a, "crc"_a = 0, "CRC32C of `data`, continuing `crc`, the checksum of what came before.");
  m.def("new_id", [] { return ToBytes(RandomId128().span()); }, "16 random bytes.");
}

}  // namespace sp::python
