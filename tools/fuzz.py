#!/usr/bin/env python3
"""Builds and runs the fuzz targets (CMake preset "fuzz"). docs/internals/fuzzing.md says how to read the output.

Each target replays its corpus, then looks for new inputs for --seconds, two targets at a time; then the corpus replay's
coverage of the decoders is shown. The output ends with a line per failure ("failed: ...", with the input in base64) and
"N passed, N failed": one case per target and one for coverage.
New inputs stay in build/fuzz/corpus, reproducers in build/fuzz/crashes, the table in build/fuzz/coverage.txt.
With --seed each search is the same every time, as far as it comes: what is new is then thrown away.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "fuzz"
CORPUS = ROOT / "fuzz" / "corpus"
CRASHES = BUILD / "crashes"
PROFILES = BUILD / "profiles"

# Target, longest input in bytes, and the decoders whose coverage by its corpus counts.
TARGETS: dict[str, tuple[int, tuple[str, ...]]] = {
    "messages": (4096, ("src/format/messages.cc", "src/format/wire.h", "src/node/keeper_protocol.cc")),
    "seal_record": (1024, ("src/format/seal_record.cc", "src/format/names.cc")),
    "ledger": (8192, ("src/format/ledger.cc",)),
    "shard_index": (8192, ("src/format/shard_index.cc", "src/format/json_events.h", "src/format/coverage.cc")),
    "manifest": (4096, ("src/format/manifest.cc", "src/format/stored_step.cc")),
    "settings": (2048, ("src/node/settings.cc", "src/node/units.cc", "src/node/listen_address.cc")),
    "node_core": (700, ()),
    "readopt": (400, ()),
}
# Below this the inputs have lost touch with the code; docs/internals/fuzzing.md says why the rest is missing.
BRANCH_PERCENT_MIN = 75.0
RSS_LIMIT_MB = 1024
TIMEOUT_S = 10  # Of one input; the slowest takes milliseconds.
REPLAY_LIMIT_S = 300
SHOWN_BYTES_MAX = 8192  # Of a reproducer, in base64: as long as any input.

SANITIZERS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:quarantine_size_mb=16:malloc_context_size=8",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


@dataclass
class Result:
    target: str
    executions: int = 0
    per_second: int = 0
    inputs: int = 0  # Found beside the corpus.
    edges: int = 0
    regions: float = 0.0  # Percent, of this target's decoders, by its corpus; 0 without decoders of its own.
    problem: str = ""
    told: str = ""  # What the target said last of its own, before the stack.
    reproducer: Path | None = None

    def failure(self) -> str:
        """For whoever has nothing but the end of the output."""
        text = f"{self.target}: {self.problem}" + (f": {self.told}" if self.told else "")
        if self.reproducer is None or not self.reproducer.exists():
            return text
        content = self.reproducer.read_bytes()
        shown = base64.b64encode(content).decode() if len(content) <= SHOWN_BYTES_MAX else "too long to show"
        return f"{text}; {self.reproducer.name}, base64: {shown}"


def announce(text: str) -> None:
    print(text, flush=True)


def build(jobs: int) -> None:
    for command in (["cmake", "--preset", "fuzz"], ["cmake", "--build", "--preset", "fuzz", "--parallel", str(jobs)]):
        announce("+ " + " ".join(command))
        subprocess.run(command, cwd=ROOT, check=True, stdin=subprocess.DEVNULL)


def program(target: str) -> Path:
    return BUILD / "fuzz" / f"fuzz_{target}"


def run_libfuzzer(result: Result, arguments: list[str], profile: str, limit_s: float) -> str:
    """Runs the target; returns its output, and notes in `result` why it failed."""
    target = result.target
    log = BUILD / f"fuzz_{target}.log"
    command = [
        str(program(target)),
        f"-max_len={TARGETS[target][0]}",
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-timeout={TIMEOUT_S}",
        f"-artifact_prefix={CRASHES}/{target}-",
        "-print_final_stats=1",
        *arguments,
    ]
    before = set(CRASHES.iterdir())
    environment = os.environ | SANITIZERS | {"LLVM_PROFILE_FILE": profile}
    with log.open("w") as output:
        try:
            status = subprocess.run(
                command,
                cwd=BUILD,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                env=environment,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    text = log.read_text(errors="replace")
    if status != 0:
        result.problem = f"did not end within {limit_s:.0f} s" if status is None else f"status {status}"
        found = sorted(set(CRASHES.iterdir()) - before)
        result.reproducer = found[0] if found else None
        if result.reproducer is None and (match := re.search(r"^Running: (.*)$", text, re.MULTILINE)):
            result.reproducer = Path(match[1])  # A file of the corpus.
        result.told = first_complaint(text)
        announce(f"--- {target}: the end of its output")
        announce("\n".join(text.splitlines()[-60:]))
    return text


def first_complaint(text: str) -> str:
    """What a target says when a property does not hold, or the title of a sanitizer's report."""
    complaint = re.search(
        r"^(operation \d+ of .*|.*CHECK.*|.*ERROR: .*Sanitizer.*|.*ERROR: libFuzzer.*|.*runtime error: .*)$",
        text,
        re.MULTILINE,
    )
    return complaint[1].strip()[:300] if complaint else ""


