"""The command ``safepoint``: what an operator asks a daemon. A thin caller of the client library; every command has
``--json``.

Exit codes: 0 done; 1 the answer is bad news (corrupt, lost, not found); 2 wrong usage; 3 nobody could be asked.
"""

from __future__ import annotations

from safepoint.cli.main import app, main

__all__ = ["app", "main"]
