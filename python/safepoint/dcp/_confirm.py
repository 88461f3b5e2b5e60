"""Confirming a save from another process of the same user: torch's PROCESS mode runs the second half of `async_save` in
a child, and the lease is the trainer's.

The trainer listens on a socket that only holders of a random key can talk to; the key travels inside the pickled
writer, through torch's own pipe. Messages are JSON, never pickle.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any, NamedTuple

from safepoint import errors
from safepoint.errors import InternalError, SafepointError, Unavailable

if TYPE_CHECKING:
    from safepoint._save import Save

_log = logging.getLogger("safepoint")
_KEPT = 64  # Saves that can still be asked about.
_ANSWER_SECONDS = 60.0
_PAUSE_SECONDS = 0.05  # After a failed handshake.
_SLICE_SECONDS = 0.25  # How long one wait lasts before it is looked whether the interpreter ends.


class Ticket(NamedTuple):
    """What another process needs to confirm one save."""

    address: str
    key: bytes
    number: int


class _Desk:
    """Serves the tickets of this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._key = secrets.token_bytes(32)
        self._listener = Listener(None, "AF_UNIX", backlog=16, authkey=self._key)
        self._lock = threading.Lock()
        self._saves: dict[int, Save] = {}
        self._next = 0
        # A daemon thread: it waits in accept, for as long as the trainer lives, and never inside the extension.
        threading.Thread(target=self._accept, name="safepoint-confirm", daemon=True).start()

    def issue(self, save: Save) -> Ticket:
        with self._lock:
            self._next += 1
            self._saves[self._next] = save
            for old in list(self._saves)[:-_KEPT]:
                del self._saves[old]
            return Ticket(str(self._listener.address), self._key, self._next)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError, AuthenticationError) as error:  # A peer that gave up, or has no key.
                _log.debug("confirming a save: %s", error)
                time.sleep(_PAUSE_SECONDS)
                continue
            # Not a daemon thread: the interpreter must not end under a call into the extension.
            threading.Thread(target=self._serve, args=(connection,), name="safepoint-confirm", daemon=False).start()

    def _serve(self, connection: Connection[Any, Any]) -> None:
        with connection:
            try:
                while threading.main_thread().is_alive():
                    if connection.poll(_SLICE_SECONDS):
                        request = json.loads(connection.recv_bytes(1 << 16))
                        connection.send_bytes(json.dumps(self._answer(request)).encode())
            except (EOFError, OSError, ValueError) as error:
                if not isinstance(error, EOFError):
                    _log.warning("confirming a save: %s", error)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            save = self._saves.get(request["ticket"])
        if save is None:
            return {"error": "NotFound", "message": "this save is not known any more"}
        try:
            if request["call"] == "confirm":
                save.confirm()
                return {}
            if request["call"] == "refuse":
                save.refuse(str(request["reason"]))
                return {}
            level = request["level"]
            if level == "sealed":
                save.wait_sealed(timeout=_SLICE_SECONDS)
            else:
                level = save.wait(level, timeout=_SLICE_SECONDS)
            return {"level": level}
        except SafepointError as error:
            return {"error": type(error).__name__, "message": str(error)}


_lock = threading.Lock()
_desk: _Desk | None = None


def issue(save: Save) -> Ticket:
    """A ticket for a save of this process."""
    global _desk
    with _lock:
        if _desk is None or _desk.pid != os.getpid():
            _desk = _Desk()
        return _desk.issue(save)


class RemoteSave:
    """A save of the process that issued the ticket: what a writer needs of it, with the same meaning and errors."""

    def __init__(self, ticket: Ticket, step: int) -> None:
        self.step = step
        self._ticket = ticket
        try:
            self._connection = Client(ticket.address, "AF_UNIX", authkey=ticket.key)
        except (OSError, EOFError, AuthenticationError) as error:
            raise Unavailable(f"the trainer that staged step {step} cannot be asked: {error}") from error

    def close(self) -> None:
        self._connection.close()

    def confirm(self) -> None:
        self._ask(call="confirm")

    def refuse(self, reason: str) -> None:
        self._ask(call="refuse", reason=reason[:400])

    def wait_sealed(self, timeout: float | None = None) -> None:
        self._wait("sealed", timeout)

    def wait(self, level: str = "memory", timeout: float | None = None) -> str:
        return self._wait(level, timeout)

    def _wait(self, level: str, timeout: float | None) -> str:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return str(self._ask(call="wait", level=level)["level"])
            except errors.DeadlineExceeded:
                if end is not None and time.monotonic() >= end:
                    raise

    def _ask(self, **request: Any) -> dict[str, Any]:
        try:
            self._connection.send_bytes(json.dumps({"ticket": self._ticket.number, **request}).encode())
            if not self._connection.poll(_ANSWER_SECONDS):
                raise Unavailable(f"the trainer that staged step {self.step} does not answer")
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes(1 << 16))
        except (EOFError, OSError, ValueError) as error:
            raise Unavailable(f"the trainer that staged step {self.step} cannot be asked: {error}") from error
        if "error" in answer:
            kind = getattr(errors, answer["error"], InternalError)
            raise kind(answer["message"])
        return answer
