"""The figures that safepoint is held to: measured, goal, reached or not, best seen elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.scenarios import TITLES

_MIB = 1 << 20
# Best of the other systems, each measured on two cores with the same scenarios before this benchmark existed.
_ELSEWHERE = {
    "T_block": {"large": "0–9 ms", "small": "14–413 ms"},
    "T_safe": {"large": "0.9x, no checksum", "small": "3.1x, no checksum"},
    "T_safe torch": {"large": "0.9x", "small": "4.9x"},
    "python": "100 ms DLRover, 0.6 s DCP, 1.4 s AWS",
    "matmul": "340 ms DLRover, 1.3 s DCP, 2.1 s AWS",
    "gap": "0 DLRover, else 0.3–4 s",
    "T_rec": {"large": "1.4x, unverified", "small": "2.9x, unverified"},
    "T_rec dcp": {"large": "7.7x", "small": "21x"},
    "first": "1.1x–30x",
    "memory": "1.2x for one unprotected step, DCP 4x, AWS 5x",
    "planning": "124–594 ms",
}


@dataclass(frozen=True)
class Row:
    what: str
    case: str
    measured: str
    goal: str
    reached: bool | None  # None: no goal for this case, or no measurement.
    elsewhere: str = ""


class Results:
    """Looks into the results of a run."""

    def __init__(self, results: dict[str, Any]) -> None:
        self._results = results

    def cell(self, system: str, scenario: str, *, one_core: bool = False) -> dict[str, Any] | None:
        for cell in self._results["cells"]:
            key = (cell["system"], cell["scenario"], cell["ranks"], cell["one_core"])
            if key == (system, scenario, 1, one_core) and "error" not in cell:
                found: dict[str, Any] = cell
                return found
        return None

    def other(self, kind: str, system: str) -> dict[str, Any] | None:
        for entry in self._results[kind]:
            if entry["system"] == system and "error" not in entry:
                found: dict[str, Any] = entry
                return found
        return None


def multiple(figure: dict[str, float]) -> str:
    return f"{figure['median']:.2f}x ({figure['min']:.2f}–{figure['max']:.2f})"


def milliseconds(figure: dict[str, float]) -> str:
    digits = 1 if figure["median"] < 0.1 else 0
    low, middle, high = (f"{1e3 * figure[k]:.{digits}f}" for k in ("min", "median", "max"))
    return f"{middle} ms ({low}–{high})"


def rows(results: dict[str, Any]) -> list[Row]:
    found = Results(results)
    return [
        *_guarded(found),
        *_safe(found),
        *_own_dcp(found),
        *_training(found),
        *_gap(found),
        *_recovery(found),
        *_first(found),
        *_memory(found),
        *_planning(found),
    ]


def _row(
    what: str,
    case: str,
    cell: dict[str, Any] | None,
    judge: Callable[[dict[str, Any]], tuple[str, bool | None]],
    goal: str,
    elsewhere: str | dict[str, str],
    scenario: str = "",
) -> Row:
    text = elsewhere if isinstance(elsewhere, str) else elsewhere.get(scenario, "")
    if cell is None:
        return Row(what, case, "not measured", goal, None, text)
    measured, reached = judge(cell)
    return Row(what, case, measured, goal, reached, text)


def _times(name: str, limit: float) -> Callable[[dict[str, Any]], tuple[str, bool]]:
    return lambda cell: (multiple(cell[name]["x"]), cell[name]["x"]["median"] <= limit)


def _guarded(found: Results) -> list[Row]:
    def judge(cell: dict[str, Any]) -> tuple[str, bool]:
        seconds = cell["T_block"]["seconds"]
        return milliseconds(seconds), seconds["median"] <= 2e-3 + 1e-6 * cell["tensors"]

    rows = []
    for scenario in TITLES:
        cell = found.cell("safepoint-guarded", scenario)
        goal = "2 ms + 1 µs per tensor" + (f" = {2 + cell['tensors'] / 1e3:.1f} ms" if cell else "")
        rows.append(_row("T_block, guarded", TITLES[scenario], cell, judge, goal, _ELSEWHERE["T_block"], scenario))
    return rows


def _safe(found: Results) -> list[Row]:
    rows = []
    what = "T_safe, blocking, checksums"
    for one_core, limits, threads in (
        (True, {"large": 1.0, "small": 1.1}, "one copy thread"),
        (False, {"large": 0.6, "small": 0.6, "gpt": 0.6}, "two copy threads"),
    ):
        for scenario, limit in limits.items():
            cell = found.cell("safepoint", scenario, one_core=one_core)
            case = f"{TITLES[scenario]}, {threads}"
            judge = _times("T_safe", limit)
            rows.append(_row(what, case, cell, judge, f"{limit}x", _ELSEWHERE["T_safe"], scenario))
    what = "T_safe, torch's async_save, our writer"
    for scenario, limit in {"large": 1.1, "small": 1.3}.items():
        cell = found.cell("safepoint-torch", scenario)
        judge = _times("T_safe", limit)
        rows.append(_row(what, TITLES[scenario], cell, judge, f"{limit}x", _ELSEWHERE["T_safe torch"], scenario))
    return rows


def _own_dcp(found: Results) -> list[Row]:
    """What each spends beside its copy is compared: the copies' own difference between two runs is larger than that."""
    rows = []
    for scenario in TITLES:
        native = found.cell("safepoint", scenario)

        def judge(cell: dict[str, Any], native: dict[str, Any] | None = native) -> tuple[str, bool | None]:
            ours = cell["T_safe - copy"]["median"]
            if native is None:
                return f"{1e3 * ours:.1f} ms beside the copy", None
            theirs = native["T_safe - copy"]["median"]
            text = f"{1e3 * (ours - theirs):+.1f} ms ({1e3 * ours:.1f} against {1e3 * theirs:.1f} beside the copy)"
            return text, ours - theirs <= 3e-3

        cell = found.cell("safepoint.dcp", scenario)
        rows.append(_row("safepoint.dcp.async_save", TITLES[scenario], cell, judge, "native + 3 ms", "–"))
    return rows