def last_number(pattern: str, text: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def inputs_of(target: str) -> list[str]:
    """The checked-in corpus, and the inputs that the target's source makes by hand, written out."""
    seeds = BUILD / "seeds" / target
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir(parents=True)
    environment = os.environ | {"LLVM_PROFILE_FILE": os.devnull}
    subprocess.run([str(program(target)), f"--write-seeds={seeds}"], check=True, env=environment)
    return [str(CORPUS / target), str(seeds)]


def fuzz(target: str, seconds: int, seed: int | None) -> Result:
    result = Result(target)
    inputs = inputs_of(target)
    text = run_libfuzzer(result, ["-runs=0", *inputs], str(PROFILES / f"{target}.profraw"), REPLAY_LIMIT_S)
    result.edges = last_number(r"cov: (\d+)", text)
    if result.problem:
        result.problem = "corpus replay: " + result.problem
        return result
    if seconds == 0:
        result.executions = last_number(r"number_of_executed_units: (\d+)", text)
        return result
    fresh = BUILD / ("corpus" if seed is None else "seeded") / target
    if seed is not None:
        shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True, exist_ok=True)
    # Leaks are looked for in the replay: after each new input it would be most of the time.
    arguments = ["-detect_leaks=0", f"-max_total_time={seconds}"]
    if seed is None:
        arguments += [str(fresh), *inputs]
    else:  # A folder is read in whatever order it has.
        files = sorted(str(file) for folder in inputs for file in Path(folder).iterdir())
        listed = fresh.with_suffix(".inputs")
        listed.write_text(",".join(files))
        arguments += [f"-seed={seed}", "-reload=0", f"-seed_inputs=@{listed}", str(fresh)]
    if (dictionary := ROOT / "fuzz" / f"{target}.dict").exists():
        arguments.insert(0, f"-dict={dictionary}")
    before = len(list(fresh.iterdir()))
    text = run_libfuzzer(result, arguments, os.devnull, seconds + REPLAY_LIMIT_S)
    result.executions = last_number(r"number_of_executed_units: (\d+)", text)
    result.per_second = last_number(r"average_exec_per_sec: +(\d+)", text)
    result.edges = max(result.edges, last_number(r"cov: (\d+)", text))
    result.inputs = len(list(fresh.iterdir())) - before
    return result


def coverage_of(targets: list[str], profiles: list[Path], name: str) -> dict[str, dict[str, object]]:
    """Coverage by file, relative to the root, of what the profiles ran."""
    data = PROFILES / f"{name}.profdata"
    subprocess.run(["llvm-profdata-19", "merge", "-sparse", *map(str, profiles), "-o", str(data)], check=True)
    programs = [str(program(targets[0]))]
    for target in targets[1:]:
        programs += ["-object", str(program(target))]
    command = ["llvm-cov-19", "export", f"-instr-profile={data}", "-skip-expansions", "-skip-functions", *programs]
    exported = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    files = json.loads(exported)["data"][0]["files"]
    return {os.path.relpath(os.path.join(BUILD, file["filename"]), ROOT): file for file in files}


def uncovered_branches(file: dict[str, object]) -> list[str]:
    """Where a condition of the source never had one of its two values, over all instantiations of a template."""
    counts: dict[tuple[int, int], list[int]] = {}
    for branch in file["branches"]:  # type: ignore[attr-defined]
        at = counts.setdefault((branch[0], branch[1]), [0, 0])
        at[0] += branch[4]
        at[1] += branch[5]
    lines = []
    for (line, column), (true, false) in sorted(counts.items()):
        if true == 0 or false == 0:
            missing = "neither way" if true == false == 0 else "never true" if true == 0 else "never false"
            lines.append(f"{line}:{column} {missing}")
    return lines


