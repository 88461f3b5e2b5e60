"""The metadata of torch.distributed.checkpoint, read without believing it.

They are a pickle. The unpickler here knows the names of torch's metadata classes, of what other writers say where bytes
are with, and nothing else; it makes inert records of its own instead of these classes' objects, so nothing that the
file says runs or changes anything.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from safepoint._objects import Json
from safepoint.errors import Corrupt, NotPlain, SafepointError
from safepoint.interchange._boxes import fill_problem

METADATA_MAX = 1 << 30
_DIMENSIONS_MAX = 64  # torch's own bound.
_ARGUMENTS_MAX = 4096  # A path has one for each of its names.


class Record:
    """Stands for an object of one of torch's metadata classes: its class name, and what the pickle put into it."""

    kind = ""

    def __init__(self, *_: Any) -> None:  # Not kept: a few bytes would be enough for one more copy.
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
        ("amzn_sagemaker_checkpointing.checkpointing.filesystem.storage_info", "_SageMakerStorageInfo"),
        # And where its earlier releases had it.
        ("amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem", "_SageMakerStorageInfo"),
    }
)


# torch's __getattr__ imports modules that it is asked for: it is not asked.
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

# What no metadata are written with, and what would cost more than its bytes: BYTEARRAY8 reserves as many as it names,
# EXT goes through a table of the process, the others copy arguments and hash what they hold.
_REFUSED = (
    pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX,
    pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS,
)  # fmt: skip


def _check_key(key: Any) -> None:
    """The hash of a tuple is made anew each time, and of tuples in tuples as often as they can be reached."""
    _need(isinstance(key, (str, int, Record)), "a key that is no text, number or record:", key)


def _check_keys(stack: list[Any]) -> None:
    for key in stack[::2]:
        _check_key(key)


def _check_call(stack: list[Any]) -> None:
    function, arguments = stack[-2:]
    _need(isinstance(arguments, tuple) and len(arguments) <= _ARGUMENTS_MAX, "too many arguments:", arguments)
    if function is tuple:
        _sizes(*arguments)


def _guarded(operation: bytes, check: Callable[[list[Any]], None]) -> Callable[[Any], None]:
    load: Any = pickle._Unpickler.dispatch[operation[0]]

    def checked(unpickler: Any) -> None:
        check(unpickler.stack)
        load(unpickler)

    return checked


_OPERATIONS: dict[int, Any] = {
    **pickle._Unpickler.dispatch,
    pickle.REDUCE[0]: _guarded(pickle.REDUCE, _check_call),
    pickle.NEWOBJ[0]: _guarded(
        pickle.NEWOBJ, lambda stack: _need(stack[-1] == (), "arguments of a new object:", stack[-1])
    ),
    pickle.SETITEM[0]: _guarded(pickle.SETITEM, lambda stack: _check_key(stack[-2])),
    pickle.SETITEMS[0]: _guarded(pickle.SETITEMS, _check_keys),
}
for _refused in _REFUSED:
    del _OPERATIONS[_refused[0]]


# In Python, not in C: by a few bytes the C unpickler can be made to reserve any amount of memory, in its memo for one.
# Python's own does so in the operations above, and where one list, kept under a number, is copied again and again.
class _Unpickler(pickle._Unpickler):
    """Records instead of classes, made anew for every file: not even the records' classes can be changed for others."""

    dispatch = _OPERATIONS

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._records: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key == ("torch", "Size"):
            return tuple
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if key not in _CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is none of torch's metadata classes")
        if key not in self._records:
            self._records[key] = type(name, (Record,), {"kind": name})
        return self._records[key]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one entry's bytes are."""

    file: str
    offset: int
    length: int


class Files(Protocol):
    """The files that some metadata speak of."""

    storage: str  # The class whose records say where an entry's bytes are.

    def name_of(self, about: Record) -> object:
        """The file that such a record names; anything but a text if it names none."""

    def check(self, file: str, size: int) -> None:
        """Corrupt, Incomplete: there is no such file, or it has fewer bytes."""

    def read(self, place: Place) -> bytes:
        """Corrupt: the file has become shorter."""


