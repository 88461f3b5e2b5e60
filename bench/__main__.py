"""Measures, and writes results.json, tables and a picture.

    python -m bench [--quick] [--systems A,B] [--scenarios A,B] [--ranks 1,2] [--parts A,B] [--out DIR] [--readme]
    python -m bench --report FILE [--readme]       tables and picture again, of results that are there

Systems: safepoint safepoint-guarded safepoint.dcp safepoint-torch; peers: dcp-sync dcp-thread dcp-process
torch-checkpointing dlrover aws (the last three after `make bench-peers`). Scenarios: large small gpt.
Parts: cells training planning.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import cell, machine, planning, plot, report, training
from bench.plan import Plan, make_plan
from bench.system import OURS, PEERS, ROOT, find


def write_results(results: dict[str, Any], path: Path) -> None:
    """After every measurement: what was measured stays, whatever happens to the next one."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1))
    temporary.rename(path)


def describe(arguments: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    return {
        **machine.describe(),
        "settings": {"scale": plan.scale, "quick": arguments.quick},
        "cells": [],
        "training": [],
        "planning": [],
        "skipped": [],
    }


def measure(plan: Plan, results: dict[str, Any], path: Path, console: Console) -> None:
    began = time.monotonic()
    reasons = {name: find(name).unavailable() for name in plan.systems()}
    results["skipped"] = [{"system": name, "reason": reason} for name, reason in reasons.items() if reason]
    plan = plan.without({name for name, reason in reasons.items() if reason})
    total = len(plan.cells) + len(plan.training) + len(plan.planning)

    def done(kind: str, entry: dict[str, Any], what: str) -> None:
        results[kind].append(entry)
        results["seconds"] = time.monotonic() - began
        write_results(results, path)
        count = sum(len(results[k]) for k in ("cells", "training", "planning"))
        console.print(f"[{count}/{total}] {what}: {entry.get('error', 'measured')}", markup=False, highlight=False)

    for spec in plan.cells:
        done("cells", cell.measure(spec), f"{spec.system}, {spec.scenario}, {spec.ranks} rank(s)")
    for name in plan.training:
        done("training", training.measure(name, plan.scale, plan.pairs, plan.segment), f"{name}, training")
    for name in plan.planning:
        done("planning", planning.measure(name, plan.planning_saves), f"{name}, planning")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, few saves: does it work")
    parser.add_argument("--systems", help="only these")
    parser.add_argument("--scenarios", help="only these")
    parser.add_argument("--ranks", help="only these")
    parser.add_argument("--parts", default="cells,training,planning")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--readme", action="store_true", help="put tables and picture into README.md and docs/")
    parser.add_argument("--report", type=Path, help="measure nothing, take these results")
    arguments = parser.parse_args()
    # So that ranks and services are ended, too: they have sessions of their own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=max(150, Console().width))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        results = json.loads(arguments.report.read_text())
    else:
        plan = make_plan(
            quick=arguments.quick,
            systems=_names(arguments.systems, [*OURS, *PEERS]),
            scenarios=_names(arguments.scenarios, ["large", "small", "gpt"]),
            ranks=[int(r) for r in _names(arguments.ranks, ["1", "2"])],
            parts=_names(arguments.parts, ["cells", "training", "planning"]),
        )
        results = describe(arguments, plan)
        measure(plan, results, arguments.out / "results.json", console)
    picture = arguments.out / "benchmark.png"
    plot.draw(results, picture)
    report.show(results, console)
    if arguments.readme:
        if results["settings"]["scale"] != 1:
            raise SystemExit("bench: results of a quick run are not for the README")
        report.write_readme(results, ROOT, picture)
    console.print(f"raw numbers and picture in {arguments.out}", highlight=False)
    failed = [e for kind in ("cells", "training", "planning") for e in results[kind] if "error" in e]
    return 1 if failed else 0


def _names(given: str | None, known: list[str]) -> list[str]:
    names = known if given is None else given.split(",")
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"bench: unknown {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
