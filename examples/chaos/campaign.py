"""Crash-tests the exported files of ``job.py`` and, beside them, what torch DCP writes, with ``ckpt-chaos``.

    python examples/chaos/campaign.py [--out DIR] [--only NAME ...] [--jobs N] [--write-docs FILE]

For each campaign below ``ckpt-chaos run`` kills the job at every file event of its saves, in every way it knows,
resumes it, and compares its end with that of an undisturbed run. Writes ``campaigns.json`` and ``table.md`` to DIR, and
the table between the two marks of FILE. Exit 1: a run of safepoint's did not PASS, or an injected crash did not happen.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from ckpt_chaos.byo import MODES
from ckpt_chaos.runner import Row, rejudge

import safepoint
from safepoint import _core

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- begin: make chaos -->", "<!-- end: make chaos -->"
VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK", "CONTROL_FAIL")


@dataclass(frozen=True)
class Campaign:
    name: str
    writer: str
    resume: str = "any"
    ranks: int = 1
    crash_rank: int = 0
    modes: tuple[str, ...] = MODES

    @property
    def ours(self) -> bool:
        return self.writer == "safepoint"


# The job has no handler for SIGTERM: it dies of it as in "before". The longest campaigns of each writer show that; the
# variants leave it out.
WITHOUT_TERM = tuple(mode for mode in MODES if mode != "term")
CAMPAIGNS = (
    Campaign("safepoint", "safepoint"),
    Campaign("safepoint, 2 ranks", "safepoint", ranks=2, modes=("before", "torn")),
    Campaign("dcp.save", "dcp"),
    Campaign("dcp.save, newest with .metadata", "dcp", resume="metadata", modes=WITHOUT_TERM),
    Campaign("dcp.save, 2 ranks, rank 1 killed", "dcp", ranks=2, crash_rank=1, modes=("before", "torn")),
    Campaign("dcp.async_save", "dcp-async"),
    Campaign("dcp.async_save, newest with .metadata", "dcp-async", resume="metadata", modes=WITHOUT_TERM),
    Campaign("planted bug: written in place", "in-place", modes=WITHOUT_TERM),
)


class Daemon:
    """A daemon for the jobs of one campaign, which all have a namespace of their own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        self.socket = str(folder / "d.sock")
        settings = {
            "socket": self.socket,
            "state-dir": str(folder / "state"),
            "log-file": str(folder / "daemon.jsonl"),
            "pool": "1GiB",
            "extent": "2MiB",
            "pool-prefault": "0",
            "lock-memory": "off",
            "http": "off",
        }
        binary = Path(safepoint.__file__).parent / "bin" / "safepointd"
        command = [str(binary), *(f"--{name}={value}" for name, value in settings.items())]
        with (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)
        deadline = time.monotonic() + 60
        while True:
            try:
                return _core.Client(self.socket, client_name="campaign").close()
            except safepoint.Unavailable:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def command(campaign: Campaign, work: Path, max_points: int, jobs: int) -> list[str]:
    # DCP's .metadata has the path of its folder, so its size differs from run to run. As it is written last, names are
    # enough to tell a complete folder.
    by_name = ["--ckpt-ignore-size"] if campaign.writer.startswith("dcp") else []
    return [
        *(sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work), "--jobs", str(jobs), "--timeout", "120"),
        *("--modes", ",".join(campaign.modes), "--max-points", str(max_points), "--grace", "5"),
        *("--ranks", str(campaign.ranks), "--crash-rank", str(campaign.crash_rank)),
        *("--checkpoint-glob", "{out}/step-*", "--step-regex", r"resumed from step (\d+)"),
        *by_name,
        *("--result-file", "{out}/final.json", "--fail-on", ",".join(VERDICTS[1:])),
        *("--", sys.executable, str(HERE / "job.py"), "--out", "{out}"),
        *("--writer", campaign.writer, "--resume", campaign.resume),
    ]


def run(campaign: Campaign, out: Path, max_points: int = 1000, jobs: int = 1) -> list[Row]:
    """Runs one campaign; `out` must not exist. What `ckpt-chaos` printed is in ``output`` there."""
    out.mkdir(parents=True)
    daemon = Daemon(out / "daemon")
    environment = {"SAFEPOINT_SOCKET": daemon.socket, "SAFEPOINT_START": "0", "OMP_NUM_THREADS": "1"}
    try:
        with (out / "output").open("w") as output:
            status = subprocess.run(
                command(campaign, out / "work", max_points, jobs),
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,  # Exit 1 is a verdict.
            ).returncode
    finally:
        daemon.stop()
    rows: list[Row] = rejudge(out / "work")
    if status not in (0, 1) or not rows:
        raise SystemExit(
            f"{campaign.name}: ckpt-chaos did not come to its end ({status}):\n{(out / 'output').read_text()[-3000:]}"
        )
    return rows


def is_control(row: Row) -> bool:
    return bool(row.label.startswith("no crash"))


def mode_of(row: Row) -> str:
    return "control" if is_control(row) else row.label.rpartition("[")[2].rstrip("]")


