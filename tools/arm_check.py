#!/usr/bin/env python3
"""Compiles for 64-bit ARM what runs beside a trainer, and runs the tests of its checksums and copies in an emulator.

The folders from base to client; the daemon's own libraries are not cross-compiled here. Needs Debian's
g++-12-aarch64-linux-gnu and qemu-user-static; GoogleTest is built from the source that libgtest-dev brings. The reports
of the tests go to build/arm64/test-results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "arm64"
COMPILER = "aarch64-linux-gnu-g++-12"
EMULATOR = "qemu-aarch64-static"
GTEST = Path("/usr/src/googletest/googletest")
FOLDERS = ("base", "os", "format", "pool", "catalog", "client")
TESTS = ("src/base/crc32c_test.cc", "src/client/copy_engine_test.cc")
# What those two need of the folders.
LINKED = (
    "src/base/crc32c.cc",
    "src/base/status.cc",
    "src/client/copy_engine*.cc",
    "src/client/copy_kernel*.cc",
    "src/os/*.cc",
)
# As in CMakeLists.txt. The C library's headers are the cross compiler's own, so this machine's come last.
OURS = [
    "-std=c++23",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Werror",
    "-Wno-missing-field-initializers",
    "-Wno-restrict",
    "-Wno-stringop-overflow",
    "-Wno-stringop-overread",
    "-Isrc",
    "-idirafter",
    "/usr/include",
    "-idirafter",
    "/usr/include/x86_64-linux-gnu",
]
THEIRS = ["-std=c++17", "-DGTEST_CAN_STREAM_RESULTS_=0", f"-I{GTEST}", "-idirafter", "/usr/include"]


def sources(patterns: tuple[str, ...]) -> list[str]:
    found = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)}
    return sorted(p for p in found if not p.endswith("_test.cc"))


def compile_one(source: str, flags: list[str]) -> Path | None:
    """The object file; None, and the compiler's words on stderr, when it does not compile."""
    target = BUILD / (source.strip("/").replace("/", "_") + ".o")
    launcher = ["ccache"] if shutil.which("ccache") else []
    done = subprocess.run([*launcher, COMPILER, *flags, "-c", source, "-o", str(target)], cwd=ROOT, check=False)
    return target if done.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    jobs = parser.parse_args().jobs
    shutil.rmtree(BUILD, ignore_errors=True)
    (BUILD / "test-results").mkdir(parents=True)
    linked = sources(LINKED)
    others = sorted(set(sources(tuple(f"src/{folder}/*.cc" for folder in FOLDERS))) - set(linked))
    with ThreadPoolExecutor(jobs) as pool:
        needed = [pool.submit(compile_one, source, [*OURS, "-O2"]) for source in (*linked, *TESTS)]
        needed += [
            pool.submit(compile_one, str(GTEST / "src" / name), [*THEIRS, "-O1"])
            for name in ("gtest-all.cc", "gtest_main.cc")
        ]
        alone = [pool.submit(compile_one, source, [*OURS, "-O0"]) for source in others]
        objects = [each.result() for each in needed]
        rest = [each.result() for each in alone]
    if None in objects or None in rest:
        return 1
    program = BUILD / "arm64_test"
    link = [COMPILER, "-static", *map(str, objects), "-o", str(program), "-lpthread"]
    if subprocess.run(link, cwd=ROOT, check=False).returncode != 0:
        return 1
    report = BUILD / "test-results" / "arm64_test.json"
    return subprocess.run(
        [EMULATOR, str(program), f"--gtest_output=json:{report}", "--gtest_brief=1"], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
