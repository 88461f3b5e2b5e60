"""What a run measures, and how often: sized so that the full run takes a quarter of an hour on two cores."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.cell import Cell
from bench.system import OURS, PEERS, find

_PEER_WARM = 3
# Left out, for time (5,000 tensors take them seconds) or for memory (more than four times the state beside it).
_NOT_PEERS = {"small": {"dcp-process"}, "gpt": {"dcp-process", "torch-checkpointing", "aws"}}


@dataclass(frozen=True)
class Plan:
    scale: float
    cells: tuple[Cell, ...]
    training: tuple[str, ...]
    planning: tuple[str, ...]
    pairs: int
    segment: float
    planning_saves: int

    def systems(self) -> list[str]:
        return list(dict.fromkeys([*(c.system for c in self.cells), *self.training, *self.planning]))

    def without(self, names: set[str]) -> Plan:
        return replace(
            self,
            cells=tuple(c for c in self.cells if c.system not in names),
            training=tuple(n for n in self.training if n not in names),
            planning=tuple(n for n in self.planning if n not in names),
        )


def make_plan(*, quick: bool, systems: list[str], scenarios: list[str], ranks: list[int], parts: list[str]) -> Plan:
    cells = [c for c in (_quick_cells() if quick else _full_cells()) if c.system in systems]
    cells = [c for c in cells if c.scenario in scenarios and c.ranks in ranks and c.ranks in find(c.system).ranks]
    training = [
        "safepoint",
        "safepoint-guarded",
        "safepoint.dcp",
        "dcp-thread",
        "torch-checkpointing",
        "dlrover",
        "aws",
    ]
    planning = ["safepoint", "safepoint.dcp", "safepoint-torch", "dcp-sync"]
    if quick:
        training, planning = training[1:2], planning[:2]
    return Plan(
        scale=0.1 if quick else 1.0,
        cells=tuple(cells) if "cells" in parts else (),
        training=tuple(n for n in training if n in systems) if "training" in parts else (),
        planning=tuple(n for n in planning if n in systems) if "planning" in parts else (),
        pairs=3 if quick else 6,
        segment=0.3 if quick else 0.8,
        planning_saves=4 if quick else 11,
    )


def _full_cells() -> list[Cell]:
    cells = []
    for scenario in ("large", "small", "gpt"):
        cells += [Cell(name, scenario, warm=7, loaders=3) for name in OURS]
        if scenario != "gpt":
            cells.append(Cell("safepoint", scenario, one_core=True, warm=7))
        peers = [name for name in PEERS if name not in _NOT_PEERS.get(scenario, set())]
        cells += [Cell(name, scenario, warm=2 if scenario == "small" else _PEER_WARM) for name in peers]
    for scenario in ("large", "small", "gpt"):
        cells += [Cell(name, scenario, ranks=2) for name in OURS]
        if scenario == "large":
            cells += [Cell(name, scenario, ranks=2, warm=_PEER_WARM) for name in PEERS]
    return cells


def _quick_cells() -> list[Cell]:
    cells = [Cell(name, scenario, warm=3, scale=0.1) for scenario in ("large", "small") for name in OURS]
    cells += [Cell("safepoint", "gpt", warm=3, scale=0.1), Cell("dcp-thread", "large", warm=2, scale=0.1)]
    return [*cells, Cell("safepoint", "small", ranks=2, warm=3, scale=0.1)]
