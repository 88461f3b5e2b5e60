"""Everything of a save but its copy, at many ranks: planning, and whatever the ranks say to each other."""

from __future__ import annotations

from typing import Any

from bench.launch import Failed, Run
from bench.summary import WARM_FROM, spread

RANKS = 8
TENSORS = 500
_STATE_BYTES = 1 << 20
_SECONDS = 300.0


def measure(system: str, saves: int) -> dict[str, Any]:
    """All ranks share this machine's cores. Of the ranks the slowest counts; `cpu` is the caller's thread alone."""
    result: dict[str, Any] = {"system": system, "ranks": RANKS, "tensors": TENSORS}
    try:
        with Run(system, RANKS, _STATE_BYTES, share_cores=True) as run:
            result["title"] = run.system.title
            told = run.start("planning", tensors=TENSORS, saves=saves).wait("planned", _SECONDS)
    except Failed as error:
        result["error"] = str(error)
        return result
    for name in ("blocked", "complete", "cpu"):
        slowest = [max(at) for at in zip(*(rank[name] for rank in told), strict=True)]
        result[name] = {"first": slowest[0], "later": spread(slowest[WARM_FROM:])}
    result["operations"] = sorted({name for rank in told for name in rank["operations"]})
    result["operation_count"] = sum(len(rank["operations"]) for rank in told)
    return result