@dataclass(slots=True)
class TensorEntry:
    """What is said of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]  # (offsets, sizes); none is empty.


@dataclass(slots=True)
class Metadata:
    """What the metadata say, checked against themselves and the files."""

    entries: dict[str, TensorEntry | None]  # None: a value.
    paths: dict[str, list[Json]]
    stored: dict[tuple[str, tuple[int, ...] | None], Place]


def read_metadata(data: bytes, where: object, files: Files) -> Metadata:
    """Corrupt: the metadata, which messages call `where`, are damaged, contradict themselves, or name anything but the
    classes of metadata. Also what `files.check` raises.
    """
    try:
        return _checked(_Unpickler(data).load(), files)
    except SafepointError:
        raise
    except pickle.UnpicklingError as error:
        raise Corrupt(f"{where} was not read: {error}") from error
    except (
        ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise Corrupt(f"{where} is damaged: {error!r}") from error


_shortened = reprlib.Repr()
_shortened.maxlevel = 2  # What is in many lists at once has no end.


def _short(value: Any) -> str:
    return f"{_shortened.repr(value):.100}"


def _need(holds: bool, text: str, *about: Any) -> None:
    if not holds:
        raise ValueError(" ".join([text, *map(_short, about)]))


def _sizes(value: Any) -> tuple[int, ...]:
    _need(isinstance(value, (tuple, list)) and len(value) <= _DIMENSIONS_MAX, "no list of sizes:", value)
    _need(all(type(n) is int and 0 <= n < 1 << 63 for n in value), "no list of sizes:", value)
    return tuple(value)


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, Record) and value.kind == kind


def _checked(found: Any, files: Files) -> Metadata:
    _need(_is(found, "Metadata"), "it holds no Metadata")
    paths: dict[str, list[Json]] = {}
    for name, path in _items(found.get("planner_data") or {}):
        _need(isinstance(path, (tuple, list)) and 0 < len(path) <= 200, "the path of", name)
        _need(all(type(e) is str or (type(e) is int and 0 <= e < 1 << 31) for e in path), "the path of", name)
        paths[name] = [[e] if type(e) is int else e for e in path]
    stored: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for index, about in _items(found.get("storage_data")):
        _need(_is(index, "MetadataIndex") and _is(about, files.storage), "a storage entry of another kind")
        name, offset = index.get("fqn"), index.get("offset")
        _need(isinstance(name, str), "a storage entry without a name")
        if about.get("transform_descriptors"):
            raise NotPlain(f"{name}: its bytes were transformed by {_short(about.get('transform_descriptors'))}")
        file = files.name_of(about)
        if not isinstance(file, str):
            raise ValueError(f"{name}: no file")
        place = Place(file, about.get("offset"), about.get("length"))
        _need(all(type(n) is int and n >= 0 for n in (place.offset, place.length)), f"{name}: offset or length")
        stored[name, None if offset is None else _sizes(offset)] = place
    entries: dict[str, TensorEntry | None] = {}
    for name, about in _items(found.get("state_dict_metadata")):
        _need(isinstance(name, str), "a key that is no text:", name)
        entry = None if _is(about, "BytesStorageMetadata") else _tensor_entry(name, about)
        # At once: many entries can be of the same pieces, but not of the same places.
        _check_entry(name, entry, stored)
        entries[name] = entry
    _check_places(stored, files)
    return Metadata(entries, paths, stored)


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    _need(isinstance(value, dict), "no mapping:", value)
    return value.items()  # type: ignore[no-any-return]


def _tensor_entry(name: str, about: Any) -> TensorEntry:
    _need(_is(about, "TensorStorageMetadata"), f"{name}: metadata of another kind")
    properties = about.get("properties")
    _need(_is(properties, "TensorProperties"), f"{name}: no properties")
    state = properties.state
    dtype = state.get("dtype") if isinstance(state, dict) else state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name}: no dtype")
    chunks = about.get("chunks")
    _need(isinstance(chunks, list) and all(_is(c, "ChunkStorageMetadata") for c in chunks), f"{name}: no chunks")
    boxes = dict.fromkeys((_sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))) for chunk in chunks)
    shape = _sizes(about.get("size"))
    # Also of a tensor without elements: torch makes its strides all the same.
    _need(math.prod(n or 1 for n in shape) * dtype.itemsize < 1 << 63, f"{name}: no such size:", shape)
    return TensorEntry(dtype, shape, [box for box in boxes if math.prod(box[1])])


def _check_places(stored: dict[Any, Place], files: Files) -> None:
    """Every entry's bytes lie in a file that is there, and no byte belongs to two."""
    by_file: dict[str, list[Place]] = {}
    for place in stored.values():
        by_file.setdefault(place.file, []).append(place)
    for file, places in by_file.items():
        position = 0
        for place in sorted(places, key=lambda p: p.offset):
            _need(place.offset >= position, f"two entries share bytes of {file}")
            position = place.offset + place.length
        files.check(file, position)


def _check_entry(name: str, entry: TensorEntry | None, stored: dict[Any, Place]) -> None:
    if entry is None:
        _need((name, None) in stored, f"{name}: nothing says where it is")
        return
    problem = fill_problem(entry.chunks, entry.shape)
    _need(problem is None, f"{name}: {problem}")
    for offsets, sizes in entry.chunks:
        place = stored.get((name, offsets))
        _need(place is not None, f"{name}: nothing says where its piece at {list(offsets)} is")
        if place is not None:
            size = math.prod(sizes) * entry.dtype.itemsize
            _need(size <= place.length, f"{name}: {size} bytes of values in {place.length} bytes of the file")
