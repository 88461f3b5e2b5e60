"""Measures the durable tier: on a directory, and on an S3 server on loopback, beside other ways to the same place.

    python -m bench.durable [--scale 1.0] [--rounds 3] [--parts directory,s3] [--out DIR] [--write]
    python -m bench.durable --report FILE [--write]        tables again, of results that are there

Results go into DIR/durable.json, tables into the terminal; with `--write` also into docs/operating.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import durable_directory, durable_s3, machine
from bench.report import Sheet, machine_line, replace_between_markers
from bench.scenarios import expected_bytes
from bench.system import ROOT

_TLS_PART = 0.25  # Of the bytes: both sides encrypt on the same cores, which takes long.
_DOCS = ROOT / "docs" / "operating"
_KINDS = {
    "upload1": "**upload, one object of {size}**",
    "upload8": "**upload, 8 objects of an eighth at once**",
    "download1": "**download, one object of {size}, one reader**",
    "download8": "**download, 8 readers**",
}
_CLIENTS = {
    "raw_put": "aws-c-s3 alone: from mapped memory, no checksums",
    "put": "`s3://` of safepoint: read from the pool, compared, sent with checksums",
    "raw_get": "aws-c-s3 alone: into the reader's memory",
    "get": "`s3://` of safepoint: the same",
    "check": "`s3://` of safepoint: the same, every block compared",
}
_WHOLE = {
    "client raw_put1": "aws-c-s3 alone, no tensors, no checksums",
    "safepoint save": "`save(durable=True)` until durable, 1 rank",
    "safepoint8 save": "the same, 8 ranks of an eighth each",
    "obstore put1": "obstore, no tensors, no checksums",
    "connector save": "torch `dcp.save`, s3torchconnector",
    "aws save": "AWS library, `save_to_s3`, and into a stand-in of its memory tier",
    "client raw_get1": "aws-c-s3 alone, no tensors, unverified",
    "safepoint load": "`load_into`, every byte verified, 1 rank",
    "safepoint8 load": "the same, 8 ranks at once",
    "obstore get1": "obstore, no tensors, unverified",
    "connector load": "torch `dcp.load`, s3torchconnector, unverified",
}


def _figure(values: list[float]) -> str:
    if not values:
        return "not measured"
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _ratio(values: list[float], yardstick: list[float]) -> str:
    return f"{statistics.median(values) / statistics.median(yardstick):.2f}x" if values and yardstick else "-"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def directory(samples: durable_directory.Samples, size: int) -> Sheet:

    def row(title: str, name: str, yardstick: str) -> list[str]:
        values = samples.get(name, [])
        return [title, _figure(values), "1" if name == yardstick else _ratio(values, samples.get(yardstick, []))]

    cpu = statistics.median(samples["cpu"])
    rows = [
        row("drain, `memory` to `durable`: written, fsynced, read back", "drain", "dd"),
        row("`save(durable=True)` until durable", "save", "dd"),
        row("torch `dcp.save`, fsynced, two threads", "dcp save", "dd"),
        row("`dd conv=fsync` of the same bytes", "dd", "dd"),
        row("`dd conv=fsync oflag=direct` of them", "dd direct", "dd"),
        [
            "worker's processor time per drain",
            f"{_figure(samples['cpu'])}, {cpu / (size / (1 << 30)):.2f} s/GiB",
            "-",
        ],
        ["worker's memory, most beyond what it had", f"{max(samples['memory']) / (1 << 20):.0f} MiB", "-"],
        row("save, T_safe, nothing else going on", "alone safe", "alone safe"),
        row("save, T_safe, beside a drain", "beside safe", "alone safe"),
        row("T_mem - T_safe, nothing else going on", "alone gap", "alone gap"),
        row("T_mem - T_safe, beside a drain", "beside gap", "alone gap"),
        row("`load_into`, every byte verified", "restore", "read"),
        row("torch `dcp.load`, unverified", "dcp load", "read"),
        row("`dd` of the shard to nowhere", "read", "read"),
    ]
    return Sheet(f"{_size(size)} in 10 tensors, one rank, a directory", ["", "s", "ratio"], rows)


_S3_COLUMNS = ["", "first, s", "later, s", "ratio", "CPU s/GiB", "memory"]


def _s3_row(title: str, samples: Any, yardstick: Any, size: int) -> list[str]:
    if not isinstance(samples, list):
        return [title, samples or "not measured", "-", "-", "-", "-"]
    later = samples[1:]
    seconds = [sample["seconds"] for sample in later]
    beside = [sample["seconds"] for sample in yardstick[1:]] if isinstance(yardstick, list) else []
    cpu = statistics.median(sample["cpu"] for sample in later) / (size / (1 << 30)) if later else 0.0
    return [
        title,
        f"{samples[0]['seconds']:.3f}",
        _figure(seconds),
        "1" if samples is yardstick else _ratio(seconds, beside),
        f"{cpu:.2f}",
        f"{max(sample['memory'] for sample in samples) / (1 << 20):.0f} MiB",
    ]


def clients(title: str, results: durable_s3.Results, size: int) -> Sheet:
    rows = []
    for kind, turns in durable_s3.CLIENT.items():
        rows.append([_KINDS[kind].format(size=_size(size)), *[""] * 5])
        yardstick = results.get(" ".join(turns[0]))
        for name, what in turns:
            shown = "obstore" if name == "obstore" else _CLIENTS[what.rstrip("18")]
            rows.append(_s3_row(shown, results.get(f"{name} {what}"), yardstick, size))
    return Sheet(title, _S3_COLUMNS, rows)


def whole(results: durable_s3.Results, size: int) -> Sheet:
    rows = []
    for kind, shown in (("save", "**from tensors to the store**"), ("load", "**from the store into tensors**")):
        rows.append([shown, *[""] * 5])
        turns = durable_s3.WHOLE[kind]
        yardstick = results.get(" ".join(turns[0]))
        for name, what in turns:
            rows.append(_s3_row(_WHOLE[f"{name} {what}"], results.get(f"{name} {what}"), yardstick, size))
    return Sheet(f"Whole steps of {_size(size)}, a server that keeps them", _S3_COLUMNS, rows)


def sheets(results: dict[str, Any]) -> dict[str, list[Sheet]]:
    """By the page of docs/operating that they belong to."""
    found: dict[str, list[Sheet]] = {"durable.md": [], "s3.md": []}
    size = results["bytes"]
    if "directory" in results:
        found["durable.md"].append(directory(results["directory"], size))
    if "client" in results:
        found["s3.md"].append(clients("Clients, a server that keeps nothing, plain HTTP", results["client"], size))
        part = round(size * _TLS_PART)
        found["s3.md"].append(clients("Clients, a server that keeps nothing, TLS", results["tls"], part))
    if "whole" in results:
        found["s3.md"].append(whole(results["whole"], size))
    return found


def write(results: dict[str, Any], docs: Path) -> None:
    """Between the markers of the pages. A page keeps its tables where there are no new ones."""
    for name, tables in sheets(results).items():
        if tables:
            parts = [f"Measured by `make bench-durable` on {machine_line(results)}."]
            for sheet in tables:
                parts += [f"**{sheet.title}**", sheet.markdown()]
            replace_between_markers(docs / name, "\n\n".join(parts))


def measure(scale: float, rounds: int, parts: list[str], out: Path) -> dict[str, Any]:
    results = {**machine.describe(), "settings": {"scale": scale, "rounds": rounds}, "load": [os.getloadavg()[0]]}
    results["bytes"] = expected_bytes("large", scale)
    began = time.monotonic()
    if "directory" in parts:
        results["directory"] = durable_directory.measure(scale, rounds, out)
    if "client" in parts:
        results["client"] = durable_s3.client(scale, rounds, out, tls=False)
        results["tls"] = durable_s3.client(scale * _TLS_PART, rounds, out, tls=True)
    if "whole" in parts:
        results["whole"] = durable_s3.whole(scale, rounds, out)
    results["seconds"] = time.monotonic() - began
    results["load"].append(os.getloadavg()[0])  # More than two: somebody else was at work, too.
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="part of 10 x 100 MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="directory,client,whole")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--report", type=Path, help="measure nothing, take these results")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/operating")
    arguments = parser.parse_args()
    # So that what was started is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if arguments.report:
        results = json.loads(arguments.report.read_text())
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        results = measure(arguments.scale, arguments.rounds, arguments.parts.split(","), arguments.out)
        (arguments.out / "durable.json").write_text(json.dumps(results, indent=1))
    console = Console(width=max(150, Console().width))
    for tables in sheets(results).values():
        for table in tables:
            console.print(table.rich(), "")
    console.print(machine_line(results), f"load {results['load']}", highlight=False)
    if arguments.write:
        write(results, _DOCS)


if __name__ == "__main__":
    main()
