"""Reading the header of one shard, and merging those of an attempt. Layout: docs/formats/shard.md.

The bytes were verified against their checksums before they come here; what does not follow the format is a
ProtocolError all the same.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from safepoint import _core
from safepoint._objects import Json
from safepoint._state import element_text
from safepoint.errors import ProtocolError

VERSION = 1  # Of the texts "safepoint" and "safepoint.step".


def check_version(found: Json, text: str, where: str) -> None:
    """ProtocolError: the text has a form that this library does not know."""
    if type(found) is not int or found != VERSION:
        raise ProtocolError(
            f"{where}: its {text} text has version {found!r:.40}, and this safepoint knows version {VERSION}: "
            "read it with the safepoint that saved it, or a newer one"
        )


class StoredPiece(NamedTuple):
    """One tensor piece as a shard has it."""

    rank: int
    dtype: str  # safetensors' name.
    raw: str | None  # True type where `dtype` does not say it: "complex128", "bytes", "numpy:<f8", ...
    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None  # None: at the origin.
    global_shape: tuple[int, ...]
    begin: int  # Offset in the shard.
    nbytes: int
    path: Sequence[Json] | None  # None: the name split at its dots.

    @property
    def whole(self) -> bool:
        return self.shape == self.global_shape


class StoredValue(NamedTuple):
    """One plain value, still encoded."""

    rank: int
    path: Sequence[Json]
    coded: Json


@dataclass(slots=True)
class Shard:
    """What one shard holds."""

    rank: int
    step: dict[str, Json]  # The "safepoint.step" text: namespace, step, generation, attempt, rank, world_size.
    pieces: dict[str, list[StoredPiece]] = field(default_factory=dict)  # By tensor name.
    values: dict[str, StoredValue] = field(default_factory=dict)  # By name; PerRank ones with "@<rank>" behind it.


def name_of(path: Sequence[Json]) -> str:
    return ".".join([e if type(e) is str else element_text(e) for e in path])


def parse_shard(header: bytes, rank: int, static_offset: int = 0) -> Shard:
    """Parses a header (with its 8 length bytes). `static_offset`: as the seal record says; 0 where there is none."""
    try:
        return _parse(header, rank, static_offset)
    except ProtocolError:
        raise
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ProtocolError(f"shard of rank {rank}: the header follows no known form: {error}") from error


def _parse(header: bytes, rank: int, static_offset: int) -> Shard:
    data_start = 8 + int.from_bytes(header[:8], "little")
    if data_start != len(header):
        raise ProtocolError(f"shard of rank {rank}: the header says {data_start} bytes and has {len(header)}")
    # Our own writer's text is read without an object per number; any other safetensors header as the JSON that it is.
    # UTF-8 is said: from bytes, json would guess an encoding and import it.
    texts = _core.split_header(header, static_offset)
    if texts is not None:
        sharding_text, info_text, entries_at = texts
        metadata = json.loads(header[8:static_offset].decode() + "}}")["__metadata__"]
    else:
        metadata = json.loads(header[8:].decode())["__metadata__"]
        sharding_text, info_text, entries_at = metadata["DCP_SHARDING_INFO"], metadata["safepoint"], 0
    info = json.loads(info_text)
    check_version(info["version"], "safepoint", f"shard of rank {rank}")
    shard = Shard(rank, json.loads(metadata["safepoint.step"]))
    check_version(shard.step["version"], "safepoint.step", f"shard of rank {rank}")
    for key in ("attempt", "step", "world_size"):
        shard.step[key]  # The caller compares them with what the daemon says.
    if shard.step["rank"] != rank:
        raise ProtocolError(f"shard of rank {rank}: the header says that it is of rank {shard.step['rank']}")
    paths = info.get("path", {})
    pieces = _core.read_pieces(header, entries_at, rank, StoredPiece, paths) if texts is not None else None
    if pieces is None:
        pieces = _pieces_of_json(json.loads(header[8:].decode()), rank, data_start, paths)
    shard.pieces = _told_more(pieces, info, sharding_text)
    for path, coded, *of_rank in json.loads(metadata["safepoint.objects"]):
        name = name_of(path)
        shard.values[f"{name}@{of_rank[0]}" if of_rank else name] = StoredValue(rank, path, coded)
    return shard


def _pieces_of_json(
    entries: dict[str, Any], rank: int, data_start: int, paths: dict[str, Any]
) -> dict[str, list[StoredPiece]]:
    """By key, each as if it were whole."""
    pieces: dict[str, list[StoredPiece]] = {}
    for key, entry in entries.items():
        if key != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            place = (data_start + begin, end - begin, paths.get(key))
            pieces[key] = [StoredPiece(rank, entry["dtype"], None, shape, None, shape, *place)]
    return pieces


def _told_more(pieces: dict[str, list[StoredPiece]], info: dict[str, Any], sharding_text: str) -> dict[str, Any]:
    """By name, with what the safepoint text says: true types, places in global tensors, aliases, names."""
    for key, about in info.get("raw", {}).items():
        shape = tuple(about["shape"])
        pieces[key] = [pieces[key][0]._replace(raw=about["dtype"], shape=shape, global_shape=shape)]
    global_shapes = info.get("global", {})
    # Offsets other than the origin occur only beside a global shape that differs: without one, there is nothing to look
    # up.
    sharding = json.loads(sharding_text) if global_shapes else {}
    for key, shape in global_shapes.items():
        offsets = tuple(sharding[key]["saved_offsets"])
        pieces[key] = [pieces[key][0]._replace(offsets=offsets, global_shape=tuple(shape))]
    paths = info.get("path", {})
    for alias, key in info.get("alias", {}).items():
        pieces[alias] = [pieces[key][0]._replace(path=paths.get(alias))]
    names = info.get("name", {})
    if not names:
        return pieces
    by_name: dict[str, list[StoredPiece]] = {}
    for key, found in pieces.items():
        by_name.setdefault(names.get(key, key), []).extend(found)
    return by_name


@dataclass(slots=True)
class Checkpoint:
    """The merged shards of one attempt. Of equal pieces the first that was added wins."""

    pieces: dict[str, list[StoredPiece]] = field(default_factory=dict)
    values: dict[str, StoredValue] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    _parameters: dict[str, Container[int]] = field(default_factory=dict)  # By the name of an optimizer's state dict.

    def add(self, shard: Shard) -> None:
        self.ranks.add(shard.rank)
        self._parameters.clear()
        if not self.pieces and not self.values:
            self.pieces, self.values = shard.pieces, shard.values
            return
        for name, pieces in shard.pieces.items():
            known = self.pieces.get(name)
            if known is None:
                self.pieces[name] = pieces
                continue
            for piece in pieces:
                if not any((p.offsets, p.shape) == (piece.offsets, piece.shape) for p in known):
                    known.append(piece)
        for name, value in shard.values.items():
            self.values.setdefault(name, value)

    def owner(self, name: str) -> tuple[str, int] | None:
        """Name and rank of one rank's own part (PerRank); None: what has that name is of all ranks."""
        base, at, rank = name.rpartition("@")
        if not (at and rank.isdecimal()) or name_of(self.full_path(name)) != base:
            return None  # A name may have an @ of its own.
        return base, int(rank)

    def owned(self) -> dict[str, tuple[str, int]]:
        """The parts that are one rank's own, with their names and ranks."""
        names = [name for name in (*self.pieces, *self.values) if "@" in name]
        return {name: owner for name in names if (owner := self.owner(name)) is not None}

    def full_path(self, name: str) -> Sequence[Json]:
        """Path of a tensor, an array or a value."""
        value = self.values.get(name)
        return self.path_of(name) if value is None else self._numbered(name, value.path)

    def path_of(self, name: str) -> Sequence[Json]:
        path = self.pieces[name][0].path
        return self._numbered(name, name.split(".") if path is None else path)

    def _numbered(self, name: str, path: Sequence[Json]) -> Sequence[Json]:
        """The path with the numbers of an optimizer's parameters as numbers.

        torch's planners make texts of all keys, and an optimizer takes a state under the key "0" for nobody's: it would
        begin anew without a word. The parameter groups beside the state say which numbers there are.
        """
        if "state" not in path:
            return path
        for depth, key in enumerate(path[1:]):
            if path[depth] != "state" or type(key) is not str or not key.isdecimal() or str(int(key)) != key:
                continue
            own = name[len(name_of(path)) :]  # "@" and the rank, of a PerRank part.
            if int(key) in self._parameters_of(name_of([*path[:depth], "param_groups"]), own):
                return [*path[: depth + 1], int(key), *path[depth + 2 :]]
        return path

    def _parameters_of(self, groups: str, own: str) -> Container[int]:
        known = self._parameters.get(groups + own)
        if known is None:
            known = self._parameters[groups + own] = self._find_parameters(groups, own)
        return known

    def _find_parameters(self, groups: str, own: str) -> Container[int]:
        """The numbers that parameter groups of that name list; none where they list something else."""
        found: set[int] = set()
        for number in itertools.count():
            name = f"{groups}.{number}.params{own}"
            value = self.values.get(name)
            if value is None:
                long = name in self.pieces and self.pieces[name][0].raw == "list:<i8"
                return range(1 << 63) if long else found
            if not isinstance(value.coded, list) or any(type(parameter) is not int for parameter in value.coded):
                return ()
            found.update(value.coded)
        raise AssertionError
