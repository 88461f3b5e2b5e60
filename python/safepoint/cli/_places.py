"""Where a verb finds steps: a daemon's memory (and what it knows of its durable tier), or a durable tier itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Protocol, TypeAlias

import typer

from safepoint import _core, errors
from safepoint._stored import StepUrl, open_each, open_step
from safepoint.cli._common import Unreadable, connect, the_namespace

if TYPE_CHECKING:
    from safepoint._reads import Pin

Store = Annotated[
    str | None,
    typer.Option(help="Read this durable tier (file:///path) instead of asking a daemon.", metavar="URL"),
]

Listed: TypeAlias = "_core.AttemptInfo | Unreadable"


class Place(Protocol):
    """What verbs that only read need."""

    def namespace(self, name: str | None) -> str:
        """`name`, or the only one there is."""

    def steps(self, namespace: str, step: int | None = None) -> list[Listed]:
        """The newest first, then what cannot be read. `step`: only that one is looked at."""

    def open(self, namespace: str, *, step: int | None = None, attempt: bytes | None = None) -> Pin:
        """Of the newest step unless one is named."""


class _Daemon:
    def __init__(self, client: _core.Client) -> None:
        self._client = client

    def namespace(self, name: str | None) -> str:
        return the_namespace(self._client, name)

    def steps(self, namespace: str, step: int | None = None) -> list[Listed]:
        return [info for info in self._client.list_steps(namespace) if step in (None, info.step)]

    def open(self, namespace: str, *, step: int | None = None, attempt: bytes | None = None) -> Pin:
        return self._client.open_read(namespace, step=step, attempt=attempt)


def newest_first(pin: _core.StoredPin) -> tuple[int, int, int]:
    """A key to sort by. The newest step is that of the newest generation, as for a restore."""
    return (-pin.info.generation, -pin.info.step, -pin.info.try_number)


class StorePlace:
    """A durable tier. Its newest step is that of the newest generation, as for a restore."""

    def __init__(self, url: str) -> None:
        self.store = _core.Store(url)

    def namespaces(self) -> list[str]:
        return sorted({name.ns for name in self.store.steps()})

    def namespace(self, name: str | None) -> str:
        if name is not None:
            return name
        names = self.namespaces()
        if len(names) == 1:
            return names[0]
        if not names:
            raise self._nothing(None)
        raise errors.InvalidArgument("several namespaces: name one with --namespace: " + ", ".join(names[:20]))

    def steps(self, namespace: str, step: int | None = None) -> list[Listed]:
        return self._look(name for name in self.store.steps(namespace) if step in (None, name.step))

    def all_steps(self, namespace: str | None) -> dict[str, list[Listed]]:
        """Of one namespace, or of each there is. NotFound: none."""
        names = self.store.steps(namespace or "")  # Ascending by namespace.
        if not names:
            raise self._nothing(namespace)
        return {ns: self._look(own) for ns, own in itertools.groupby(names, lambda name: name.ns)}

    def _look(self, names: Iterable[_core.StepName]) -> list[Listed]:
        """Those that go away meanwhile are left out."""
        pins: list[_core.StoredPin] = []
        unreadable: list[Listed] = []
        for name, found in open_each(self.store, names):
            if isinstance(found, errors.SafepointError):
                state = "corrupt" if isinstance(found, errors.Corrupt | errors.Incomplete) else "unreadable"
                unreadable.append(Unreadable(name.step, name.attempt, state, str(found)))
            else:
                pins.append(found)
        return [*(pin.info for pin in sorted(pins, key=newest_first)), *reversed(unreadable)]

    def _nothing(self, namespace: str | None) -> errors.NotFound:
        of = "any namespace" if namespace is None else f"namespace {namespace}"
        return errors.NotFound(f"{self.store.url} has no whole step of {of}")

    def open(self, namespace: str, *, step: int | None = None, attempt: bytes | None = None) -> Pin:
        return open_step(StepUrl(self.store.url, namespace, step, attempt))


def place(socket: str | None, store: str | None) -> Place:
    if store is None:
        return _Daemon(connect(socket))
    if socket is not None:
        raise errors.InvalidArgument("give --socket or --store, not both")
    return StorePlace(store)
