"""What all verbs share: options, the connection, exit codes, JSON and table output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from safepoint import _connect, _core, errors

Socket = Annotated[
    str | None,
    typer.Option(help="The daemon's socket (default: SAFEPOINT_SOCKET, the node's daemon, this user's private one)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace (default: the only one).")]

EXIT_BAD_NEWS = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3

console = Console()
stderr = Console(stderr=True)


def connect(socket: str | None) -> _core.Client:
    """A client of the node's daemon. Never starts one: an operator asks about what is there."""
    return _core.Client(_connect.socket_path(socket), client_name="safepoint-cli", deadline=10.0)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


@contextmanager
def reported() -> Iterator[None]:
    """Errors of the library become one line on stderr and an exit code."""
    try:
        yield
    except errors.SafepointError as error:
        stderr.print(f"{type(error).__name__}: {error}", style="red", highlight=False, soft_wrap=True)
        unreachable = isinstance(error, errors.Unavailable | errors.DeadlineExceeded | errors.ProtocolError)
        usage = isinstance(error, errors.InvalidArgument)
        raise SystemExit(EXIT_UNAVAILABLE if unreachable else EXIT_USAGE if usage else EXIT_BAD_NEWS) from error


def progress_of_bytes(*, disable: bool) -> Progress:
    """What is done, how fast it goes and how long it takes yet, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr, disable=disable)


def human_bytes(count: int) -> str:
    """Binary units, three significant digits: ``1.50 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


@dataclass(frozen=True)
class Unreadable:
    """A step of a durable tier whose manifest or lineage cannot be read, as far as an AttemptInfo of it is known."""

    step: int
    attempt: bytes
    state: str  # corrupt; unreadable: it may be whole, but not for this user, or has more than can be read.
    reason: str
    generation: None = None
    try_number: None = None
    world_size: None = None
    sealed_ranks: None = None
    bytes: None = None
    level: str = "none"
    pinned: bool = False


def attempt_json(info: _core.AttemptInfo | Unreadable) -> dict[str, Any]:
    return {
        "step": info.step,
        "attempt": info.attempt.hex(),
        "generation": info.generation,
        "try": info.try_number,
        "world_size": info.world_size,
        "sealed_ranks": info.sealed_ranks,
        "bytes": info.bytes,
        "state": info.state,
        "level": info.level,
        "pinned": info.pinned,
        "reason": info.reason,
    }


def the_namespace(client: _core.Client, name: str | None) -> str:
    """``name``, or the only namespace there is."""
    if name is not None:
        return name
    names = [n.ns for n in client.list_namespaces()]
    if len(names) == 1:
        return names[0]
    if not names:
        raise errors.NotFound("the daemon knows no namespace of this user")
    raise errors.InvalidArgument("several namespaces: name one with --namespace: " + ", ".join(sorted(names)[:20]))
