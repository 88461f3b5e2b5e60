"""What an import reads: a state for `Checkpointer.save`, and the rule for values that are not plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from safepoint._objects import Decoder, Encoder, Json
from safepoint._plan import prepare
from safepoint._state import build, flatten
from safepoint.errors import Corrupt, InvalidArgument, NotPlain, ProtocolError


class Values:
    """The caller's choice for what is not plain: refuse it, leave it out (`skip`), or unpickle it (`allow_pickle`)."""

    def __init__(self, *, skip: bool, allow_pickle: bool) -> None:
        self.skip = skip
        self.allow_pickle = allow_pickle
        self.skipped: list[str] = []
        self._decoder = Decoder(allow_pickle)
        self._encoder = Encoder(allow_pickle)

    def decode(self, coded: Json, name: str) -> Any:
        """ProtocolError: no encoder wrote this. NotPlain: it was stored with pickle."""
        try:
            return self._decoder.decode(coded, name)
        except ArithmeticError as error:
            raise ProtocolError(f"{name}: stored value follows no known form: {error}") from error

    def refuse(self, name: str, error: NotPlain) -> None:
        """Notes that `name` is left out; raises the error where that was not asked for."""
        if not self.skip:
            raise error
        self.skipped.append(name)

    def check(self, value: object, name: str) -> None:
        """NotPlain: `Checkpointer.save` would refuse this value."""
        flat = flatten({"value": value})
        for part in flat.values:
            self._encoder.encode(part, name)
        try:
            prepare(flat, 0)
        except NotPlain as error:
            raise NotPlain(f"{name}: {error}") from error


@dataclass(slots=True)
class Loaded:
    """Parts of a state with their names and places."""

    leaves: list[tuple[Sequence[Json], Any]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def add(self, name: str, path: Sequence[Json], value: Any, *, per_rank: bool = False) -> None:
        """A per-rank part stands at the top, by its full name, under which a restore of that rank finds it."""
        if name in self.names:
            raise Corrupt(f"two parts have the name {name!r}")
        self.names.add(name)
        self.leaves.append(([name] if per_rank else path, value))

    def state(self, prefix: str) -> Any:
        """The nested state, below `prefix` (keys joined by dots) if there is one."""
        if not self.leaves:
            raise InvalidArgument("there is nothing to import")
        place = prefix.split(".") if prefix else []
        known = {_key(path) for path, _ in self.leaves}
        if len(known) < len(self.leaves):
            raise Corrupt("two of its parts have the same path")
        for path, _ in self.leaves:
            if any(_key(path[:depth]) in known for depth in range(len(path))):
                raise Corrupt(f"{list(path)} is below another part")
        try:
            return build([([*place, *path], value) for path, value in self.leaves])
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise Corrupt(f"the paths of its parts contradict each other: {error!r}") from error


def _key(path: Sequence[Json]) -> tuple[str, ...]:
    return tuple(map(repr, path))
