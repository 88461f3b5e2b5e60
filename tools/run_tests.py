#!/usr/bin/env python3
"""Runs the stages of the test run one after another and adds up what they found.

A failing stage never stops the later ones. The output ends with a table (one row per stage) and, as its last line,
"N passed, N failed, N skipped", which is also written to build/test-results/summary.txt. The exit status is 0 only when
nothing failed and every stage ran at least one case: a stage that finds no test proves nothing and counts as a failure.

What counts as one case: a GoogleTest case, a ctest program that is no GoogleTest program, a pytest item, a lint
check, the build of the wheel.

A few tests judge time, and a machine that does something else for a second can fail one of them. So where at most
SECOND_LOOKS programs or pytest items of a stage failed (a set-up that several items share counts once), those run once
more, alone. What fails again has failed; what passes then counts as passed and is named under "Unsteady", every time:
it is to be looked into, not to be got used to.
What a sanitizer reported is never looked at again: a race that shows once is there.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "test-results"
STUB = ROOT / "python" / "safepoint" / "_core.pyi"
SUMMARY_LINE = re.compile(r"^(\d+) passed, (\d+) failed(?:, (\d+) skipped)?$")

# Limits in seconds. A hang must end as a failure that names its stage, before the whole run is cut off from outside.
BUILD_LIMIT_S = 30 * 60
TEST_LIMIT_S = 20 * 60

# Of one stage. More failures than that are no accident.
SECOND_LOOKS = 5
SANITIZER_REPORT = re.compile(r"(Address|Thread|Leak|UndefinedBehavior)Sanitizer|runtime error:")


@dataclass
class Outcome:
    """What one stage found; `failures` are lines for people, in addition to the output above the table.

    `unsteady` names what failed once and passed when it ran again; it is counted in `passed`.
    """

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    unsteady: list[str] = field(default_factory=list)

    def fail(self, reason: str) -> None:
        self.failed += 1
        self.failures.append(reason)


@dataclass(frozen=True)
class Stage:
    name: str
    title: str
    run: Callable[[int], Outcome]


def announce(text: str) -> None:
    print(text, flush=True)


def stop_group(process: subprocess.Popen[str]) -> None:
    """Ends the process and what it started; each command below leads a process group of its own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(command: Sequence[str], limit_s: float, log: Path | None = None) -> str | None:
    """Runs the command in the repository root, shows its output, returns None or the reason of its failure.

    With `log` the output goes to that file and is shown from there. No pipe is involved: a pipe stays open for as long
    as any process that the command left behind, and reading it to the end could wait for ever.
    """
    announce("+ " + " ".join(command))
    output = log.open("w") if log else None
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + limit_s
    shown = 0
    status = None
    try:
        while status is None and time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=min(1.0, limit_s))
            if log:
                text = log.read_text(errors="replace")
                print(text[shown:], end="", flush=True)
                shown = len(text)
    finally:
        if status is None:
            stop_group(process)
        if output:
            output.close()
    if status is None:
        return f"{' '.join(command)}: did not end within {limit_s:.0f} s"
    return None if status == 0 else f"{' '.join(command)}: ended with status {status}"


def build_stage(_jobs: int) -> Outcome:
    """The wheel, which the lint, pytest and planted-bug stages use; the C++ stages run even when it does not build."""
    outcome = Outcome()
    if problem := run(["make", "build"], BUILD_LIMIT_S):
        outcome.fail(problem)
    else:
        outcome.passed += 1
    return outcome


def count_gtest(report: Path, outcome: Outcome) -> int:
    """Adds the cases of one GoogleTest JSON report to `outcome`; returns how many of them failed."""
    failed = 0
    for suite in json.loads(report.read_text())["testsuites"]:
        for case in suite["testsuite"]:
            if case.get("failures"):
                failed += 1
                outcome.fail(f"{report.stem}: {suite['name']}.{case['name']}")
            elif case["result"] == "COMPLETED":
                outcome.passed += 1
            else:  # SKIPPED, or SUPPRESSED for a case that its name disables.
                outcome.skipped += 1
    return failed


