"""Which daemon to talk to: the one that SAFEPOINT_SOCKET names, else the node's, else a private one of this user, which
is started if need be.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safepoint.errors import Denied, Unavailable

if TYPE_CHECKING:
    from safepoint._core import Client, StartOptions

_log = logging.getLogger("safepoint")

NODE_SOCKET = "/run/safepoint/safepointd.sock"


@dataclass(frozen=True)
class Endpoint:
    """A socket, and how to start the daemon behind it (None: it is somebody else's to start)."""

    socket: str
    daemon: str | None = None
    arguments: tuple[str, ...] = ()
    lock: str = ""
    log: str = ""


def _private_directory(path: Path) -> Path:
    """Makes the directory, for this user alone. Denied: it is there and somebody else could change it."""
    try:
        path.mkdir(mode=0o700, parents=False, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise Unavailable(f"cannot make the directory {path} for the private daemon: {error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Denied(f"{path} must be a directory that only this user can open (mode 0700)")
    return path


def _state_directory(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_STATE_HOME", "")
    # The standard says to ignore a relative path there.
    root = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".local" / "state"
    path = root / "safepoint"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"cannot make the directory {path} for the private daemon: {error}") from error
    return path


def daemon_path(environment: Mapping[str, str] = os.environ) -> str:
    return environment.get("SAFEPOINT_DAEMON") or str(Path(__file__).parent / "bin" / "safepointd")


def find_endpoint(
    environment: Mapping[str, str] = os.environ, *, start: bool = True, node_socket: str = NODE_SOCKET
) -> Endpoint:
    """Decides which daemon to use; touches nothing but the private directories.

    `start`: a private daemon may be started.
    """
    named = environment.get("SAFEPOINT_SOCKET")
    if named:
        return Endpoint(named)
    if os.path.exists(node_socket):
        return Endpoint(node_socket)
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.path.isdir(runtime):
        directory = Path(runtime) / "safepoint"
    else:
        directory = Path(environment.get("TMPDIR") or "/tmp") / f"safepoint-{os.getuid()}"
    socket = directory / "safepointd.sock"
    if not start or environment.get("SAFEPOINT_START") == "0":
        return Endpoint(str(socket))
    _private_directory(directory)
    arguments = [
        "--private",
        "--socket",
        str(socket),
        "--state-dir",
        str(_state_directory(environment)),
        "--http",
        "off",
    ]
    return Endpoint(
        str(socket),
        daemon_path(environment),
        tuple(arguments),
        str(directory / "start.lock"),
        str(directory / "safepointd.log"),
    )


def socket_path(given: str | None = None) -> str:
    """The socket that a tool which never starts a daemon should ask: `given`, else as for `open_client`."""
    return given or find_endpoint(start=False).socket


def open_client(name: str, *, start: bool = True, deadline: float = 30.0) -> Client:
    """A session with the daemon.

    Unavailable names the socket where nobody listens; Denied, a directory that others could change.
    """
    # The extension is loaded here, so that what only looks at states and headers works without it.
    from safepoint import _core

    endpoint = find_endpoint(start=start)
    options: StartOptions | None = None
    if endpoint.daemon is not None:
        options = _core.StartOptions(
            daemon_path=endpoint.daemon,
            arguments=list(endpoint.arguments),
            lock_path=endpoint.lock,
            log_path=endpoint.log,
        )
    try:
        client = _core.Client(endpoint.socket, client_name=name, start=options, deadline=deadline)
    except Unavailable as error:
        if options is None and start and os.environ.get("SAFEPOINT_START") == "0":
            raise Unavailable(
                f"{error} (SAFEPOINT_START=0 forbids starting a private daemon at {endpoint.socket})"
            ) from error
        raise
    if client.started_daemon:
        idle = os.environ.get("SAFEPOINTD_IDLE_EXIT", "5 minutes")
        holding = os.environ.get("SAFEPOINTD_IDLE_EXIT_HOLDING", "24 hours")
        _log.info(
            "started a private daemon (process %d, socket %s, log %s); without clients it stays %s when it holds "
            "nothing and %s when it holds steps (SAFEPOINTD_IDLE_EXIT, SAFEPOINTD_IDLE_EXIT_HOLDING)",
            client.daemon.pid,
            endpoint.socket,
            endpoint.log,
            idle,
            holding,
        )
    return client
