"""Kill at every boundary: trainer, worker or both, before and after every protocol event of each scenario.

    python tests/boundaries/campaign.py                 all points
    python tests/boundaries/campaign.py --part 6        every 6th point, each event once; for CI
    python tests/boundaries/campaign.py --plant         against a daemon with a planted bug, one after another
    python tests/boundaries/campaign.py --sabotage      one run per verdict, damaged so that it must get that verdict
    python tests/boundaries/campaign.py --write --plant all of it, and writes the tables of docs/reliability.md

A scenario is played without a kill first, twice; the events of both recordings are its boundaries. Then each point gets
a fresh daemon (runs.py), and what was seen of it a verdict (grader.py). Exit status 0: every point passed.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import multiprocessing.pool
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from control import TARGETS, EventKey, Point
from grader import VERDICTS, Verdict, grade
from runs import BINARY, SABOTAGES, SCENARIOS, Left, Result, Run, Scenario

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "release"
PLANTED = ROOT / "build" / "planted"
RECORDER = "tests/boundaries/boundary_recorder.so"
PAGE = ROOT / "docs" / "reliability.md"
LANES = 2
RECORDINGS = 2


def build(folder: Path, *targets: str) -> None:
    """Configures a preset if that was never done, and builds; raises CalledProcessError."""
    if not (folder / "build.ninja").exists():
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DSP_BUILD_PYTHON=OFF"]
        if folder == PLANTED:
            configure += ["-DSP_PLANT_BUG=all", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
        else:
            configure += ["-DCMAKE_BUILD_TYPE=Release"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    for target in targets:
        command = ["cmake", "--build", str(folder), "--target", target, "--parallel", str(LANES)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def under_the_recorder() -> None:
    """Starts this program again with the recorder preloaded, which its children inherit."""
    build(BUILD, "boundary_recorder")
    environment = dict(os.environ, LD_PRELOAD=str(BUILD / RECORDER), OPENBLAS_NUM_THREADS="1")
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


@dataclass(frozen=True)
class Plant:
    """A bug that kills at boundaries must show (src/base/plant.h), and where."""

    what: str
    scenario: str
    target: str


PLANTS = {
    "ack_before_ledger": Plant("replies leave before the ledger has what they acknowledge", "save", "worker"),
    "ledger_tail_first": Plant("the ledger's end moves before the entry's bytes are there", "save", "worker"),
    "marker_not_rewritten": Plant(
        "a kill before the marker's file is there is never made good", "first save", "worker"
    ),
    "repeat_gets_a_second_lease": Plant("a repeated request has a second effect", "save", "worker"),
}


@dataclass
class Part:
    """One scenario's share of a campaign."""

    scenario: Scenario
    baseline: Left = field(default_factory=dict)
    events: list[EventKey] = field(default_factory=list)
    unsteady: list[EventKey] = field(default_factory=list)  # Not in all recordings.
    problems: list[str] = field(default_factory=list)  # Of the recordings.
    results: list[tuple[Result, Verdict]] = field(default_factory=list)
    void: int = 0
    missed: list[Point] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, verdict: str) -> int:
        return sum(v.name == verdict for _, v in self.results)


@dataclass(frozen=True)
class Task:
    scenario: int
    point: Point | None
    baseline: Left | None
    binary: Path
    sabotage: str | None = None


