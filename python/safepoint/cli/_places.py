"""Where a verb finds steps: a daemon's memory (and what it knows of its durable tier), or a durable tier itself."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from safepoint import _core, errors
from safepoint._stored import StepUrl, open_step
from safepoint.cli._common import connect, the_namespace

if TYPE_CHECKING:
    from safepoint._reads import Pin

Store = Annotated[
    str | None,
    typer.Option(help="Read this durable tier (file:///path) instead of asking a daemon.", metavar="URL"),
]


class Place(Protocol):
    """What verbs that only read need."""

    def namespace(self, name: str | None) -> str:
        """`name`, or the only one there is."""

    def steps(self, namespace: str) -> list[_core.AttemptInfo]:
        """The newest first."""

    def open(self, namespace: str, *, step: int | None = None, attempt: bytes | None = None) -> Pin:
        """Of the newest step unless one is named."""


class _Daemon:
    def __init__(self, client: _core.Client) -> None:
        self._client = client

    def namespace(self, name: str | None) -> str:
        return the_namespace(self._client, name)

    def steps(self, namespace: str) -> list[_core.AttemptInfo]:
        return self._client.list_steps(namespace)

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
            raise errors.NotFound(f"{self.store.url} has no whole step of any namespace")
        raise errors.InvalidArgument("several namespaces: name one with --namespace: " + ", ".join(names[:20]))

    def steps(self, namespace: str) -> list[_core.AttemptInfo]:
        return [pin.info for _, pin in self.pins(namespace)]

    def pins(self, namespace: str) -> list[tuple[_core.StepName, _core.StoredPin]]:
        """The newest first; those that go away meanwhile are left out."""
        found = []
        for name in self.store.steps(namespace):
            with contextlib.suppress(errors.NotFound):
                found.append((name, self.store.open(name)))
        return sorted(found, key=lambda step: newest_first(step[1]))

    def open(self, namespace: str, *, step: int | None = None, attempt: bytes | None = None) -> Pin:
        return open_step(StepUrl(self.store.url, namespace, step, attempt))


def place(socket: str | None, store: str | None) -> Place:
    if store is None:
        return _Daemon(connect(socket))
    if socket is not None:
        raise errors.InvalidArgument("give --socket or --store, not both")
    return StorePlace(store)
