"""Reading a folder of torch.distributed.checkpoint without believing it.

Its `.metadata` is a pickle. The unpickler here knows the names of torch's metadata classes and nothing else, and makes
inert records of its own instead of torch's objects, so nothing that the file says runs or changes anything. Values
(BYTE_IO entries, pickles of torch.save) go through `torch.load(weights_only=True)`, one by one; what that refuses is
not plain.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from safepoint._objects import Json
from safepoint.errors import Corrupt, InvalidArgument, NotPlain
from safepoint.interchange._boxes import fill_problem
from safepoint.interchange._folder import inside, regular_size
from safepoint.interchange._source import Progress
from safepoint.interchange._state import Loaded, Values

METADATA = ".metadata"
_METADATA_MAX = 1 << 30


_REFUSED_NAME = re.compile(r"GLOBAL (\S{1,100})")


class _Record:
    """Stands for an object of one of torch's metadata classes: its class name, and what the pickle put into it."""

    kind = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_CLASSES = frozenset(
    {
        *(
            (_METADATA_MODULE, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)


# In Python, not in C: the C unpickler can be made to reserve any amount of memory by a few bytes.
class _Unpickler(pickle._Unpickler):
    """Records instead of classes, made anew for every file: not even the records' classes can be changed for others."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._records: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if key not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is none of torch's metadata classes")
        if key not in self._records:
            self._records[key] = type(name, (_Record,), {"kind": name})
        return self._records[key]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where one entry's bytes are."""

    file: str
    offset: int
    length: int


@dataclass(slots=True)
class _TensorEntry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]  # (offsets, sizes)


@dataclass(slots=True)
class Metadata:
    """What a DCP folder's metadata says, checked against itself and the files."""

    entries: dict[str, _TensorEntry | None]  # None: a value.
    paths: dict[str, list[Json]]
    stored: dict[tuple[str, tuple[int, ...] | None], _Stored]


def read_metadata(folder: Path) -> Metadata:
    """Corrupt: the metadata are damaged, or name anything but torch's metadata classes, or bytes that are not there."""
    path = folder / METADATA
    if regular_size(path) > _METADATA_MAX:
        raise Corrupt(f"{path} has more than {_METADATA_MAX} bytes")
    try:
        found = _Unpickler(path.read_bytes()).load()
        return _checked(found, folder)
    except Corrupt:
        raise
    except NotPlain:
        raise
    except pickle.UnpicklingError as error:
        raise Corrupt(f"{path} was not read: {error}") from error
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise Corrupt(f"{path} is damaged: {error!r}") from error


def _need(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _sizes(value: Any) -> tuple[int, ...]:
    _need(isinstance(value, (tuple, list)) and len(value) <= 64, f"no list of sizes: {value!r:.100}")
    _need(all(type(n) is int and 0 <= n < 1 << 63 for n in value), f"no list of sizes: {value!r:.100}")
    return tuple(value)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _checked(found: Any, folder: Path) -> Metadata:
    _need(_is(found, "Metadata"), "it holds no Metadata")
    entries: dict[str, _TensorEntry | None] = {}
    for name, about in _items(found.get("state_dict_metadata")):
        _need(isinstance(name, str), f"the key {name!r:.100} is no text")
        entries[name] = None if _is(about, "BytesStorageMetadata") else _tensor_entry(name, about)
    paths: dict[str, list[Json]] = {}
    for name, path in _items(found.get("planner_data") or {}):
        _need(isinstance(path, (tuple, list)) and 0 < len(path) <= 200, f"the path of {name!r:.100}")
        _need(all(type(e) is str or (type(e) is int and 0 <= e < 1 << 31) for e in path), f"the path of {name!r:.100}")
        paths[name] = [[e] if type(e) is int else e for e in path]
    stored: dict[tuple[str, tuple[int, ...] | None], _Stored] = {}
    for index, about in _items(found.get("storage_data")):
        _need(_is(index, "MetadataIndex") and _is(about, "_StorageInfo"), "a storage entry of another kind")
        name, offset = index.get("fqn"), index.get("offset")
        _need(isinstance(name, str), "a storage entry without a name")
        if about.get("transform_descriptors"):
            raise NotPlain(f"{name}: its bytes were transformed by {about.get('transform_descriptors')!r:.100}")
        place = _Stored(about.get("relative_path"), about.get("offset"), about.get("length"))
        _need(all(type(n) is int and n >= 0 for n in (place.offset, place.length)), f"{name}: offset or length")
        stored[name, None if offset is None else _sizes(offset)] = place
    _check_places(stored, folder)
    for name, entry in entries.items():
        _check_entry(name, entry, stored)
    return Metadata(entries, paths, stored)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    _need(isinstance(value, dict), f"no mapping: {value!r:.100}")
    return value.items()  # type: ignore[no-any-return]


def _tensor_entry(name: str, about: Any) -> _TensorEntry:
    _need(_is(about, "TensorStorageMetadata"), f"{name}: metadata of another kind")
    properties = about.get("properties")
    _need(_is(properties, "TensorProperties"), f"{name}: no properties")
    state = properties.state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}: no dtype")
    chunks = about.get("chunks")
    _need(isinstance(chunks, list) and all(_is(c, "ChunkStorageMetadata") for c in chunks), f"{name}: no chunks")
    boxes = [(_sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))) for chunk in chunks]
    return _TensorEntry(dtype, _sizes(about.get("size")), list(dict.fromkeys(boxes)))


