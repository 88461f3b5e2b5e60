"""The documents do not rot: the examples of docs/SEMANTICS.md, docs/dcp.md, docs/interchange.md and the README are run,
in order, each page in a process; what all documents point at is there, and so is every test that they name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["docs/SEMANTICS.md", "docs/dcp.md", "docs/interchange.md", "README.md"])
def test_examples_run_as_printed(page: str, tmp_path: Path) -> None:
    """With no daemon and no settings: the library starts a private one."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks, f"{page} has no examples"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SAFEPOINT_")}
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    environment |= {"XDG_RUNTIME_DIR": str(runtime), "XDG_STATE_HOME": str(tmp_path / "state")}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    for lock in runtime.rglob("*.sock.keeper"):  # The private daemon stays for minutes: end it, it was ours.
        pid = lock.read_text().strip()
        if pid.isdigit():
            os.kill(int(pid), 15)
    assert result.returncode == 0, result.stdout + result.stderr


# --- what the documents name exists


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "src|python|tests|docs|tools|bench|fuzz"


def words_with_braces(path: str) -> list[str]:
    """`ledger.{h,cc}` stands for two files."""
    found = re.search(r"\{([^}]*)\}", path)
    return [path.replace(found[0], part) for part in found[1].split(",")] if found else [path]


def missing_links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    files = [t.partition("#")[0] for t in targets if "://" not in t and not t.startswith(("#", "mailto:"))]
    return [f"link {f}" for f in files if not (page.parent / f).exists()]


def missing_paths(text: str, root: Path = ROOT) -> list[str]:
    """Paths in backticks that begin with a folder of the repository. A last part `x`, or `_x`, is a placeholder; a C++
    file may stand without its ending; `*` is one of the shell."""
    missing = []
    for code in re.findall(r"`([^`\n]+)`", text):
        for word in code.split():
            path = word.split("::")[0].rstrip(".,:;/")
            if not re.match(rf"({FOLDERS})/", path) or re.search(r"(\b|_)x(\.\w+)?$", path):
                continue
            for each in words_with_braces(path):
                if not any(root.glob(each)) and not any(root.glob(each + ".*")):
                    missing.append(f"path {each}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_points_at_exists(page: Path) -> None:
    """A link or a path that leads nowhere is worse than none: whoever follows it takes the rest of the page for old."""
    assert missing_links(page) + missing_paths(page.read_text()) == []


def test_a_path_that_leads_nowhere_is_seen() -> None:
    """The test of the test."""
    told = missing_paths("`src/nowhere.h`, `tools/run_tests.py --fast`, `fuzz/fuzz_x.cc`, `src/format/ledger.{h,zz}`")
    assert told == ["path src/nowhere.h", "path src/format/ledger.zz"]


C_TESTS: dict[str, set[str]] = {
    path.stem: {
        f"{a}.{b}" for a, b in re.findall(r"^TEST(?:_[FP])?\(\s*(\w+),\s*(\w+)", path.read_text(), re.MULTILINE)
    }
    for path in (ROOT / "src").rglob("*.*")
    if path.stem.endswith("_test") or path.stem.endswith("_conformance")
}
PY_TESTS: dict[str, set[str]] = {
    path.stem: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    for path in (ROOT / "tests").rglob("test_*.py")
}
# One case of a test each: a key of the dict that it is parametrized by.
PY_TESTS["test_fail_nth"] |= set(
    re.findall(r'^    "(\w+)": \(', (ROOT / "tests/process/test_fail_nth.py").read_text(), re.MULTILINE)
)
SHORT = {
    "core": "node_core_test",
    "durable": "node_core_durable_test",
    "restart": "node_core_restart_test",
    "catalog": "catalog_test",
    "pool": "pool_test",
    "sim": "sim_test",
}


EVERYWHERE = set().union(*C_TESTS.values())


def exists(where: str, name: str) -> bool | None:
    """Whether file `where` (empty: any) has the test; None where this is no name of a test. Of a pytest function a part
    of its name is enough; a C++ test has its suite or not; a last `*` stands for any."""
    if name == "all":
        return True
    if where == "fuzz":
        return (ROOT / "fuzz" / f"fuzz_{name}.cc").exists()
    if where in PY_TESTS:
        return any(name in test for test in PY_TESTS[where])
    with_suite = re.match(r"[A-Z]\w*\.", name) is not None
    if where not in C_TESTS and not with_suite:
        return None
    known = C_TESTS.get(where, EVERYWHERE)
    known = known if with_suite else {test.partition(".")[2] for test in known}
    return any(test.startswith(name[:-1]) for test in known) if name.endswith("*") else name in known


def unknown_tests(entry: str) -> tuple[list[str], int]:
    """Of `file: name, name` those that no file of tests has, and how many were understood. What has spaces in it is
    prose, and so are parentheses, but for files named in them."""
    wrong, count = [], 0
    for file in re.findall(r"\b(?:test_\w+|[a-z]\w*_test|fuzz_\w+)\b", entry):
        count += 1
        functions = [test for tests in PY_TESTS.values() for test in tests]
        if file not in {*PY_TESTS, *C_TESTS, *functions} and not (ROOT / "fuzz" / f"{file}.cc").exists():
            wrong.append(file)
    file, _, names = re.sub(r"\([^)]*\)", "", entry).replace("`", "").rpartition(":")
    where = SHORT.get(file.strip(), file.strip())
    for name in map(str.strip, names.split(",")):
        found = exists(where, name) if re.fullmatch(r"[\w.]+\*?", name) else None
        count += found is not None
        if found is False:
            wrong.append(f"{where}: {name}" if where else name)
    return wrong, count


@pytest.mark.parametrize("page, least", [("track-record", 50), ("invariants", 250)])
def test_named_tests_exist(page: str, least: int) -> None:
    """An invariant that cites a test which was renamed or went away is decided by nothing."""
    wrong: list[str] = []
    count = 0
    for line in (ROOT / "docs" / f"{page}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")] if line.startswith("|") else []
        for cell in cells[1:]:
            for entry in re.sub(r"\([^)]*\)", lambda m: m[0].replace(";", ","), cell).split(";"):
                told, found = unknown_tests(entry)
                wrong += [f"{cells[0][:40]}: {t}" for t in told]
                count += found
    assert wrong == []
    assert count >= least, f"only {count} names understood: the form of {page}.md has changed"


def test_a_name_of_no_test_is_seen() -> None:
    """The test of the test."""
    for entry, told in {
        "core: Saves.TheLedgerHasASealBeforeItsReply, Saves.Nothing": ["node_core_test: Saves.Nothing"],
        "catalog: LevelsFall": ["catalog_test: LevelsFall"],
        "test_dcp: guarded, unguarded": ["test_dcp: unguarded"],
        "test_nothing: all": ["test_nothing"],
        "fuzz: messages, nothing": ["fuzz: nothing"],
        "Space.*, Vacuum.*": ["Vacuum.*"],
    }.items():
        assert unknown_tests(entry)[0] == told, entry
