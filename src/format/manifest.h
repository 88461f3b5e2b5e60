// Manifest: the JSON document that states one complete attempt (docs/formats/manifest.md). Pure.
//
// Its bytes depend only on the W seal records, so any daemon that knows them makes the identical one.
#pragma once

#include <string>
#include <vector>

#include "base/status.h"
#include "format/seal_record.h"

namespace sp {

// `records`: the data records of one attempt, ranks 0..W-1 in order (CHECKed: callers test completeness first).
std::string MakeManifest(const std::vector<SealRecord>& records);
// The seal record of that manifest.
SealRecord ManifestRecord(const std::vector<SealRecord>& records, const std::string& manifest);
// Reads a manifest back (fixed schema, bounded). kProtocol: malformed, or its parts contradict each other.
Result<std::vector<SealRecord>> ParseManifest(std::string_view json);

}  // namespace sp