def _check_places(stored: dict[Any, _Stored], folder: Path) -> None:
    """Every entry's bytes lie in a file of the folder, and no byte belongs to two."""
    by_file: dict[str, list[_Stored]] = {}
    for (name, _), place in stored.items():
        _need(isinstance(place.file, str), f"{name}: no file")
        by_file.setdefault(place.file, []).append(place)
    for file, places in by_file.items():
        size = regular_size(inside(folder, file))
        position = 0
        for place in sorted(places, key=lambda p: p.offset):
            _need(place.offset >= position, f"two entries share bytes of {file}")
            position = place.offset + place.length
            if position > size:
                raise Corrupt(f"{folder / file} has {size} bytes, its metadata say {position} at least")


def _check_entry(name: str, entry: _TensorEntry | None, stored: dict[Any, _Stored]) -> None:
    if entry is None:
        _need((name, None) in stored, f"{name}: nothing says where it is")
        return
    boxes = [(offsets, sizes) for offsets, sizes in entry.chunks if math.prod(sizes)]
    problem = fill_problem(boxes, entry.shape)
    _need(problem is None, f"{name}: {problem}")
    for offsets, sizes in boxes:
        place = stored.get((name, offsets))
        _need(place is not None, f"{name}: nothing says where its piece at {list(offsets)} is")
        if place is not None:
            size = math.prod(sizes) * entry.dtype.itemsize
            _need(size <= place.length, f"{name}: {size} bytes of values in {place.length} bytes of the file")


def load_dcp(folder: Path, values: Values, progress: Progress) -> Loaded:
    """The state in a DCP folder, in memory.

    Corrupt: a file is damaged or lies about itself. NotPlain: a value that only an unrestricted unpickler reads;
    `values` decides whether it is left out or unpickled instead. InvalidArgument: a folder that torch wrote without
    collectives.
    """
    if not (folder / METADATA).exists() and any(folder.glob("__*.metadata")):
        raise InvalidArgument(f"{folder} was written without collectives: every rank's part is a folder of its own")
    metadata = read_metadata(folder)
    loaded = Loaded()
    total = sum(place.length for place in metadata.stored.values())
    done = 0

    def advance(place: _Stored) -> None:
        nonlocal done
        done += place.length
        progress(done, total)

    for name, entry in metadata.entries.items():
        path = metadata.paths.get(name, [name])
        if entry is not None:
            loaded.add(name, path, _tensor(folder, name, entry, metadata.stored, advance))
            continue
        place = metadata.stored[name, None]
        try:
            value = _value(_bytes(folder, place), name, values)
            values.check(value, name)
        except NotPlain as error:
            values.refuse(name, error)
            # A list keeps its length: what is left out of one is None.
            if isinstance(path[-1], list):
                loaded.add(name, path, None)
        else:
            loaded.add(name, path, value)
        advance(place)
    return loaded


