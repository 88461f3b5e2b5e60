"""tools/run_tests.py decides what a run of all tests says: a second look may clear an accident, never a failure."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tests", ROOT / "tools" / "run_tests.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_tests", module)  # dataclasses look their module up.
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    module.RESULTS.mkdir()
    return module


def write_tests(folder: Path, **bodies: str) -> str:
    folder.mkdir()
    lines = ["import pathlib", f"ran = pathlib.Path({str(folder / 'ran')!r})"]
    for name, body in bodies.items():
        lines += [f"def test_{name}():", f"    {body}"]
    (folder / "test_planned.py").write_text("\n".join(lines) + "\n")
    return str(folder)


FAILS_ONCE = "before = ran.exists(); ran.touch(); assert before"


def test_what_passes_alone_is_counted_and_named(runner: ModuleType, tmp_path: Path) -> None:
    outcome = runner.pytest_stage(write_tests(tmp_path / "planned", unsteady=FAILS_ONCE, good="pass"))(1)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (2, 0, 0)
    assert [name.rsplit("::", 1)[-1] for name in outcome.unsteady] == ["test_unsteady"]


def test_what_fails_twice_has_failed(runner: ModuleType, tmp_path: Path) -> None:
    outcome = runner.pytest_stage(write_tests(tmp_path / "planned", bad="assert False", unsteady=FAILS_ONCE))(1)
    assert (outcome.passed, outcome.failed) == (1, 1)
    assert "test_bad" in outcome.failures[0]


def test_many_failures_are_no_accident(runner: ModuleType, tmp_path: Path) -> None:
    worse = {f"bad_{number}": "assert False" for number in range(runner.SECOND_LOOKS)}
    outcome = runner.pytest_stage(write_tests(tmp_path / "worse", unsteady=FAILS_ONCE, **worse))(1)
    assert (outcome.failed, outcome.unsteady) == (runner.SECOND_LOOKS + 1, [])


def test_a_set_up_that_fails_many_is_one_accident(runner: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "planned"
    write_tests(folder, **{f"user_{number}": "pass" for number in range(2 * runner.SECOND_LOOKS)})
    tests = folder / "test_planned.py"
    fixture = "import pytest\n@pytest.fixture(scope='module', autouse=True)\ndef shared():\n    "
    tests.write_text(tests.read_text() + fixture + FAILS_ONCE + "\n    yield\n")
    outcome = runner.pytest_stage(str(folder))(1)
    assert (outcome.passed, outcome.failed, len(outcome.unsteady)) == (
        2 * runner.SECOND_LOOKS,
        0,
        2 * runner.SECOND_LOOKS,
    )


def junit(path: Path, **programs: tuple[str, str]) -> Path:
    cases = "".join(
        f'<testcase name="{name}" status="{status}"><system-out>{output}</system-out></testcase>'
        for name, (status, output) in programs.items()
    )
    path.write_text(f"<testsuite>{cases}</testsuite>")
    return path


def test_programs_of_ctest(runner: ModuleType, tmp_path: Path) -> None:
    first = junit(tmp_path / "first.xml", good=("run", ""), late=("fail", "took 2 s"), bad=("fail", "wrong"))
    assert runner.worth_a_second_look(first) == ["late", "bad"]
    second = junit(tmp_path / "second.xml", late=("run", ""), bad=("fail", "wrong"))
    runner.merge_second_look(first, second)
    outcome = runner.Outcome()
    runner.count_ctest(first, tmp_path, outcome)
    assert (outcome.passed, outcome.failed) == (2, 1)


def test_a_sanitizers_report_is_final(runner: ModuleType, tmp_path: Path) -> None:
    report = junit(tmp_path / "first.xml", racy=("fail", "WARNING: ThreadSanitizer: data race"), late=("fail", ""))
    assert runner.worth_a_second_look(report) == []
