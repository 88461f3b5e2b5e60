"""Hundreds of SIGKILL rounds in CI; any number by hand (see kill_rounds.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_kill_rounds_lose_mix_and_leak_nothing() -> None:
    """I-1, I-2, I-4 to I-8, I-25, I-28, I-31; F1, F2, F4, F13, F14."""
    script = Path(__file__).with_name("kill_rounds.py")
    result = subprocess.run(
        [sys.executable, str(script), "--rounds", "250"], capture_output=True, text=True, timeout=900, check=False
    )
    print(result.stdout[-4000:])
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