def _bytes(folder: Path, place: _Stored) -> bytes:
    with (folder / place.file).open("rb") as file:
        file.seek(place.offset)
        data = file.read(place.length)
    if len(data) != place.length:
        raise Corrupt(f"{folder / place.file} has become shorter")
    return data


def _archive(data: bytes, name: str) -> io.BytesIO:
    """The bytes as a file for torch.load. Corrupt: no archive of torch.save, or one that would grow when unpacked."""
    stream = io.BytesIO(data)
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
    except (
        zipfile.BadZipFile,
        ArithmeticError,
        EOFError,
        LookupError,
        NotImplementedError,
        OSError,
        ValueError,
        struct.error,
    ) as error:
        raise Corrupt(f"{name}: no archive of torch.save: {error}") from error
    if any(part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size for part in parts):
        raise Corrupt(f"{name}: a compressed archive, which torch.save never writes")
    if sum(part.file_size for part in parts) > len(data):
        raise Corrupt(f"{name}: parts of its archive share their bytes")
    stream.seek(0)
    return stream


def _torch_load(data: bytes, name: str, *, weights_only: bool) -> Any:
    stream = _archive(data, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Its advice is about torch.load, which the user did not call.
        return torch.load(stream, map_location="cpu", weights_only=weights_only)


def _tensor(
    folder: Path, name: str, entry: _TensorEntry, stored: dict[Any, _Stored], advance: Callable[[_Stored], None]
) -> torch.Tensor:
    result = torch.empty(entry.shape, dtype=entry.dtype)
    for offsets, sizes in entry.chunks:
        if not math.prod(sizes):
            continue
        place = stored[name, offsets]
        try:
            piece = _torch_load(_bytes(folder, place), name, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError) as error:
            raise Corrupt(f"{name}: its piece at {list(offsets)} is no tensor of torch.save: {error}") from error
        plain = type(piece) is torch.Tensor and piece.layout == torch.strided and not piece.is_quantized
        if not plain or piece.dtype != entry.dtype or tuple(piece.shape) != sizes:
            raise Corrupt(f"{name}: its piece at {list(offsets)} is not the tensor that the metadata tell of")
        if sizes == entry.shape:
            advance(place)
            return piece.contiguous()  # type: ignore[no-any-return]
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        _units(result)[box] = _units(piece.contiguous())
        advance(place)
    return result


def _units(tensor: torch.Tensor) -> Any:
    """A view of the elements as opaque bytes: some dtypes of torch cannot be copied in part."""
    flat = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat.view(f"V{tensor.element_size()}").reshape(tuple(tensor.shape))


def _value(data: bytes, name: str, values: Values) -> Any:
    try:
        return _torch_load(data, name, weights_only=True)
    except pickle.UnpicklingError as error:
        if not values.allow_pickle:
            found = _REFUSED_NAME.search(str(error))
            reason = f"names {found[1]}" if found else "is more than plain data"
            raise NotPlain(
                f"{name}: its pickle {reason}; leave such values out (--skip-not-plain), or unpickle them "
                "(--allow-pickle), which can run code"
            ) from error
    except (RuntimeError, ValueError, TypeError, LookupError, EOFError, AttributeError) as error:
        raise Corrupt(f"{name}: a damaged value: {error}") from error
    try:
        return _torch_load(data, name, weights_only=False)
    except Exception as error:  # Whatever the pickled classes raise.
        raise NotPlain(f"{name}: cannot be unpickled here: {error!r}") from error
