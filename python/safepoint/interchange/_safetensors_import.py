"""Reading a folder of safetensors files from anybody: ours, Hugging Face's, torch's. Nothing in it is believed.

Tensors of one piece stay mapped files (private mappings: nothing is written back), so that importing needs no memory
for them beside the save itself; tensors of several pieces are put together in memory.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safepoint import _torch
from safepoint._objects import Json
from safepoint._shard import StoredPiece, StoredValue, check_version, name_of
from safepoint.errors import Corrupt, NotFound, NotPlain, ProtocolError
from safepoint.interchange._arrays import element_dtype, make_array
from safepoint.interchange._boxes import fill_problem
from safepoint.interchange._folder import checked_path, inside, regular_size
from safepoint.interchange._hf_export import INDEX
from safepoint.interchange._source import item_size, origin, rank_in_name
from safepoint.interchange._state import Loaded, Values

_HEADER_MAX = 1 << 28  # docs/formats/shard.md
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C128": 128}
_BITS |= {name: dtype.itemsize * 8 for name, dtype in _torch.DTYPES_BY_NAME.items()}


@dataclass(slots=True)
class _File:
    path: Path
    memory: mmap.mmap
    data_start: int
    entries: dict[str, dict[str, Json]]
    metadata: dict[str, str]


@dataclass(slots=True)
class _Merged:
    pieces: dict[str, list[StoredPiece]] = field(default_factory=dict)
    values: dict[str, StoredValue] = field(default_factory=dict)
    inferred: set[str] = field(default_factory=set)  # Whose global shape nobody states.


def load_safetensors(folder: Path, values: Values) -> Loaded:
    """The state in the folder's safetensors files: those that its index names, else all.

    Corrupt: a file is damaged or lies about itself. NotPlain: a dtype that torch cannot have, or a value that is not
    plain; `values` decides whether it is left out instead.
    """
    weight_map = _read_index(folder)
    if weight_map is None:
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(".safetensors"))
    else:
        paths = [inside(folder, name) for name in dict.fromkeys(weight_map.values())]
    if not paths:
        raise NotFound(f"{folder} has no safetensors files")
    files = [_open(path) for path in paths]
    if weight_map is not None:
        known = {path: file for path, file in zip(paths, files, strict=True)}
        for key, name in weight_map.items():
            if key not in known[inside(folder, name)].entries:
                raise Corrupt(f"{folder / INDEX}: {name} has no tensor {key!r}")
    for file in files:
        _check_versions(file)
    _check_one_step(files)
    merged = _Merged()
    for number, file in enumerate(files):
        try:
            _merge(merged, file, number)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, ProtocolError) as error:
            raise Corrupt(f"{file.path}: its metadata follow no known form: {error!r}") from error
    return _load(merged, files, values)


def _read_index(folder: Path) -> dict[str, Any] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    regular_size(path)
    try:
        weight_map = json.loads(path.read_bytes().decode())["weight_map"]
        if not isinstance(weight_map, dict):
            raise TypeError("weight_map is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"{path} is no index of safetensors files: {error!r}") from error
    return weight_map


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _open(path: Path) -> _File:
    size = regular_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_MAX):
            raise Corrupt(f"{path}: {size} bytes, and a header of {length}")
        text = file.read(length)
        # Private and writable: torch wants memory that it could write to, and gets a copy of any page it would.
        memory = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("a value of __metadata__ is no text")
        _check_entries(entries, size - 8 - length)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{path}: no header of a safetensors file: {error}") from error
    return _File(path, memory, 8 + length, entries, metadata)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_entries(entries: dict[str, Any], data_bytes: int) -> None:
    """Sizes agree with shapes, and the tensors tile the data: neither holes nor shared bytes."""
    spans = []
    for key, entry in entries.items():
        if set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{key!r} has the fields {sorted(entry)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
            raise ValueError(f"{key!r}: shape or data_offsets is no list of numbers")
        if not all(map(_is_count, (*shape, *offsets))) or len(shape) > 64:
            raise ValueError(f"{key!r}: shape {shape!r:.100}, data_offsets {offsets!r:.100}")
        bits = _BITS.get(entry["dtype"])
        if bits is None:
            raise ValueError(f"{key!r}: unknown dtype {entry['dtype']!r}")
        begin, end = offsets
        if (end - begin) * 8 != math.prod(shape) * bits:
            raise ValueError(f"{key!r}: {end - begin} bytes for {shape} {entry['dtype']}")
        spans.append((begin, end, key))
    position = 0
    for begin, end, key in sorted(spans):
        if begin != position:
            raise ValueError(f"{key!r} begins at {begin}, where {position} was due")
        position = end
    if position != data_bytes:
        raise ValueError(f"{data_bytes} bytes of data, and tensors of {position}")


def _check_versions(file: _File) -> None:
    """ProtocolError: a shard of another version of safepoint's; nothing else in it can be taken for known."""
    for name in ("safepoint", "safepoint.step"):
        if name in file.metadata:
            try:
                version = json.loads(file.metadata[name])["version"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise Corrupt(f"{file.path}: its {name} text follows no known form: {error!r}") from error
            check_version(version, name, str(file.path))


def _check_one_step(files: list[_File]) -> None:
    """Rank shards of safepoint: all of one attempt, every rank once; pieces of two steps never mix."""
    stated = [file.metadata.get("safepoint.step") for file in files]
    if not any(stated):
        return
    try:
        steps = [json.loads(text or "null") for text in stated]
        attempts = {step["attempt"] for step in steps}
        worlds = {step["world_size"] for step in steps}
        ranks = sorted(step["rank"] for step in steps)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt("some files are shards of safepoint and some are not, or their step is unreadable") from error
    if len(attempts) != 1:
        raise Corrupt(f"{files[0].path.parent} has shards of {len(attempts)} attempts")
    if len(worlds) != 1 or ranks != list(range(len(files))) or worlds != {len(files)}:
        raise Corrupt(f"{files[0].path.parent} has the shards of ranks {ranks} of a world of {sorted(worlds)}")


def _merge(merged: _Merged, file: _File, number: int) -> None:
    """Adds one file. The fields are those of docs/formats/shard.md; a foreign file has at most DCP_SHARDING_INFO."""
    metadata = file.metadata
    ours = json.loads(metadata["safepoint"]) if "safepoint" in metadata else {}
    sharding = json.loads(metadata["DCP_SHARDING_INFO"]) if "DCP_SHARDING_INFO" in metadata else None
    shapes, raw, paths, names = (ours.get(key, {}) for key in ("global", "raw", "path", "name"))
    by_key: dict[str, StoredPiece] = {}
    for key, entry in file.entries.items():
        about = raw.get(key)
        shape = _shape((about or entry)["shape"])
        true_dtype = None if about is None else str(about["dtype"])
        begin, end = entry["data_offsets"]
        if about is not None and math.prod(shape) * item_size(entry["dtype"], true_dtype) != end - begin:
            raise ValueError(f"{key!r}: {end - begin} bytes for {list(shape)} {true_dtype}")
        # Of a raw tensor of no dimensions, the file's one-dimensional stand-in has no offsets to speak of.
        offsets = (0,) * len(shape) if sharding is None else _shape(sharding[key]["saved_offsets"])
        if len(offsets) != len(shape):
            raise ValueError(f"{key!r}: offsets {list(offsets)} of a shape {list(shape)}")
        name = str(names.get(key, key))
        whole = _shape(shapes[key]) if key in shapes else shape
        if not ours and sharding is not None:
            merged.inferred.add(name)
            whole = tuple(o + n for o, n in zip(offsets, shape, strict=True))
        piece = StoredPiece(
            number, entry["dtype"], true_dtype, shape, offsets, whole, file.data_start + begin, end - begin,
            paths.get(key),
        )  # fmt: skip
        by_key[key] = piece
        merged.pieces.setdefault(name, []).append(piece)
    for name, key in ours.get("alias", {}).items():
        merged.pieces.setdefault(str(names.get(name, name)), []).append(by_key[key]._replace(path=paths.get(name)))
    for path, coded, *rank in json.loads(metadata.get("safepoint.objects", "[]")):
        name = name_of(checked_path(path, "a value"))
        merged.values.setdefault(f"{name}@{int(rank[0])}" if rank else name, StoredValue(number, path, coded))


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(map(_is_count, value)):
        raise ValueError(f"no list of sizes: {value!r:.100}")
    return tuple(value)


def _load(merged: _Merged, files: list[_File], values: Values) -> Loaded:
    loaded = Loaded()
    for name, pieces in merged.pieces.items():
        if name in merged.inferred:
            whole = tuple(map(max, zip(*(piece.global_shape for piece in pieces), strict=True)))
            pieces = [piece._replace(global_shape=whole) for piece in pieces]
        stated = next((piece.path for piece in pieces if piece.path is not None), None)
        ours = "safepoint" in files[pieces[0].rank].metadata
        path = checked_path(stated, name) if stated is not None else name.split(".") if ours else [name]
        try:
            value = _whole(name, pieces, files)
        except NotPlain as error:
            values.refuse(name, error)
            continue
        loaded.add(name, path, value, per_rank=rank_in_name(name, path) is not None)
    for name, stored in merged.values.items():
        try:
            value = values.decode(stored.coded, name)
        except NotPlain as error:
            values.refuse(name, error)
            continue
        except ProtocolError as error:
            raise Corrupt(str(error)) from error
        loaded.add(name, list(stored.path), value, per_rank=rank_in_name(name, stored.path) is not None)
    return loaded


def _whole(name: str, pieces: list[StoredPiece], files: list[_File]) -> Any:
    """The tensor, array or bytes. Corrupt: its pieces do not fit together. NotPlain: torch has no such dtype."""
    first = pieces[0]
    distinct: dict[Any, StoredPiece] = {}
    for piece in pieces:
        if (piece.dtype, piece.raw, piece.global_shape) != (first.dtype, first.raw, first.global_shape):
            raise Corrupt(f"{name}: two of its pieces disagree on its dtype or shape")
        if piece.nbytes:
            distinct.setdefault((origin(piece), piece.shape), piece)
    problem = fill_problem(list(distinct), first.global_shape)
    if problem is not None:
        raise Corrupt(f"{name}: {problem}")
    if first.raw is not None and element_dtype(first.raw) is not None:
        if first.shape != first.global_shape:
            raise Corrupt(f"{name}: an array in pieces")
        return make_array(first.raw, first.shape, _memory(first, files))
    if first.dtype == "F4" and first.raw is None:
        if len(pieces) > 1 or not first.shape or first.shape[-1] % 2:
            raise NotPlain(f"{name}: F4 elements that are not stored two by two in one piece")
        halved = (*first.shape[:-1], first.shape[-1] // 2)
        return _tensor(first, files, torch.float4_e2m1fn_x2, halved)
    dtype = _torch.DTYPES_BY_NAME.get(first.dtype) if first.raw is None else _torch.RAW_DTYPES.get(first.raw)
    if dtype is None:
        raise NotPlain(f"{name}: torch has no dtype {first.raw or first.dtype}")
    whole = next((p for p in distinct.values() if p.shape == p.global_shape), None)
    if whole is not None or not distinct:
        return _tensor(whole or first, files, dtype, first.global_shape)
    unit = f"V{dtype.itemsize}"
    target = torch.empty(first.global_shape, dtype=dtype)
    view = target.reshape(-1).view(torch.uint8).numpy().view(unit).reshape(first.global_shape)
    for piece in distinct.values():
        box = tuple(slice(o, o + n) for o, n in zip(origin(piece), piece.shape, strict=True))
        view[box] = np.frombuffer(_memory(piece, files), unit).reshape(piece.shape)
    return target


def _memory(piece: StoredPiece, files: list[_File]) -> memoryview:
    return memoryview(files[piece.rank].memory)[piece.begin : piece.begin + piece.nbytes]


def _tensor(piece: StoredPiece, files: list[_File], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not piece.nbytes:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(_memory(piece, files), dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()  # A writer that did not align.
    return flat.view(dtype).view(shape)