def count_ctest(junit: Path, reports: Path, outcome: Outcome) -> None:
    """Adds every program that ctest ran: by its GoogleTest cases where it left a report, else as one case."""
    for program in ElementTree.parse(junit).getroot().iter("testcase"):
        name = program.get("name", "?")
        report = reports / f"{name}.json"
        succeeded = program.get("status") == "run"
        has_report = report.exists()
        failed_cases = count_gtest(report, outcome) if has_report else 0
        if succeeded and not has_report:
            outcome.passed += 1
        elif not succeeded and failed_cases == 0:
            # A crash, a time limit, or a sanitizer's finding after the last case: only the exit status says so.
            outcome.fail(f"{name}: the program itself failed (ctest: {program.get('status')})")


def worth_a_second_look(junit: Path) -> list[str]:
    """Programs that failed, if they are few and no sanitizer reported anything about one of them."""
    failed = failed_programs(junit)
    if len(failed) > SECOND_LOOKS or any(SANITIZER_REPORT.search(output) for output in failed.values()):
        return []
    return list(failed)


def failed_programs(junit: Path) -> dict[str, str]:
    """Name and output of each program that failed."""
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    return {case.get("name", "?"): "".join(case.itertext()) for case in cases if case.get("status") != "run"}


def merge_second_look(junit: Path, second: Path) -> None:
    """The programs in `second` take their places in `junit`."""
    first = ElementTree.parse(junit)
    root = first.getroot()
    for case in ElementTree.parse(second).getroot().findall("testcase"):
        for old in [old for old in root.findall("testcase") if old.get("name") == case.get("name")]:
            root.remove(old)
        root.append(case)
    first.write(junit)


def without_address_randomisation() -> list[str]:
    """Command prefix for ThreadSanitizer, whose shadow memory collides with highly randomised maps on newer kernels."""
    prefix = ["setarch", platform.machine(), "-R"]
    if shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
        return prefix
    return []


def cpp_stage(preset: str) -> Callable[[int], Outcome]:
    def stage(jobs: int) -> Outcome:
        outcome = Outcome()
        build = ROOT / "build" / preset
        configure = ["cmake", "--preset", preset]
        compile_all = ["cmake", "--build", "--preset", preset, "--parallel", str(jobs)]
        for command in (configure, compile_all):
            if problem := run(command, BUILD_LIMIT_S):
                outcome.fail(problem)
                return outcome
        reports = build / "test-results"
        shutil.rmtree(reports, ignore_errors=True)
        reports.mkdir()
        junit = reports / "ctest.xml"
        prefix = without_address_randomisation() if preset == "tsan" else []
        ctest = ["ctest", "--preset", preset, "--parallel", str(jobs), "--output-junit", str(junit)]
        problem = run([*prefix, *ctest], TEST_LIMIT_S)
        if junit.exists() and (again := worth_a_second_look(junit)):
            # The reports of these programs are written anew, so each program is counted once, by its second run.
            second = reports / "second.xml"
            for name in again:
                (reports / f"{name}.json").unlink(missing_ok=True)
            names = "^(" + "|".join(re.escape(name) for name in again) + ")$"
            once_more = ["ctest", "--preset", preset, "--tests-regex", names, "--output-junit", str(second)]
            problem = run([*prefix, *once_more], TEST_LIMIT_S)
            if second.exists():
                merge_second_look(junit, second)
                outcome.unsteady += [name for name in again if name not in failed_programs(second)]
        if junit.exists():
            count_ctest(junit, reports, outcome)
        if problem and not outcome.failed:
            outcome.fail(problem)
        return outcome

    return stage


def arm_stage(jobs: int) -> Outcome:
    """tools/arm_check.py compiles the library for 64-bit ARM and runs its checksums and copies in an emulator."""
    outcome = Outcome()
    problem = run([sys.executable, "-u", "tools/arm_check.py", "--jobs", str(jobs)], BUILD_LIMIT_S)
    report = ROOT / "build" / "arm64" / "test-results" / "arm64_test.json"
    if report.exists():
        count_gtest(report, outcome)
    if problem and not outcome.failed:
        outcome.fail(problem)
    return outcome


PytestCase = tuple[str, str]  # Class (the module, if there is none) and name, as in a JUnit file.


def pytest_cases(junit: Path) -> dict[PytestCase, str]:
    """What became of each item: "passed", "failed" or "skipped"."""
    found: dict[PytestCase, str] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        verdict = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        key = (case.get("classname", "?"), case.get("name", "?"))
        # An item whose clean-up failed is listed twice.
        found[key] = "failed" if "failed" in (verdict, found.get(key)) else verdict
    return found


