"""safepoint._files: a published folder is there whole and checked, or not at all (F1, F51, I-1)."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from safepoint import Corrupt, InvalidArgument, NotFound, ProtocolError, _files

CONTENT = {"rank-0.safetensors": b"a" * 3_000_000, "rank-1.safetensors": b"", "sub/deep/x": b"x"}
# What publish asks of the operating system, as the module calls it: each fails once, and at each the process dies once.
CALLS = ("fsync", "rename", "open", "mkdir")


def fill(folder: Path) -> None:
    (folder / "sub" / "deep").mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def publish(target: Path) -> None:
    with _files.publish(target) as folder:
        fill(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def is_whole(folder: Path) -> bool:
    """As written, every byte; and `check` agrees."""
    found = content(folder)
    found.pop(_files.CHECKSUMS)
    assert found == CONTENT
    return _files.check(folder) == sum(map(len, CONTENT.values()))


class Calls:
    """Counts the module's calls of the operating system; `act` runs before call number `at` (from 1)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None, act: Callable[[str], None]) -> None:
        self.log: list[tuple[str, str]] = []
        for name in CALLS:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name), at, act))

    def _wrapped(self, name: str, call: Callable[..., Any], at: int | None, act: Callable[[str], None]) -> Any:
        def wrapper(first: Any, *rest: Any, **more: Any) -> Any:
            what = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else os.fspath(first)
            self.log.append((name, what))
            if at == len(self.log):
                act(name)
            return call(first, *rest, **more)

        return wrapper


def refuse(name: str) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), name)


def number_of_calls(tmp_path: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, None, refuse)
        publish(tmp_path / "counted" / "new" / "x")
    return len(calls.log)


def test_publishes_and_checks(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "step-1"
    publish(target)
    assert is_whole(target)
    assert os.listdir(target.parent) == ["step-1"]


def test_an_empty_folder_is_replaced_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    full.mkdir()
    (full / "mine").touch()
    file.write_text("mine")
    (tmp_path / "link").symlink_to(empty)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    for target in (full, file):
        with pytest.raises(InvalidArgument, match="exists"):
            publish(target)
    publish(tmp_path / "link")  # A link is followed.
    publish(tmp_path / "dangling")
    assert is_whole(empty) and is_whole(tmp_path / "new") and (full / "mine").exists() and file.read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InvalidArgument, match="working directory"):
        publish(Path())


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), _files.publish(tmp_path / "x") as folder:
        fill(folder)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_of_two_writers_of_one_target_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument), _files.publish(tmp_path / "x") as folder:
        fill(folder)
        publish(tmp_path / "x")
    assert is_whole(tmp_path / "x") and os.listdir(tmp_path) == ["x"]


def test_a_target_filled_at_the_last_moment_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename itself refuses; no look before it could."""
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "mine").touch()
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(InvalidArgument, match="somebody else"):
        publish(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["mine"]


def test_only_what_is_on_disk_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I-1: a power failure takes no byte of a published folder. Every file and folder in it is fsynced before the
    rename, and the parent after it; new parents are made durable, too."""
    calls = Calls(monkeypatch, None, refuse)
    publish(tmp_path / "new" / "x")
    log = calls.log
    renamed = next(n for n, (name, _) in enumerate(log) if name == "rename")
    partial = log[renamed][1]
    synced = {what for name, what in log[:renamed] if name == "fsync"}
    target = tmp_path / "new" / "x"
    files = {f"{partial}/{p.relative_to(target)}" for p in target.rglob("*") if p.is_file()}
    folders = {partial, *(f"{partial}/{p.relative_to(target)}" for p in target.rglob("*") if p.is_dir())}
    assert len(files) == len(CONTENT) + 1 and len(folders) == 3
    assert files | folders <= synced
    assert str(tmp_path) in synced  # Holds the name of the new parent.
    last_file = max(n for n, (name, what) in enumerate(log) if name == "fsync" and what in files)
    assert last_file < min(n for n, (name, what) in enumerate(log) if name == "fsync" and what in folders)
    assert ("fsync", str(tmp_path / "new")) in log[renamed + 1 :]


