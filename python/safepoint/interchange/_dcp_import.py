"""Reading a folder of torch.distributed.checkpoint without believing it."""

from __future__ import annotations

from pathlib import Path

from safepoint.errors import Corrupt, InvalidArgument
from safepoint.interchange._dcp_items import load_items
from safepoint.interchange._dcp_metadata import METADATA_MAX, Place, Record, read_metadata
from safepoint.interchange._folder import inside, regular_size
from safepoint.interchange._source import Progress
from safepoint.interchange._state import Loaded, Values

METADATA = ".metadata"


class _Folder:
    """The files of a folder, by their names in it."""

    storage = "_StorageInfo"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def name_of(self, about: Record) -> object:
        return about.get("relative_path")

    def check(self, file: str, size: int) -> None:
        found = regular_size(inside(self._folder, file))
        if size > found:
            raise Corrupt(f"{self._folder / file} has {found} bytes, its metadata say {size} at least")

    def read(self, place: Place) -> bytes:
        with (self._folder / place.file).open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.length)
        if len(data) != place.length:
            raise Corrupt(f"{self._folder / place.file} has become shorter")
        return data


def load_dcp(folder: Path, values: Values, progress: Progress) -> Loaded:
    """The state in a DCP folder, in memory.

    Corrupt: a file is damaged or lies about itself. NotPlain: a value that only an unrestricted unpickler reads;
    `values` decides whether it is left out or unpickled instead. InvalidArgument: a folder that torch wrote without
    collectives.
    """
    path = folder / METADATA
    if not path.exists() and any(folder.glob("__*.metadata")):
        raise InvalidArgument(f"{folder} was written without collectives: every rank's part is a folder of its own")
    if regular_size(path) > METADATA_MAX:
        raise Corrupt(f"{path} has more than {METADATA_MAX} bytes")
    files = _Folder(folder)
    return load_items(read_metadata(path.read_bytes(), path, files), files, values, progress)