def coverage(results: list[Result]) -> str:
    """Shows the decoders' coverage by the corpus replay; returns what is wrong with it."""
    table = [f"{'decoder':<34}{'lines':>8}{'regions':>9}{'branches':>10}"]
    missing: list[str] = []
    too_low: list[str] = []
    for result in results:
        decoders = TARGETS[result.target][1]
        if not decoders:
            continue
        files = coverage_of([result.target], [PROFILES / f"{result.target}.profraw"], result.target)
        regions = {"count": 0, "covered": 0}
        for decoder in decoders:
            summary: dict[str, dict[str, float]] = files[decoder]["summary"]  # type: ignore[assignment]
            branches = files[decoder]["branches"]
            places = len({(b[0], b[1]) for b in branches})  # type: ignore[attr-defined]
            uncovered = uncovered_branches(files[decoder])
            percent = 100.0 * (1 - len(uncovered) / (2 * places)) if places else 100.0
            for key in regions:
                regions[key] += int(summary["regions"][key])
            lines, parts = summary["lines"]["percent"], summary["regions"]["percent"]
            table.append(f"{decoder:<34}{lines:>7.1f}%{parts:>8.1f}%{percent:>9.1f}%")
            missing += [f"  {decoder}:{place}" for place in uncovered]
            if percent < BRANCH_PERCENT_MIN:
                too_low.append(f"{decoder} {percent:.1f} %")
        result.regions = 100.0 * regions["covered"] / max(1, regions["count"])
    text = "\n".join(
        [
            "Coverage by the corpus replay:",
            *table,
            "",
            "Branches not taken (reasons: docs/internals/fuzzing.md):",
            *missing,
        ]
    )
    (BUILD / "coverage.txt").write_text(text + "\n")
    announce("\n" + text)
    return f"branches below {BRANCH_PERCENT_MIN:.0f} %: {', '.join(too_low)}" if too_low else ""


def merge(targets: list[str]) -> None:
    """Leaves few inputs that reach, with the hand-made ones, every edge that the corpus and all findings reach."""
    for target in targets:
        found, smallest = BUILD / "corpus" / target, BUILD / "merged" / target
        shutil.rmtree(smallest, ignore_errors=True)
        # What the hand-made inputs reach already needs no file.
        shutil.copytree(inputs_of(target)[1], smallest)
        found.mkdir(parents=True, exist_ok=True)
        result = Result(target)
        run_libfuzzer(
            result,
            ["-set_cover_merge=1", "-use_counters=0", str(smallest), str(CORPUS / target), str(found)],
            os.devnull,
            3600,
        )
        if result.problem:
            raise SystemExit(f"{target}: merge failed: {result.problem}")
        for seed in smallest.glob("seed-*"):
            seed.unlink()
        announce(f"{target}: {len(list(smallest.iterdir()))} inputs in {smallest}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=int, default=60, help="per target; 0: only replay the corpus")
    parser.add_argument("--jobs", type=int, default=2, help="parallel compilations and targets")
    parser.add_argument("--seed", type=int, help="the same search every time; default: another one each time")
    parser.add_argument("--merge", action="store_true", help="minimise corpus and findings into build/fuzz/merged")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="default: all")
    arguments = parser.parse_args()
    targets: list[str] = arguments.targets or list(TARGETS)
    build(arguments.jobs)
    shutil.rmtree(PROFILES, ignore_errors=True)
    for folder in (PROFILES, CRASHES):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.merge:
        merge(targets)
        return 0
    started = time.monotonic()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda target: fuzz(target, arguments.seconds, arguments.seed), targets))
    problem = coverage([result for result in results if (PROFILES / f"{result.target}.profraw").exists()])
    announce(f"\n{'target':<14}{'executions':>12}{'exec/s':>9}{'new':>6}{'edges':>8}{'regions':>9}  result")
    for result in results:
        share = f"{result.regions:.1f}%" if result.regions else "-"
        verdict = result.problem or "ok"
        announce(
            f"{result.target:<14}{result.executions:>12}{result.per_second:>9}{result.inputs:>6}"
            f"{result.edges:>8}{share:>9}  {verdict}"
        )
    for result in results:
        if result.reproducer:
            announce(f"reproducer: {program(result.target)} {result.reproducer}")
    announce(f"{time.monotonic() - started:.0f} s")
    for failure in [
        *(result.failure() for result in results if result.problem),
        *([f"coverage: {problem}"] if problem else []),
    ]:
        announce(f"failed: {failure}")
    failed = sum(bool(result.problem) for result in results) + bool(problem)
    announce(f"{len(results) + 1 - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