def play(task: Task) -> Result:
    """In a process of the pool."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(SCENARIOS[task.scenario], Path(folder) / "run", task.baseline, task.binary, task.sabotage)
        return run.play(task.point)


def points_of(events: list[EventKey], part: int) -> list[Point]:
    """All points, or a fixed share of them in which each event occurs."""
    chosen = []
    sides = [(after, target) for target in TARGETS for after in (False, True)]
    for number, event in enumerate(events):
        for index, (after, target) in enumerate(sides):
            if (index - number) % min(part, len(sides)) == 0:
                chosen.append(Point(event, after, target))
    return chosen


def record(pool: multiprocessing.pool.Pool, number: int, binary: Path) -> Part:
    part = Part(SCENARIOS[number])
    begun = time.monotonic()
    runs = pool.map(play, [Task(number, None, None, binary)] * RECORDINGS)
    part.baseline = runs[0].left
    lists = [[key for key, after in run.events if not after] for run in runs]
    common = set.intersection(*map(set, lists))
    part.events = [key for key in lists[0] if key in common]
    part.unsteady = sorted(set.union(*map(set, lists)) - common)
    for run in runs:
        verdict = grade(run.seen)
        if verdict.name != "PASS":
            part.problems.append(f"without a kill: {verdict.name}: {verdict.reasons}")
        if run.left != part.baseline:
            part.problems.append(f"two runs without a kill leave {run.left} and {part.baseline}")
    part.seconds = time.monotonic() - begun
    return part


def strike(
    pool: multiprocessing.pool.Pool, number: int, part: Part, points: list[Point], binary: Path, quiet: bool = False
) -> None:
    begun = time.monotonic()
    results = pool.map(play, [Task(number, point, part.baseline, binary) for point in points], chunksize=1)
    # Which of two processes is first is not fixed; an event that did not come gets a second chance to.
    again = [index for index, result in enumerate(results) if not result.fired]
    tasks = [Task(number, points[index], part.baseline, binary) for index in again]
    for index, result in zip(again, pool.map(play, tasks), strict=True):
        results[index] = result
    for result in results:
        assert result.point is not None
        if not result.fired:
            part.missed.append(result.point)
        elif result.void:
            part.void += 1
        else:
            verdict = grade(result.seen)
            part.results.append((result, verdict))
            if verdict.name != "PASS" and not quiet:
                print(f"{part.scenario.name}: {result.point}: {verdict.name}: {verdict.reasons}", flush=True)
    part.seconds += time.monotonic() - begun


@dataclass(frozen=True)
class Choice:
    """Which points to play."""

    part: int = 1
    scenario: str | None = None
    event: str | None = None
    target: str | None = None

    def points(self, events: list[EventKey]) -> list[Point]:
        return [
            point
            for point in points_of(events, self.part)
            if self.event in (None, point.event.label) and self.target in (None, point.target)
        ]


def campaign(choice: Choice, lanes: int, binary: Path = BINARY, quiet: bool = False) -> list[Part]:
    parts = []
    with multiprocessing.get_context("fork").Pool(lanes) as pool:
        for number, scenario in enumerate(SCENARIOS):
            if choice.scenario not in (None, scenario.name):
                continue
            part = record(pool, number, binary)
            strike(pool, number, part, choice.points(part.events), binary, quiet)
            parts.append(part)
            if not quiet:
                counts = {v: part.count(v) for v in VERDICTS if part.count(v)}
                print(
                    f"{scenario.name}: {len(part.events)} events, {len(part.results)} points, {counts}, "
                    f"{part.void} void, {len(part.missed)} missed, {len(part.unsteady)} unsteady events, "
                    f"{part.seconds:.0f} s",
                    flush=True,
                )
    return parts


def passed(parts: list[Part]) -> bool:
    """Everything was reached, and passed. Prints why not."""
    for part in parts:
        for problem in part.problems:
            print(f"{part.scenario.name}: {problem}")
        for point in part.missed:
            print(f"{part.scenario.name}: never came: {point}")
    return all(
        part.results and part.count("PASS") == len(part.results) and not part.problems and not part.missed
        for part in parts
    )


# --- docs/reliability.md


def table(parts: list[Part]) -> str:
    lines = [
        "| scenario | events | points | " + " | ".join(VERDICTS) + " |",
        "| --- " * (3 + len(VERDICTS)) + "|",
    ]
    for part in parts:
        counts = " | ".join(str(part.count(v)) for v in VERDICTS)
        name = f"{part.scenario.name} ({part.scenario.title})"
        lines.append(f"| {name} | {len(part.events)} | {len(part.results)} | {counts} |")
    total = sum(len(part.results) for part in parts)
    sums = " | ".join(str(sum(part.count(v) for part in parts)) for v in VERDICTS)
    unsteady = sum(len(part.unsteady) for part in parts)
    lines.append(f"| all | {sum(len(part.events) for part in parts)} | {total} | {sums} |")
    if unsteady:
        lines.append(f"\n{unsteady} events that did not come in every recording are left out.")
    return "\n".join(lines)


def event_lists(parts: list[Part]) -> str:
    """The events of each scenario in their order, runs of one process on one line."""
    text = []
    for part in parts:
        text.append(f"**{part.scenario.name}**\n")
        before = None
        for key in part.events:
            process = "worker" if key.process.startswith("worker") else key.process
            word = key.label if key.occurrence == 1 else f"{key.label} ({key.occurrence})"
            if process == before:
                text[-1] += f", {word}"
            else:
                text.append(f"- {process}: {word}")
            before = process
        text.append("")
    return "\n".join(text)


def rewrite(page: Path, name: str, content: str) -> None:
    """Replaces what stands between the two comments of that name."""
    text = page.read_text()
    head, found, rest = text.partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->")
    if not found or not end:
        raise ValueError(f"{page} has no part called {name}")
    page.write_text(f"{head}{found}\n{content}\n\n{end}{tail}")


def write_results(parts: list[Part], planted: dict[str, collections.Counter[str]]) -> None:
    folder = ROOT / "build" / "boundaries"
    folder.mkdir(parents=True, exist_ok=True)
    report = [
        {"scenario": r.scenario, "point": str(r.point), "verdict": v.name, "reasons": v.reasons, "seconds": r.seconds}
        for part in parts
        for r, v in part.results
    ]
    (folder / "points.json").write_text(json.dumps(report, indent=1))
    rewrite(PAGE, "boundaries", table(parts))
    rewrite(PAGE, "events", event_lists(parts))
    if planted:
        rewrite(PAGE, "planted", planted_table(planted))


def planted_table(planted: dict[str, collections.Counter[str]]) -> str:
    lines = ["| bug | what it does | scenario | killed | points | verdicts |", "| --- " * 6 + "|"]
    for name, counts in planted.items():
        bug = PLANTS[name]
        verdicts = ", ".join(f"{v} {counts[v]}" for v in VERDICTS if counts[v])
        lines.append(f"| {name} | {bug.what} | {bug.scenario} | {bug.target} | {counts.total()} | {verdicts} |")
    return "\n".join(lines)


def plant(event: str | None, lanes: int, only: str | None) -> dict[str, collections.Counter[str]]:
    """Per bug the verdicts of a campaign against a daemon that has it."""
    build(PLANTED, "safepointd_planted")
    binary = PLANTED / "tests" / "boundaries" / "safepointd"
    found: dict[str, collections.Counter[str]] = {}
    for name, bug in PLANTS.items():
        if only and name != only:
            continue
        os.environ["BOUNDARY_PLANT"] = name
        parts = campaign(Choice(1, bug.scenario, event, bug.target), lanes, binary, quiet=True)
        found[name] = collections.Counter(v.name for part in parts for _, v in part.results)
        print(f"{name}: {dict(found[name])}", flush=True)
        shown: set[str] = set()
        for result, verdict in [pair for part in parts for pair in part.results]:
            if verdict.name not in {"PASS", *shown}:
                print(f"    {result.scenario}: {result.point}: {verdict.name}: {verdict.reasons[0]}")
            shown.add(verdict.name)
    del os.environ["BOUNDARY_PLANT"]
    return found


def sabotage(lanes: int) -> bool:
    """Whether a run that was damaged on purpose gets the verdict of its damage, for every verdict."""
    number = [scenario.name for scenario in SCENARIOS].index("restore")
    with multiprocessing.get_context("fork").Pool(lanes) as pool:
        part = record(pool, number, BINARY)
        tasks = [Task(number, None, part.baseline, BINARY, name) for name in SABOTAGES]
        verdicts = [grade(result.seen) for result in pool.map(play, tasks, chunksize=1)]
    for name, verdict in zip(SABOTAGES, verdicts, strict=True):
        print(f"{name}: {verdict.name}: {verdict.reasons}", flush=True)
    return not part.problems and [v.name for v in verdicts] == list(SABOTAGES)


def noticed(planted: dict[str, collections.Counter[str]]) -> bool:
    return all(counts.total() > counts["PASS"] for counts in planted.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, default=1, help="play every Nth point; 6 is one per event")
    parser.add_argument("--lanes", type=int, default=LANES, help="daemons at a time")
    parser.add_argument("--scenario", choices=[s.name for s in SCENARIOS], default=None)
    parser.add_argument("--event", default=None, help="only events with this label")
    parser.add_argument("--target", choices=TARGETS, default=None)
    parser.add_argument("--plant", nargs="?", const="", default=None, help="all planted bugs, or one")
    parser.add_argument("--sabotage", action="store_true", help="only show that each verdict can be reached")
    parser.add_argument("--write", action="store_true", help="rewrite docs/reliability.md")
    arguments = parser.parse_args()
    if "boundary_recorder" not in os.environ.get("LD_PRELOAD", ""):
        under_the_recorder()
    begun = time.monotonic()
    if arguments.sabotage:
        return 0 if sabotage(arguments.lanes) else 1
    planted: dict[str, collections.Counter[str]] = {}
    parts: list[Part] = []
    if arguments.plant is None or arguments.write:
        choice = Choice(arguments.part, arguments.scenario, arguments.event, arguments.target)
        parts = campaign(choice, arguments.lanes)
    if arguments.plant is not None:
        planted = plant(arguments.event, arguments.lanes, arguments.plant or None)
    if arguments.write:
        write_results(parts, planted)
    good = passed(parts) and noticed(planted)
    print(f"{'all as it should be' if good else 'NOT as it should be'}, {time.monotonic() - begun:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
