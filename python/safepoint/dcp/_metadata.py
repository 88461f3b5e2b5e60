"""A merged checkpoint as DCP's `Metadata`. Entries are made when they are asked for: thousands of them are dear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from safepoint._reads import stored_dtype
from safepoint._shard import Checkpoint, StoredPiece
from safepoint._state import element_text

_VALUE = BytesStorageMetadata()


class Entries(Mapping[str, BytesStorageMetadata | TensorStorageMetadata]):
    """`Metadata.state_dict_metadata`.

    Iterates over the names of the stored leaves. Also answers for containers, which DCP sees as one value where it does
    not walk them (tuples), and for parts of stored values, where it does (counters).
    """

    def __init__(self, stored: Checkpoint, rank: int, *, chunks: bool) -> None:
        """`chunks`: list where the pieces lie, so that DCP's planner reshards."""
        self._stored = stored
        self._rank = rank
        self._chunks = chunks
        self._made: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}
        self._names: dict[str, str] | None = None  # As DCP sees it -> as stored.
        self._containers: set[str] | None = None

    def names(self) -> dict[str, str]:
        if self._names is None:
            owned = self._stored.owned()
            self._names = {}
            for name in (*self._stored.pieces, *self._stored.values):
                base, rank = owned.get(name, (name, self._rank))
                # Another rank's own part: the name is known, and whoever has no such part keeps what it has.
                if rank == self._rank:
                    self._names[base] = name
                else:
                    self._names.setdefault(base, name)
        return self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._stored.pieces or self._known(name))

    def _known(self, name: str) -> bool:
        if name in self.names() or name in self.containers():
            return True
        while name := name.rpartition(".")[0]:
            if name in self.names():
                return self.names()[name] in self._stored.values
        return False

    def containers(self) -> set[str]:
        if self._containers is None:
            self._containers = set()
            for name in self.names():
                while (name := name.rpartition(".")[0]) and name not in self._containers:
                    self._containers.add(name)
        return self._containers

    def __getitem__(self, name: str) -> BytesStorageMetadata | TensorStorageMetadata:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._make(name)
        return made

    def _make(self, name: str) -> BytesStorageMetadata | TensorStorageMetadata:
        stored = name if name in self._stored.pieces else self.names().get(name)
        if stored is None and not self._known(name):
            raise KeyError(name)
        pieces = self._stored.pieces.get(stored) if stored is not None else None
        if not pieces or (stored != name and stored != f"{name}@{self._rank}"):
            return _VALUE
        dtype = stored_dtype(pieces[0])
        if dtype is None:
            return _VALUE  # An array of numpy's, or bytes.
        return TensorStorageMetadata(
            TensorProperties(dtype=dtype),
            torch.Size(pieces[0].global_shape),
            [_chunk(piece) for piece in pieces] if self._chunks else [],
        )


def _chunk(piece: StoredPiece) -> ChunkStorageMetadata:
    offsets = (0,) * len(piece.shape) if piece.offsets is None else piece.offsets
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(piece.shape))


class _Paths(Mapping[str, tuple[str | int, ...]]):
    """`Metadata.planner_data`: the path of each name in a nested state, as DCP writes it."""

    def __init__(self, stored: Checkpoint, entries: Entries) -> None:
        self._stored = stored
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> tuple[str | int, ...]:
        stored = self._entries.names()[name]
        value = self._stored.values.get(stored)
        path: Sequence[Any] = value.path if value is not None else self._stored.path_of(stored)
        if value is None and self._stored.pieces[stored][0].path is None:
            path = name.split(".")
        return tuple(e[0] if isinstance(e, list) and len(e) == 1 else element_text(e) for e in path)


def make_metadata(stored: Checkpoint, rank: int, *, chunks: bool) -> Metadata:
    entries = Entries(stored, rank, chunks=chunks)
    return Metadata(entries, planner_data=_Paths(stored, entries))  # type: ignore[arg-type]
