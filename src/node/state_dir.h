// The little that the daemon keeps on disk: its node id, and one empty file per namespace that once had a complete step, so that "all steps were
// lost" can be told from "there never was one". Thread-safe; trouble here never touches the memory path (F53).
#pragma once

#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"

namespace sp {

// The id in `state_dir`/node_id, made at the first start.
Result<Id128> LoadOrMakeNodeId(const std::string& state_dir);

// The markers there are; makes the directory if needed. Files with other names are left alone.
Result<std::vector<Hash256>> LoadMarkers(const std::string& state_dir);
// On disk when it returns OK. The name of the file is a hash, never text that a client chose.
Status WriteMarkerFile(const std::string& state_dir, const Hash256& marker);

}  // namespace sp
