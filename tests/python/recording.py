"""A writer and a reader that note each call of torch's, the trainer's or a background thread's or process's.

Lines go to the file in RECORDING: torch's PROCESS mode makes the second half of the calls in another process, which
gets the writer as a pickle and the environment as it was.
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safepoint import dcp

Call = tuple[str, str, Any]  # Method, where, and what matters of its arguments.

STAGER = ("stage", "synchronize_staging", "close")
STORAGE = ("reset", "storage_meta", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data",
           "finish")  # fmt: skip
READER = ("reset", "read_metadata", "set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data")


def _where() -> str:
    process, thread = map(int, os.environ["RECORDING_CALLER"].split())
    if os.getpid() != process:
        return "process"
    return "caller" if threading.get_ident() == thread else "thread"


def note(name: str, detail: Any = None) -> None:
    line = json.dumps([name, _where(), detail]) + "\n"
    with open(os.environ["RECORDING"], "a") as file:
        file.write(line)  # Short and appended: lines of two processes do not mix.


def _detail(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name.startswith("set_up"):
        keywords = dict(kwargs)
        return [keywords.pop("is_coordinator", args[-1] if args else None), keywords]
    if name == "reset":
        return str(args[0] if args else kwargs.get("checkpoint_id"))
    return sorted(kwargs) if name == "read_metadata" else None


def _recorded(cls: type[Any], names: tuple[str, ...]) -> None:
    for name in names:
        original: Callable[..., Any] = getattr(cls, name)

        # torch looks for a parameter that is called `kwargs`, in the signature, which `wraps` keeps.
        @functools.wraps(original)
        def method(self: Any, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            note(_name, _detail(_name, args, kwargs))
            return _original(self, *args, **kwargs)

        setattr(cls, name, method)


class Writer(dcp.Writer):
    """Notes what torch's `save` and `async_save` call."""

    def should(self) -> bool:
        note("should_synchronize_after_execute")
        return self._synchronize_after_execute

    should_synchronize_after_execute = property(should)  # type: ignore[assignment]


class Reader(dcp.Reader):
    """Notes what torch's `load` calls."""


class WithFuture(Writer):
    """`stage` hands torch a future of the empty dict."""

    def stage(self, state_dict: dict[str, Any]) -> Any:
        future: Future[dict[str, Any]] = Future()
        future.set_result(super().stage(state_dict))
        return future


class Synchronising(Writer):
    """Asks to be waited for: `synchronize_staging` is called, in the trainer's thread."""

    def should(self) -> bool:
        note("should_synchronize_after_execute")
        return True

    should_synchronize_after_execute = property(should)  # type: ignore[assignment]


_recorded(Writer, STAGER + STORAGE)
_recorded(Reader, READER)


@contextmanager
def recording(path: Path) -> Iterator[Callable[[], list[Call]]]:
    """From here on calls are noted in `path`; the caller is this thread. Gives a function that reads what was noted."""
    os.environ["RECORDING"] = str(path)
    os.environ["RECORDING_CALLER"] = f"{os.getpid()} {threading.get_ident()}"
    path.unlink(missing_ok=True)
    try:
        yield lambda: [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    finally:
        del os.environ["RECORDING"], os.environ["RECORDING_CALLER"]


def by_place(calls: list[Call]) -> dict[str, list[str]]:
    """The names in order, for each place: what two threads do at once has no order."""
    places: dict[str, list[str]] = {}
    for name, where, _ in calls:
        places.setdefault(where, []).append(name)
    return places
