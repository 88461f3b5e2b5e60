"""Results as tables: in the terminal, and in Markdown between the markers of README.md and docs/benchmarks.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench import figures
from bench.figures import milliseconds, multiple
from bench.scenarios import TITLES

_REACHED = {True: "yes", False: "**no**", None: "–"}


@dataclass(frozen=True)
class Sheet:
    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        for column in self.columns:
            table.add_column(column, overflow="fold")
        for row in self.rows:
            table.add_row(*(f"[bold]{c.strip('*')}[/]" if c.startswith("**") else c.replace("[", r"\[") for c in row))
        return table


def goals(results: dict[str, Any]) -> Sheet:
    rows = []
    before = ""
    for row in figures.rows(results):
        what = row.what if row.what != before else ""
        before = row.what
        rows.append([what, row.case, row.measured, row.goal, _REACHED[row.reached], row.elsewhere])
    columns = ["figure", "case", "measured: median (min–max)", "goal", "reached", "best seen elsewhere"]
    return Sheet("Goals", columns, rows)


def side_by_side(results: dict[str, Any]) -> list[Sheet]:
    """One sheet for each scenario and number of ranks; every system that ran or was tried there."""
    sheets = []
    for ranks in (1, 2):
        for scenario, title in TITLES.items():
            cells = [c for c in results["cells"] if (c["scenario"], c["ranks"]) == (scenario, ranks)]
            if not cells:
                continue
            whole = next((c for c in cells if "bytes" in c), None)
            size = f", {whole['bytes'] / 1e9:.2f} GB in {whole['tensors']} tensors" if whole else ""
            plural = "1 rank" if ranks == 1 else f"{ranks} ranks, one core each"
            columns = [
                "system",
                "T_block",
                "T_safe",
                "T_mem",
                "first, second T_safe",
                "T_rec",
                "again",
                "memory beyond",
                "memcpy",
            ]
            sheets.append(Sheet(f"{title}, {plural}{size}", columns, [_cell_row(c) for c in cells]))
    return sheets


def _cell_row(cell: dict[str, Any]) -> list[str]:
    name = cell.get("title", cell["system"]) + (", one core" if cell["one_core"] else "")
    if "error" in cell:
        return [name, "failed: " + cell["error"].strip().splitlines()[-1][:160], *["–"] * 7]
    return [
        name,
        *(multiple(cell[name]["x"]) for name in ("T_block", "T_safe", "T_mem")),
        ", ".join(f"{cell['T_safe'][which]['x']:.2f}x" for which in ("first", "second")),
        multiple(cell["T_rec"]["x"]) + ("" if cell["checksums"] else ", unverified"),
        f"{cell['T_rec']['again']['median']:.2f}x",
        f"{cell['memory_beyond_x']:.1f}x",
        f"{1e3 * cell['memcpy']:.0f} ms",
    ]


def training(results: dict[str, Any]) -> Sheet:
    rows = []
    for entry in results["training"]:
        if "error" in entry:
            failed = "failed: " + entry["error"].strip().splitlines()[-1][:160]
            rows.append([entry["system"], failed, *["–"] * 6])
            continue
        loops = entry["loops"]
        row = [entry["title"]]
        for name in ("python", "matmul"):
            noise = 1e3 * loops[name]["noise_seconds"]["median"]
            stood = loops[name].get("stood_seconds")  # Results of an older benchmark have none.
            row += [milliseconds(loops[name]["lost_seconds"]), f"{1e3 * stood['median']:.0f} ms" if stood else "–"]
            row.append(f"{noise:.0f} ms")
        rows.append([*row, f"{1e3 * entry['memcpy']:.0f} ms"])
    columns = ["system"]
    for loop in ("Python-heavy loop", "matmul on all cores"):
        columns += [loop, "stood still", "its noise"]
    columns.append("memcpy")
    return Sheet("Training time lost per save", columns, rows)


def planning(results: dict[str, Any]) -> Sheet:
    rows = []
    for entry in results["planning"]:
        if "error" in entry:
            rows.append(
                [entry["system"], "failed: " + entry["error"].strip().splitlines()[-1][:160], "–", "–", "–", "–"]
            )
            continue
        rows.append(
            [
                entry["title"],
                f"{1e3 * entry['blocked']['first']:.0f} ms",
                milliseconds(entry["blocked"]["later"]),
                milliseconds(entry["cpu"]["later"]),
                milliseconds(entry["complete"]["later"]),
                f"{entry['operation_count']}" + (f" ({', '.join(entry['operations'])})" if entry["operations"] else ""),
            ]
        )
    columns = [
        "system",
        "first, blocked",
        "later, blocked",
        "CPU time of the thread",
        "later, complete",
        "operations in 3 later saves, all ranks",
    ]
    return Sheet("Everything but the copy, 8 ranks on this machine's cores, 500 DTensors each", columns, rows)


def machine_line(results: dict[str, Any]) -> str:
    m = results["machine"]
    quick = (
        "" if results["settings"]["scale"] == 1 else f", scale {results['settings']['scale']}: no figure of this counts"
    )
    return (
        f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, torch {results['torch']}, "
        f"copy kernel {results['kernel']}, commit {results['commit']}, "
        f"{results['started'][:10]}, {results['seconds'] / 60:.0f} minutes{quick}"
    )


def show(results: dict[str, Any], console: Console) -> None:
    for sheet in (*side_by_side(results), training(results), planning(results), goals(results)):
        if sheet.rows:
            console.print(sheet.rich(), "")
    for skipped in results["skipped"]:
        console.print(f"skipped {skipped['system']}: {skipped['reason']}", highlight=False)
    console.print(machine_line(results), highlight=False)


def write_readme(results: dict[str, Any], root: Path, picture: Path) -> None:
    """Replaces what is between the markers in README.md (goals, picture) and docs/benchmarks.md (everything)."""
    target = root / "docs" / "benchmark.png"
    target.write_bytes(picture.read_bytes())
    line = f"Measured by `make bench` on {machine_line(results)}."
    image = "![Multiples of one memcpy, safepoint and other systems](docs/benchmark.png)"
    replace_between_markers(root / "README.md", "\n\n".join([line, goals(results).markdown(), image]))
    parts = [line, image.replace("docs/", "")]
    for sheet in (goals(results), *side_by_side(results), training(results), planning(results)):
        if sheet.rows:
            parts += [f"### {sheet.title}", sheet.markdown()]
    if results["skipped"]:
        parts += ["### Skipped", "\n".join(f"- {s['system']}: {s['reason']}" for s in results["skipped"])]
    replace_between_markers(root / "docs" / "benchmarks.md", "\n\n".join(parts))


def replace_between_markers(path: Path, text: str) -> None:
    begin, end = "<!-- make bench README=1 writes from here -->", "<!-- to here -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{path} lacks the lines {begin!r} and {end!r}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