def _training(found: Results) -> list[Row]:
    rows = []
    for loop, name in (("python", "Python-heavy loop"), ("matmul", "matmul on all cores")):
        for system in ("safepoint-guarded", "safepoint", "safepoint.dcp"):

            def judge(entry: dict[str, Any], loop: str = loop) -> tuple[str, bool | None]:
                lost = entry["loops"][loop]["lost_seconds"]
                noise = entry["loops"][loop]["noise_seconds"]["median"]
                limit = 10e-3 if loop == "python" else entry["memcpy"]
                text = f"{milliseconds(lost)}, noise {1e3 * noise:.0f} ms"
                if stood := entry["loops"][loop].get("stood_seconds"):  # Results of an older benchmark have none.
                    text += f", stood still {1e3 * stood['median']:.0f} ms"
                error = noise / 2  # Of a median over some six pairs, each as uncertain as the noise.
                if abs(lost["median"] - limit) < error:
                    return text + ": undecided", None
                return text, lost["median"] <= limit

            entry = found.other("training", system)
            title = entry["title"] if entry else system
            goal = "10 ms" if loop == "python" else "one memcpy"
            if entry and loop == "matmul":
                goal += f" = {1e3 * entry['memcpy']:.0f} ms"
            what = f"training lost per save of {entry['bytes'] / 1e9:.1f} GB" if entry else "training lost per save"
            rows.append(_row(what, f"{name}, {title}", entry, judge, goal, _ELSEWHERE[loop]))
    return rows


def _gap(found: Results) -> list[Row]:
    def judge(cell: dict[str, Any]) -> tuple[str, bool]:
        gap = cell["T_mem - T_safe"]
        return milliseconds(gap), gap["median"] <= 2e-3

    return [
        _row("T_mem – T_safe", TITLES[scenario], found.cell("safepoint", scenario), judge, "2 ms", _ELSEWHERE["gap"])
        for scenario in TITLES
    ]


def _recovery(found: Results) -> list[Row]:
    rows = []
    for system, what, limits, elsewhere in (
        ("safepoint", "T_rec, native, same layout", {"large": 1.15, "small": 1.3}, "T_rec"),
        ("safepoint-torch", "T_rec, torch's dcp.load, our reader", {"large": 1.2, "small": 2.5}, "T_rec dcp"),
        ("safepoint.dcp", "T_rec, safepoint.dcp.load", {"large": 1.2, "small": 2.5}, "T_rec dcp"),
    ):
        for scenario, limit in limits.items():
            judge = _times("T_rec", limit)
            cell = found.cell(system, scenario)
            rows.append(_row(what, TITLES[scenario], cell, judge, f"{limit}x", _ELSEWHERE[elsewhere], scenario))
    return rows


def _first(found: Results) -> list[Row]:
    def judge(cell: dict[str, Any]) -> tuple[str, bool]:
        ratio = cell["T_safe"]["first_to_warm"]
        return f"{ratio:.2f}x", ratio <= 1.5

    return [
        _row(
            "first save / warm save",
            f"{TITLES[scenario]}, {title}",
            found.cell(system, scenario),
            judge,
            "1.5x",
            _ELSEWHERE["first"],
        )
        for system, title in (("safepoint", "size_hint given"), ("safepoint.dcp", "safepoint.dcp, size_hint given"))
        for scenario in ("large", "small")
    ]


def _memory(found: Results) -> list[Row]:
    def judge(cell: dict[str, Any]) -> tuple[str, bool]:
        held, size, steps = cell["memory_held"], cell["bytes"], cell["retain"] + 1
        beyond = held - steps * size
        return f"{held / size:.2f}x = {steps}x {beyond / _MIB:+.0f} MiB", beyond <= 64 * _MIB

    return [
        _row(
            "pool and daemon, 2 steps retained",
            TITLES[scenario],
            found.cell("safepoint", scenario),
            judge,
            "3x + 64 MiB",
            _ELSEWHERE["memory"],
        )
        for scenario in TITLES
    ]


def _planning(found: Results) -> list[Row]:
    def judge(entry: dict[str, Any]) -> tuple[str, bool]:
        later, first = entry["blocked"]["later"], entry["blocked"]["first"]
        text = f"{milliseconds(later)}, first {1e3 * first:.0f} ms, {entry['operation_count']} operations"
        return text, later["median"] < 5e-3 and entry["operation_count"] == 0

    return [
        _row(
            "planning, 8 ranks, 500 DTensors each",
            entry["title"] if entry else system,
            entry,
            judge,
            "no collective, 5 ms",
            _ELSEWHERE["planning"],
        )
        for system in ("safepoint", "safepoint.dcp")
        for entry in [found.other("planning", system)]
    ]
