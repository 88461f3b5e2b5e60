"""From samples to figures: multiples of the run's own yardstick; of several ranks the slowest counts."""

from __future__ import annotations

import statistics
from typing import Any

Figure = dict[str, float]
# The first save is shown apart. So is the second: what a system makes ready after the first one (slots, another staging
# buffer) can still be in the making, as saves follow each other here within a second.
WARM_FROM = 2


def spread(values: list[float]) -> Figure:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(cell: dict[str, Any]) -> dict[str, Any]:
    """`T_x`: seconds and multiples of the warm saves, and the first two apart."""
    saves = cell["saves"]
    size = sum(rank["bytes"] for rank in saves)
    yards = [statistics.median(rank["samples"]["yardstick"]) for rank in saves]
    result: dict[str, Any] = {"bytes": size, "tensors": sum(r["tensors"] for r in saves), "memcpy": max(yards)}
    for name in ("T_block", "T_safe", "T_mem"):
        seconds = [max(at) for at in zip(*(rank["samples"][name] for rank in saves), strict=True)]
        result[name] = _times(seconds, _multiples(saves, name, yards))
    result["T_mem - T_safe"] = _difference(saves, "T_mem", "T_safe")
    result["T_safe - copy"] = _difference(saves, "T_safe", "copy")
    result["T_rec"] = _recovery(cell["loads"])
    result["memory_beyond_x"] = cell["memory_beyond"] / size
    return result


def _difference(saves: list[dict[str, Any]], later: str, earlier: str) -> Figure:
    """Seconds between two times of the same save; warm ones."""
    gaps = [[b - a for a, b in zip(rank["samples"][earlier], rank["samples"][later], strict=True)] for rank in saves]
    return spread([max(at) for at in zip(*gaps, strict=True)][WARM_FROM:])


def _multiples(saves: list[dict[str, Any]], name: str, yards: list[float]) -> list[float]:
    """Of each save, on the rank where it took longest for its yardstick."""
    return [
        max(time / yard for time, yard in zip(at, yards, strict=True))
        for at in zip(*(rank["samples"][name] for rank in saves), strict=True)
    ]


def _times(seconds: list[float], multiples: list[float]) -> dict[str, Any]:
    return {
        "first": {"seconds": seconds[0], "x": multiples[0]},
        "second": {"seconds": seconds[1], "x": multiples[1]},
        "seconds": spread(seconds[WARM_FROM:]),
        "x": spread(multiples[WARM_FROM:]),
        "first_to_warm": seconds[0] / statistics.median(seconds[WARM_FROM:]),
    }


def _recovery(loads: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The first load of each fresh process counts; `again` is the second one in the same process."""
    seconds, multiples, again = [], [], []
    for ranks in loads:
        yards = [statistics.median(rank["samples"]["yardstick"]) for rank in ranks]
        times = [rank["samples"]["T_rec"] for rank in ranks]
        seconds.append(max(t[0] for t in times))
        multiples.append(max(t[0] / yard for t, yard in zip(times, yards, strict=True)))
        again.append(max(t[1] / yard for t, yard in zip(times, yards, strict=True)))
    return {"seconds": spread(seconds), "x": spread(multiples), "again": spread(again)}
