"""A reduced ckpt-chaos campaign on exported folders (examples/chaos): kill the writer, resume from files, same end."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "chaos"))
import campaign


def judged(folder: Path, writer: str, modes: tuple[str, ...], points: int) -> dict[str, str]:
    """Verdicts by crash point; every crash did happen."""
    rows = campaign.run(campaign.Campaign("test", writer, modes=modes), folder, max_points=points, jobs=2)
    assert campaign.not_injected(folder / "work", rows) == []
    assert campaign.left_behind(folder / "work") == []
    return {row.label: row.verdict for row in rows}


def test_every_killed_export_resumes_to_the_same_end(tmp_path: Path) -> None:
    """F1, I-1: half of an export is never taken for a step, and what was exported is not lost."""
    verdicts = judged(tmp_path / "ours", "safepoint", ("torn", "before"), 4)
    assert len(verdicts) == 5 and set(verdicts.values()) == {"PASS"}, verdicts


def test_a_writer_in_place_is_caught(tmp_path: Path) -> None:
    """The planted bug: without a rename at the end, half a file is taken for a step."""
    verdicts = judged(tmp_path / "planted", "in-place", ("torn",), 1)
    assert list(verdicts.values()) == ["PASS", "HARD_FAIL"], verdicts