def not_injected(work: Path, rows: list[Row]) -> list[str]:
    """Crash points where the job did not die, or not where it should have: what came after them proves nothing.

    ckpt-chaos finds the latter by the name of the file, which for a partial folder of safepoint's is another each time.
    """

    def events(folder: str) -> dict[int, tuple[str, str]]:
        (log,) = (p for p in (work / folder).glob("events.log.rank*") if p.name.endswith(f"rank{rank}"))
        found = (line.split("\t") for line in log.read_text().splitlines())
        return {
            int(n): (kind, re.sub(r"(?<=^\.safepoint-partial-)[0-9a-f]{16}$", "*", name)) for n, kind, name, _ in found
        }

    rank = json.loads((work / "meta.json").read_text())["crash_rank"]
    reference = events("reference")
    bad = []
    for order, row in enumerate(rows):
        if is_control(row):
            continue
        number = int(row.label.split()[0].removeprefix("#"))
        if not row.crashed or events(f"pt_{order:03d}").get(number) != reference[number]:
            bad.append(row.label)
    return bad


def left_behind(work: Path) -> list[str]:
    """Partial folders that are still there after the resumed job has exported again."""
    return sorted(str(p.relative_to(work)) for p in work.glob("pt_*/out/.safepoint-partial-*"))


def cell(rows: list[Row]) -> str:
    if not rows:
        return "-"
    counts = Counter(row.verdict for row in rows)
    if set(counts) == {"PASS"}:
        return f"{len(rows)} PASS"
    return ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])


def table(results: list[tuple[Campaign, list[Row]]]) -> str:
    """One row a campaign, one column a fault kind; then every crash point where a run was no PASS."""
    columns = ("control", *MODES)
    lines = [f"| writer | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for campaign, rows in results:
        cells = [cell([row for row in rows if mode_of(row) == mode]) for mode in columns]
        lines.append(f"| {campaign.name} | {' | '.join(cells)} |")
    lines += ["", "Every run that is no PASS:", "", "| writer | killed at | fault kinds | resume | verdict |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for campaign, rows in results:
        kinds: dict[tuple[str, str, str], list[str]] = {}
        for row in rows:
            if row.verdict == "PASS":
                continue
            outcome = row.outcome
            resume = f"failed ({outcome.raised})" if outcome.raised else f"from step {outcome.resumed_from_step}"
            if row.verdict == "LOST_WORK":
                resume += f", complete was step {outcome.newest_complete_step}"
            kinds.setdefault((row.label.partition(" [")[0], resume, row.verdict), []).append(mode_of(row))
        for (where, resume, verdict), modes in kinds.items():
            lines.append(f"| {campaign.name} | `{where}` | {', '.join(modes)} | {resume} | {verdict} |")
    return "\n".join(lines) + "\n"


def as_json(campaign: Campaign, rows: list[Row], missed: list[str]) -> dict[str, Any]:
    return {
        **vars(campaign),
        "not_injected": missed,
        "ours": campaign.ours,
        "runs": [{"crash_point": r.label, "verdict": r.verdict, **vars(r.outcome)} for r in rows],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/chaos"))
    parser.add_argument(
        "--only", nargs="*", choices=[c.name for c in CAMPAIGNS], help="run these (or none); DIR keeps the others"
    )
    parser.add_argument("--jobs", type=int, default=1, help="crash points at a time")
    parser.add_argument("--write-docs", type=Path, metavar="FILE")
    args = parser.parse_args()

    out: Path = args.out.resolve()
    for number, campaign in enumerate(CAMPAIGNS):
        if args.only is not None and campaign.name not in args.only:
            continue
        folder = out / str(number)
        if folder.exists():
            shutil.rmtree(folder)
        began = time.monotonic()
        rows = run(campaign, folder, jobs=args.jobs)
        print(f"{campaign.name}: {cell(rows)} ({time.monotonic() - began:.0f} s)", flush=True)

    results: list[tuple[Campaign, list[Row]]] = []
    report: list[dict[str, Any]] = []
    bad: list[str] = []
    for number, campaign in enumerate(CAMPAIGNS):
        work = out / str(number) / "work"
        rows = rejudge(work)
        if not rows:
            continue
        missed = not_injected(work, rows)
        results.append((campaign, rows))
        report.append(as_json(campaign, rows, missed))
        bad += [f"{campaign.name}: not injected: {label}" for label in missed]
        if campaign.ours:
            bad += [f"{campaign.name}: left behind: {path}" for path in left_behind(work)]
            bad += [f"{campaign.name}: {row.label}: {row.verdict}" for row in rows if row.verdict != "PASS"]

    versions = {
        "ckpt-chaos": metadata.version("ckpt-chaos"),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "kernel": os.uname().release,
    }
    absent = [c.name for c in CAMPAIGNS if c not in [campaign for campaign, _ in results]]
    note = f" Not run for this table: {'; '.join(absent)}." if absent else ""
    text = f"{', '.join(f'{k} {v}' for k, v in versions.items())}.{note}\n\n{table(results)}"
    (out / "table.md").write_text(text)
    (out / "campaigns.json").write_text(json.dumps({"versions": versions, "campaigns": report}, indent=1))
    if args.write_docs:
        page = args.write_docs.read_text()
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        args.write_docs.write_text(f"{before}{BEGIN}\n{text}{END}{after}")
    for line in bad:
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
