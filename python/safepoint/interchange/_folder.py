"""Names and files that a foreign folder speaks of. None is believed."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

from safepoint._objects import Json
from safepoint.errors import Corrupt

PATH_MAX = 200  # Elements.


def inside(folder: Path, name: object) -> Path:
    """The path of a file that the folder's own texts name. Corrupt: it is not in the folder.

    Symbolic links are followed: the folders of Hugging Face's cache consist of them.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise Corrupt(f"{folder} names a file {name!r:.100}")
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise Corrupt(f"{folder} names the file {name!r:.200}, which is outside")
    return folder / relative


def regular_size(path: Path) -> int:
    """Bytes of a regular file. Corrupt: there is none."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Corrupt(f"{path} is missing") from error
    if not stat.S_ISREG(found.st_mode):
        raise Corrupt(f"{path} is no regular file")
    return found.st_size


def checked_path(path: object, name: str) -> list[Json]:
    """A path as docs/formats/shard.md has it. Corrupt: it is none."""
    if isinstance(path, list) and len(path) <= PATH_MAX and all(map(_is_element, path)):
        return path
    raise Corrupt(f"{name}: its path is no list of keys and places")


def _is_element(element: Json) -> bool:
    if isinstance(element, list):
        return len(element) in (1, 2) and all(type(n) is int and 0 <= n < 1 << 31 for n in element)
    return not isinstance(element, dict) or "!" in element