def shared_causes(junit: Path) -> set[PytestCase]:
    """The items that failed, but those of one module whose set-up failed with one message as one."""
    causes: set[PytestCase] = set()
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        where = case.get("classname", "?")
        causes |= {(where, error.get("message", "?")) for error in case.iter("error")}
        causes |= {(where, case.get("name", "?")) for _ in case.iter("failure")}
    return causes


def pytest_stage(folder: str) -> Callable[[int], Outcome]:
    def stage(_jobs: int) -> Outcome:
        outcome = Outcome()
        junit, second = (RESULTS / f"{Path(folder).name}{suffix}.xml" for suffix in ("", "-second"))
        for report in (junit, second):
            report.unlink(missing_ok=True)
        cache = f"--override-ini=cache_dir={RESULTS / 'pytest-cache' / Path(folder).name}"
        command = [sys.executable, "-m", "pytest", cache, folder]
        problem = run([*command, f"--junitxml={junit}"], TEST_LIMIT_S)
        cases = pytest_cases(junit) if junit.exists() else {}
        failed = {case for case, verdict in cases.items() if verdict == "failed"}
        causes = failed if len(failed) <= SECOND_LOOKS else shared_causes(junit)
        if 0 < len(causes) <= SECOND_LOOKS:
            only_those = ["--last-failed", "--last-failed-no-failures", "none"]
            problem = run([*command, *only_those, f"--junitxml={second}"], TEST_LIMIT_S)
            again = pytest_cases(second) if second.exists() else {}
            for case in failed & again.keys():
                cases[case] = again[case]
                if again[case] == "passed":
                    outcome.unsteady.append("::".join(case))
        for case, verdict in cases.items():
            if verdict == "failed":
                outcome.fail("::".join(case))
            elif verdict == "skipped":
                outcome.skipped += 1
            else:
                outcome.passed += 1
        if problem and not outcome.failed:
            outcome.fail(problem)
        return outcome

    return stage


def fresh_stub() -> str:
    """The type stub of the installed extension. Raises CalledProcessError when it cannot be imported."""
    target = ROOT / "build" / "stub" / "_core.pyi"
    target.parent.mkdir(parents=True, exist_ok=True)
    generate = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "safepoint._core", "-o", str(target)]
    subprocess.run(generate, cwd=ROOT, check=True)
    return target.read_text()


def stub_problem() -> str | None:
    try:
        fresh = fresh_stub()
    except subprocess.CalledProcessError as error:
        return f"stub generator ended with status {error.returncode}"
    checked_in = STUB.read_text() if STUB.exists() else ""
    if checked_in == fresh:
        return None
    difference = difflib.unified_diff(checked_in.splitlines(), fresh.splitlines(), "checked in", "fresh", lineterm="")
    announce("\n".join(difference))
    return "the checked-in type stub is out of date; run `make stubs`"


def lint_stage(_jobs: int) -> Outcome:
    outcome = Outcome()
    problems = [
        run([sys.executable, "-m", "ruff", "check", "."], TEST_LIMIT_S),
        run([sys.executable, "-m", "ruff", "format", "--check", "."], TEST_LIMIT_S),
        run([sys.executable, "-m", "mypy"], TEST_LIMIT_S),
        stub_problem(),
    ]
    for problem in problems:
        if problem:
            outcome.fail(problem)
        else:
            outcome.passed += 1
    return outcome


def planted_stage(_jobs: int) -> Outcome:
    """tools/planted_bugs.py builds with one known bug at a time; a case passes when the tests notice the bug."""
    outcome = Outcome()
    log = RESULTS / "planted.txt"
    problem = run([sys.executable, "-u", "tools/planted_bugs.py"], TEST_LIMIT_S, log)
    lines = log.read_text(errors="replace").splitlines()
    if lines and (match := SUMMARY_LINE.match(lines[-1])):
        outcome.passed, outcome.failed, outcome.skipped = (int(count or 0) for count in match.groups())
        if outcome.failed:
            outcome.failures.append(f"planted bugs: {lines[-1]}")
    else:
        outcome.fail("tools/planted_bugs.py did not end with its summary line")
    if problem and not outcome.failed:
        outcome.fail(problem)
    return outcome


