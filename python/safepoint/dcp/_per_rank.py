"""Marking parts of a state dict, by name, as each rank's own."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from typing import Any

from safepoint._state import DATACLASS, DICT, LIST, STATEFUL, TUPLE, PerRank, kind_of

_WILD = re.compile(r"[*?\[]")


class PerRankNames:
    """Patterns of names as in `fnmatch`; `*` also matches dots. A pattern that matches a container means all of it."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._match = [re.compile(fnmatch.translate(pattern)).match for pattern in self.patterns]
        self._literal = [_WILD.split(pattern, maxsplit=1)[0] for pattern in self.patterns]

    def mark(self, state: Any) -> Any:
        """The state with what the patterns name wrapped into PerRank.

        Containers that may have such parts are copied, for the save only; of objects, their `state_dict()` is taken.
        """
        return self._mark(state, "") if self.patterns else state

    def _mark(self, value: Any, name: str) -> Any:
        if isinstance(value, PerRank):
            return value
        if name and any(match(name) for match in self._match):
            return PerRank(value)
        prefix = f"{name}." if name else ""
        if name and not any(literal.startswith(prefix) or prefix.startswith(literal) for literal in self._literal):
            return value
        kind = kind_of(value)
        if kind == STATEFUL:
            return self._mark(value.state_dict(), name)
        if kind in (LIST, TUPLE):
            children = [self._mark(child, f"{prefix}{index}") for index, child in enumerate(value)]
            return children if kind == LIST else tuple(children)
        if kind == DICT:
            return {key: self._mark(child, f"{prefix}{key}") for key, child in value.items()}
        if kind == DATACLASS:
            fields = [field.name for field in dataclasses.fields(value)]
            return {key: self._mark(getattr(value, key), f"{prefix}{key}") for key in fields}
        return value