def test_every_call_fails_once(tmp_path: Path) -> None:
    """F51: an error is told, and leaves the target as it was, or (at the last fsync) whole; never a leftover."""
    count = number_of_calls(tmp_path)
    assert count > 15
    whole = 0
    for at in range(1, count + 1):
        parent = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            Calls(patch, at, refuse)
            publish(parent / "new" / "x")
        left = [p.name for p in (parent / "new").iterdir()] if (parent / "new").exists() else []
        if left == ["x"]:
            whole += is_whole(parent / "new" / "x")
        else:
            # A partial folder that could not even be opened is all that may stay, until the next time.
            assert len(left) <= 1 and all(_files._PARTIAL.fullmatch(name) for name in left), (at, left)
            publish(parent / "new" / "x")
            assert os.listdir(parent / "new") == ["x"]
    assert whole == 2  # Opening the parent for its fsync, and the fsync.


@pytest.fixture
def killed_writer(tmp_path: Path) -> Iterator[Callable[[Path, int], bool]]:
    """Runs `publish` in a forked process that SIGKILLs itself before call number `at`; False: it came to its end."""

    def run(target: Path, at: int) -> bool:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with pytest.MonkeyPatch.context() as patch:
                    Calls(patch, at, lambda _: os.kill(os.getpid(), signal.SIGKILL))
                    publish(target)
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)

    yield run


def test_a_kill_at_every_call(tmp_path: Path, killed_writer: Callable[[Path, int], bool]) -> None:
    """F1: after a kill before any call the target is whole or not there, and the next writer clears up."""
    at, states = 0, set()
    while True:
        at += 1
        parent = tmp_path / str(at)
        parent.mkdir()
        if not killed_writer(parent / "x", at):
            break
        states.add((parent / "x").exists())
        if (parent / "x").exists():
            assert is_whole(parent / "x")
        publish(parent / "y")
        assert is_whole(parent / "y")
        assert set(os.listdir(parent)) <= {"x", "y"}
    assert states == {False, True}


def test_a_living_writer_keeps_its_partial_folder(tmp_path: Path) -> None:
    """A sweep removes what the dead left, and only that: not what a living process writes, not what others own."""
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from safepoint import _files\n"
            "with _files.publish(Path(sys.argv[1])) as folder:\n"
            "    (folder / 'f').write_text('f'); print('writing', flush=True); sys.stdin.readline()\n",
            str(tmp_path / "alive"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout and writer.stdin
    assert writer.stdout.readline() == "writing\n"
    dead = tmp_path / ".safepoint-partial-0123456789abcdef"
    (dead / "sub").mkdir(parents=True)
    (tmp_path / ".safepoint-partial-mine").mkdir()
    (tmp_path / ".safepoint-partial-0123456789abcdee").write_text("a file, not a folder")
    publish(tmp_path / "other")
    assert not dead.exists() and (tmp_path / ".safepoint-partial-mine").exists()
    writer.communicate("\n", timeout=30)
    assert writer.returncode == 0 and (tmp_path / "alive" / "f").read_text() == "f"
    assert _files.check(tmp_path / "alive") == 1


def test_check_finds_every_kind_of_damage(tmp_path: Path) -> None:
    """I-8: never a wrong byte without an error."""
    target = tmp_path / "x"
    publish(target)
    name, listing = target / "rank-0.safetensors", target / _files.CHECKSUMS
    good, good_list = name.read_bytes(), listing.read_text()

    def damaged(match: str) -> None:
        with pytest.raises(Corrupt, match=match):
            _files.check(target)
        name.write_bytes(good)
        listing.write_text(good_list)
        assert is_whole(target)

    name.write_bytes(good[:-1] + b"b")
    damaged("CRC32C")
    name.write_bytes(good[: len(good) // 2])
    damaged("1500000 bytes")
    name.unlink()
    damaged("missing")
    for text in ("", good_list[: len(good_list) // 2], "[]", '{"version": 1}', '{"version": 1, "files": {"x": 1}}'):
        listing.write_text(text)
        damaged("damaged")
    for outside in ("../x/rank-0.safetensors", "/etc/hosts"):
        listing.write_text(good_list.replace("rank-0.safetensors", outside))
        damaged("outside")
    listing.write_text(json.dumps({"version": 2}))
    with pytest.raises(ProtocolError, match="version 2"):
        _files.check(target)
    listing.unlink()
    with pytest.raises(NotFound, match="not published"):
        _files.check(target)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="neither"), _files.publish(tmp_path / "x") as folder:
        (folder / "link").symlink_to("/etc/hosts")
    assert os.listdir(tmp_path) == []
