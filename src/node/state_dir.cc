#include "node/state_dir.h"

#include <filesystem>

#include "os/files.h"
#include "os/system.h"

namespace sp {
namespace {

namespace fs = std::filesystem;

std::string MarkerDir(const std::string& state_dir) { return state_dir + "/markers"; }

}  // namespace

Result<Id128> LoadOrMakeNodeId(const std::string& state_dir) {
  SP_RETURN_IF_ERROR(MakePrivateDirectories(state_dir));
  const std::string path = state_dir + "/node_id";
  const auto text = ReadFile(path, 64);
  Id128 id;
  if (text) {
    const std::string line = text->substr(0, text->find('\n'));
    if (!Id128::FromHex(line, &id)) return Error(StatusCode::kCorrupt, path + " does not hold a node id");
    return id;
  }
  if (text.error().code() != StatusCode::kNotFound) return std::unexpected(text.error());
  id = RandomId128();
  SP_RETURN_IF_ERROR(WriteFileAtomic(path, AsBytes(id.ToHex() + "\n"), 0600));
  return id;
}

Result<std::vector<Hash256>> LoadMarkers(const std::string& state_dir) {
  SP_RETURN_IF_ERROR(MakePrivateDirectories(MarkerDir(state_dir)));
  std::vector<Hash256> markers;
  std::error_code error;
  fs::directory_iterator it(MarkerDir(state_dir), error);
  for (; !error && it != fs::directory_iterator(); it.increment(error)) {
    Hash256 marker;
    if (Hash256::FromHex(it->path().filename().string(), &marker)) markers.push_back(marker);
  }
  if (error) return Error(StatusCode::kUnavailable, "list " + MarkerDir(state_dir) + ": " + error.message());
  return markers;
}

Status WriteMarkerFile(const std::string& state_dir, const Hash256& marker) {
  // That it exists is all it says. A temporary file would be left behind by a SIGKILL, and nobody could prove later that it is not in use.
  return MakeEmptyFile(MarkerDir(state_dir) + "/" + marker.ToHex(), 0600);
}

}  // namespace sp