def fuzz_stage(jobs: int) -> Outcome:
    """tools/fuzz.py builds the fuzz targets with clang, replays their corpora and searches for a minute each."""
    outcome = Outcome()
    log = RESULTS / "fuzz.txt"
    # The same search each time, so that what passed on one machine passes on the next; `make fuzz` looks elsewhere.
    command = [sys.executable, "-u", "tools/fuzz.py", "--seconds", "60", "--seed", "1", "--jobs", str(jobs)]
    problem = run(command, BUILD_LIMIT_S, log)
    lines = log.read_text(errors="replace").splitlines()
    if lines and (match := SUMMARY_LINE.match(lines[-1])):
        outcome.passed, outcome.failed, outcome.skipped = (int(count or 0) for count in match.groups())
        outcome.failures += [line.removeprefix("failed: ") for line in lines if line.startswith("failed: ")]
        if outcome.failed and not outcome.failures:
            outcome.failures.append(f"fuzz targets: {lines[-1]}")
    else:
        outcome.fail("tools/fuzz.py did not end with its summary line")
    if problem and not outcome.failed:
        outcome.fail(problem)
    return outcome


STAGES = [
    Stage("build", "wheel with the extension and the daemon", build_stage),
    Stage("lint", "ruff, mypy --strict, type stub", lint_stage),
    Stage("cpp", "C++ tests, optimised", cpp_stage("release")),
    Stage("asan", "C++ tests, address and undefined-behaviour sanitizers", cpp_stage("asan")),
    Stage("tsan", "C++ tests, thread sanitizer", cpp_stage("tsan")),
    Stage("arm", "64-bit ARM: the library compiles, checksums and copies in an emulator", arm_stage),
    Stage("fuzz", "fuzz targets of every decoder, a minute each", fuzz_stage),
    Stage("python", "pytest tests/python", pytest_stage("tests/python")),
    Stage("process", "pytest tests/process", pytest_stage("tests/process")),
]
if (ROOT / "tools" / "planted_bugs.py").exists():
    STAGES.append(Stage("planted", "planted bugs", planted_stage))


def run_stages(stages: Sequence[Stage], jobs: int) -> int:
    """Runs the stages, prints the table and the last line; returns the exit status."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    summary_file = RESULTS / "summary.txt"
    summary_file.unlink(missing_ok=True)
    rows: list[tuple[Stage, Outcome, float]] = []
    for number, stage in enumerate(stages, start=1):
        announce(f"\n==> [{number}/{len(stages)}] {stage.name}: {stage.title}")
        started = time.monotonic()
        outcome = stage.run(jobs)
        if outcome.passed + outcome.failed == 0:
            outcome.fail("no test ran")
        rows.append((stage, outcome, time.monotonic() - started))

    unsteady = [f"  {stage.name}: {line}" for stage, outcome, _ in rows for line in outcome.unsteady]
    if unsteady:
        announce("\nUnsteady (failed, then passed alone):\n" + "\n".join(unsteady))
    failures = [f"  {stage.name}: {line}" for stage, outcome, _ in rows for line in outcome.failures]
    if failures:
        announce("\nFailures:\n" + "\n".join(failures))
    announce(f"\n{'stage':<10}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for stage, outcome, seconds in rows:
        announce(f"{stage.name:<10}{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}{seconds:>9.1f}")
    failed = sum(outcome.failed for _, outcome, _ in rows)
    passed = sum(outcome.passed for _, outcome, _ in rows)
    skipped = sum(outcome.skipped for _, outcome, _ in rows)
    line = f"{passed} passed, {failed} failed, {skipped} skipped"
    summary_file.write_text(line + "\n")
    announce("\n" + line)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--jobs", type=int, default=2, help="parallel compilations and test programs")
    parser.add_argument("--write-stub", action="store_true", help="only write python/safepoint/_core.pyi")
    parser.add_argument("stages", nargs="*", choices=[[], *(stage.name for stage in STAGES)], help="default: all")
    arguments = parser.parse_args()
    if arguments.write_stub:
        STUB.write_text(fresh_stub())
        return 0
    chosen = [stage for stage in STAGES if not arguments.stages or stage.name in arguments.stages]
    return run_stages(chosen, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())
