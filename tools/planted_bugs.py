#!/usr/bin/env python3
"""Shows that the tests notice bugs: wakes one planted bug at a time and expects a failure, none and expects success.

A harness that never failed proves nothing. The bugs are one-line sabotages written as `SP_PLANTED(name)` in the
product's sources; they exist only in a build with -DSP_PLANT_BUG=all (src/base/plant.h). One build serves all of them.
The output ends with a table and with "N passed, N failed": a case passes when its bug was noticed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "planted"
JOBS = 2
BUILD_LIMIT_S = 15 * 60
RUN_LIMIT_S = 120

# Name of the bug: the invariant that it breaks (docs/invariants.md), and what it does.
BUGS: dict[str, tuple[str, str]] = {
    "ack_before_ledger": ("I-5", "replies leave before the ledger has what they acknowledge"),
    "attempt_hash_ignored": ("I-3", "a seal record's attempt may differ from its key's hash"),
    "coverage_ignored": ("I-1", "a step with a gap in a tensor becomes complete"),
    "drain_not_resumed": ("I-30", "a restarted worker forgets what was on its way to the store"),
    "durable_unconfirmed": ("I-23", "a step is called durable although its manifest object was not made"),
    "ends_undrained": ("I-30", "a daemon that is to end does not wait for what was asked to be durable"),
    "fencing_unchecked": ("I-21", "a superseded generation may still write"),
    "group_choice_ignored": ("I-7", "each rank of a restore chooses for itself"),
    "last_block_not_summed": ("I-11", "the copy leaves out the last block's checksum"),
    "latest_ignores_lineage": ("I-6", "a rolled-back job is thrown forward again"),
    "ledger_checksum_ignored": ("I-25", "damaged ledger entries are believed"),
    "ledger_tail_first": ("I-25", "the ledger's end moves before the entry's bytes are there"),
    "lent_across_uids": ("I-38", "memory that was lent to one identity is lent to another"),
    "lineage_not_taken_over": ("I-21", "a node whose memory is new gives out the store's generation numbers again"),
    "listed_without_manifest": ("I-1", "a step is listed before all ranks have sealed"),
    "lost_as_not_found": ("I-31", "a lost namespace looks like a fresh start"),
    "manifest_before_shards": ("I-23", "a step's manifest is made while its shards are on their way"),
    "marker_not_rewritten": ("I-31", "a kill before the marker's file is written is never made good"),
    "mismatch_ignored_on_read": ("I-8", "a restore returns blocks that do not match their checksums"),
    "never_read_back": ("I-23", "what a store took is believed although it compares no checksums"),
    "one_extent_too_many": ("I-27", "the pool grows beyond its limit"),
    "pins_ignored": ("I-17", "a step is retired while it is being restored"),
    "quarantine_keeps_copy": ("I-12", "a corrupt shard is still counted as a copy"),
    "repeat_gets_a_second_lease": ("I-32", "a repeated request has a second effect"),
    "replaced_while_lent": ("I-27", "memory that a process still holds is replaced: more than the pool may have"),
    "retire_early": ("I-14", "one step fewer is kept than promised"),
    "retired_while_draining": ("I-17", "a step is retired while it is on its way to the store"),
    "save_waits_for_store": ("I-22", "a save is refused the memory of a step that the store does not take"),
    "seal_check_ignored": ("I-2", "a checksum list that does not hash to its root is accepted"),
    "slot_of_the_living_reused": ("I-10", "a living writer's slot goes to somebody else"),
    "snapshot_drops_pins": ("I-25", "compaction forgets operators' pins"),
    "snapshot_drops_stored": ("I-25", "compaction forgets what the store has"),
    "store_not_asked": ("I-31", "a node whose memory is new does not ask the store before it answers"),
    "tombstone_forgotten": ("I-16", "a closed attempt is open again after a restart"),
    "zombie_reused": ("I-10", "a slot is reused although its late writer may still store into it"),
}
NONE = "(none)"
SITE = re.compile(r"SP_PLANTED\((\w+)\)")


@dataclass(frozen=True)
class Verdict:
    bug: str
    simulator: str
    unit: str
    seconds: float

    @property
    def passed(self) -> bool:
        noticed = self.simulator != "-" or self.unit != "-"
        return noticed != (self.bug == NONE)


def sites() -> set[str]:
    """Names of the bugs in the sources."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*"):
        if path.suffix in (".cc", ".h") and path.name != "plant.h":
            found.update(SITE.findall(path.read_text()))
    return found


def build() -> Path:
    """Configures and builds the one test program; raises CalledProcessError or TimeoutExpired."""
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "-DSP_PLANT_BUG=all", "-DSP_BUILD_TESTS=ON"]
    configure += ["-DSP_BUILD_PYTHON=OFF", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]
    compile_tests = ["cmake", "--build", str(BUILD), "--target", "planted_tests", "--parallel", str(JOBS)]
    for command in (configure, compile_tests):
        done = subprocess.run(command, cwd=ROOT, timeout=BUILD_LIMIT_S, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout[-8000:] + done.stderr[-8000:], flush=True)
            done.check_returncode()
    return BUILD / "src" / "sim" / "planted_tests"


def noticed(program: Path, bug: str, tests: str) -> str:
    """The first test that fails with the bug awake, "crash" or "hang"; "-" when all pass."""
    command = [str(program), f"--gtest_filter={tests}", "--gtest_fail_fast", "--gtest_brief=1"]
    if bug != NONE:
        command.append(f"--plant={bug}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GTEST_")}
    try:
        done = subprocess.run(
            command, timeout=RUN_LIMIT_S, capture_output=True, text=True, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return "hang"
    if done.returncode == 0:
        return "-"
    if found := re.search(r"(?:\s|\b)(I-\d+: [^\n\"\\]*)", done.stdout) if tests.startswith("Simulator") else None:
        return found.group(1)[:60]
    failed = re.search(r"\[  FAILED  \] (\S+?)[,\s]", done.stdout)
    return failed.group(1) if failed else "crash"


def judge(program: Path, bug: str) -> Verdict:
    started = time.monotonic()
    simulator = noticed(program, bug, "Simulator.NoHistoryBreaksAnInvariant")
    unit = noticed(program, bug, "-Simulator.*")
    return Verdict(bug, simulator, unit, time.monotonic() - started)


def main() -> int:
    started = time.monotonic()
    if difference := sites() ^ set(BUGS):
        print(f"bugs in the sources and in this table differ: {', '.join(sorted(difference))}")
        print(f"0 passed, {len(difference)} failed")
        return 1
    try:
        program = build()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"the tests could not be built: {error}")
        print("0 passed, 1 failed")
        return 1
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)
    with ThreadPoolExecutor(JOBS) as pool:
        verdicts = list(pool.map(lambda bug: judge(program, bug), [NONE, *BUGS]))
    print(f"{'bug':<28}{'breaks':<7}{'seconds':>8}  {'noticed by simulator':<62}noticed by unit test")
    for v in verdicts:
        breaks = BUGS[v.bug][0] if v.bug in BUGS else ""
        mark = "" if v.passed else "   <== FAILED"
        print(f"{v.bug:<28}{breaks:<7}{v.seconds:>8.1f}  {v.simulator:<62}{v.unit}{mark}")
    failed = sum(not v.passed for v in verdicts)
    print(f"{time.monotonic() - started:.0f} s in all")
    print(f"{len(verdicts) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
