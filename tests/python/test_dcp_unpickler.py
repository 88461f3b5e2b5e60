"""I-39: saving and loading unpickle nothing, with any front end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed


def test_no_unpickler_in_any_front_end(namespace: str) -> None:
    """Native, `safepoint.dcp` and torch's functions with our writer and reader; a module, an optimizer and every kind
    of value. The poison catches the unpickler of C, too, and what it met counts where an exception is swallowed.

    torch's functions are given no process group here: with one they send each other their (empty) plans as pickles,
    even one rank to itself. What is in those: tests/process/test_dcp_layouts.py.
    """
    assert not torch.distributed.is_initialized()
    doors = ["native", "ours", "torchs", "planned", "grouped"]
    program = str(Path(__file__).parent / "no_unpickler.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", program, namespace, *doors],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert done.stdout.split() == [word for door in doors for word in (door, "0")]
