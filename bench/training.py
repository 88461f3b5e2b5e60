"""Training time lost per save: the cost that T_block hides when the rest of a save runs beside the training."""

from __future__ import annotations

from typing import Any

from bench.launch import Failed, Run, state_bytes
from bench.summary import spread

_SECONDS = 300.0


def measure(system: str, scale: float, pairs: int, segment: float) -> dict[str, Any]:
    """`segment`: seconds of training with and without a save in turns, `pairs` times."""
    result: dict[str, Any] = {"system": system, "bytes": state_bytes("large", 1, scale)}
    try:
        with Run(system, 1, result["bytes"]) as run:
            result["title"] = run.system.title
            group = run.start("training", scale=scale, pairs=pairs, segment=segment)
            told = group.wait("trained", _SECONDS)[0]
    except Failed as error:
        result["error"] = str(error)
        return result
    result["memcpy"] = told["memcpy"]
    result["loops"] = {
        name: {
            **loop,
            "lost_seconds": spread(loop["lost"]),
            "stood_seconds": spread(loop["stood"]),
            "noise_seconds": spread([abs(n) for n in loop["noise"]]),
        }
        for name, loop in told["loops"].items()
    }
    return result
