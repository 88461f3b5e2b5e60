"""The command `safepoint`: verbs, tables, --json, exit codes."""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Daemon
from typer.testing import CliRunner

import safepoint
from safepoint import _files

COMMAND = [sys.executable, "-c", "from safepoint.cli import main; main()"]


def run(daemon: Daemon, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [*COMMAND, *words, "--socket", daemon.socket], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


@pytest.fixture
def saved(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> safepoint.Checkpointer:
    monkeypatch.setenv("SAFEPOINT_SOCKET", daemon.socket)
    checkpointer = safepoint.Checkpointer("cli", rank=0, world_size=1)
    for step in (10, 20):
        checkpointer.save(step, {"model": {"w": torch.full((300_000,), float(step)), "b": torch.arange(7)}}).wait(
            "memory", timeout=20
        )
    return checkpointer


def test_status_ls_and_show(daemon: Daemon, saved: safepoint.Checkpointer) -> None:
    assert "cli" in run(daemon, "status").stdout
    status = json.loads(run(daemon, "status", "--json").stdout)
    assert status["namespaces"][0]["latest_step"] == 20
    assert [s["step"] for s in json.loads(run(daemon, "ls", "--json").stdout)] == [20, 10]
    assert "complete" in run(daemon, "ls").stdout
    shown = json.loads(run(daemon, "show", "20", "--json", "--tensors").stdout)
    assert shown["shards"][0]["tensors"]["model.w"]["shape"] == [300_000]
    assert "model.b" in run(daemon, "show", "20", "--tensors").stdout


def test_export_opens_with_safetensors_alone(daemon: Daemon, saved: safepoint.Checkpointer, tmp_path: Path) -> None:
    run(daemon, "export", str(tmp_path / "out"), "--step", "10")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "rank-0.safetensors")
    assert torch.equal(tensors["model.w"], torch.full((300_000,), 10.0)) and torch.equal(
        tensors["model.b"], torch.arange(7)
    )
    assert "exists" in run(daemon, "export", str(tmp_path / "out"), "--step", "10", code=2).stderr
    names = ("rank-0.safetensors", "safepoint-step.json")
    assert _files.check(tmp_path / "out") == sum((tmp_path / "out" / name).stat().st_size for name in names)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_verify_names_the_corrupt_block_and_exits_non_zero(daemon: Daemon, saved: safepoint.Checkpointer) -> None:
    """I-12: found, named, not listed any more; the other step is untouched."""
    assert "every block matches" in run(daemon, "verify").stdout
    # The slot of step 20 is the one that holds its bytes; flip the last byte of its first block through this process's
    # own mapping.
    pattern = torch.full((64,), 20.0).numpy().tobytes()
    hits = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:" not in line or "rw-s" not in line:
            continue
        begin, end = (int(x, 16) for x in line.split()[0].split("-"))
        at = begin + (1 << 20) - 4096
        if end - begin >= 1 << 20 and ctypes.string_at(at, len(pattern)) == pattern:
            ctypes.c_uint8.from_address(at).value ^= 1
            hits += 1
    assert hits == 1
    result = run(daemon, "verify", code=1)
    assert "step 20 rank 0 block 0" in result.stderr
    assert [s["step"] for s in json.loads(run(daemon, "ls", "--json").stdout) if s["state"] == "complete"] == [10]
    assert run(daemon, "verify", "--json", code=1).stdout  # Still bad news: the corrupt step is known.


def test_verify_of_a_running_job(
    daemon: Daemon, saved: safepoint.Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that the job's next save retires between the listing and the look at it is no news."""
    cli = importlib.import_module("safepoint.cli.main")  # The package has a function of that name.
    places = importlib.import_module("safepoint.cli._places")
    connect = places.connect

    class Late:
        """A client whose listing is older than the daemon's."""

        def __init__(self, socket: str | None) -> None:
            self._client = connect(socket)
            self._listed = self._client.list_steps("cli")
            saved.save(30, {"model": {"w": torch.zeros(10)}}).wait("memory", timeout=20)

        def list_steps(self, namespace: str) -> object:
            return self._listed

        def __getattr__(self, name: str) -> object:
            return getattr(self._client, name)

    monkeypatch.setattr(places, "connect", Late)
    result = CliRunner().invoke(cli.app, ["verify", "-n", "cli", "--socket", daemon.socket, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == [20]


def test_exit_codes(daemon: Daemon, saved: safepoint.Checkpointer, tmp_path: Path) -> None:
    assert "10" in run(daemon, "show", "11", code=1).stderr  # Not there: says what is.
    run(daemon, "show", "minus", code=2)
    gone = subprocess.run(
        [*COMMAND, "status", "--socket", str(tmp_path / "nobody")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert gone.returncode == 3 and "nobody" in gone.stderr
