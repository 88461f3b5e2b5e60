"""From what a watcher saw of one run to its verdict (reliability reference, section 4).

Everything here works on plain values, so that each verdict is shown to be reachable by observations made up for it
(tests/process/test_boundaries.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

# In order: the first that matches is the verdict.
VERDICTS = (
    "HARD_FAIL",
    "SILENT_DIVERGENCE",
    "WRONG_BYTES",
    "FALSE_COMPLETE",
    "LOST_WORK",
    "LEAK",
    "STALL",
    "PASS",
)


@dataclass(frozen=True)
class Restored:
    """What one rank got from its restore."""

    generation: int
    step: int
    attempt: str


@dataclass
class Observation:
    """One run, from the kill to the silence after the resumed launch. Steps are numbers, -1 is none."""

    prior: list[int] = field(default_factory=list)  # Complete and retained when the window opened.
    retain: int = 2
    completed: int = -1  # Newest step that the ledger or an answer called complete before the resume.
    restored: dict[int, Restored | None] = field(default_factory=dict)  # By rank; None: "there never was a step".
    resumed: int = -1  # Step that the resumed launch brought to level memory.
    listed: list[int] = field(default_factory=list)  # Complete steps listed in the end.
    marker: bool = True  # The file that tells "lost" from "never was" is there.

    needs_human: list[str] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    stalled: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    name: str
    reasons: list[str]


def grade(seen: Observation) -> Verdict:
    newest = max([seen.completed, *seen.prior], default=-1)
    diverged = _divergence(seen, newest)
    lost = [*seen.lost, *_loss(seen, newest)]
    stalled = list(seen.stalled)
    if seen.resumed < 0 and not stalled:
        stalled.append("the resumed launch saved nothing")
    leaked = list(seen.leaked)
    if len(seen.listed) > seen.retain:
        leaked.append(f"{len(seen.listed)} steps are kept, promised were {seen.retain}")
    for name, reasons in zip(
        VERDICTS, (seen.needs_human, diverged, seen.wrong, seen.unreadable, lost, leaked, stalled), strict=False
    ):
        if reasons:
            return Verdict(name, reasons)
    return Verdict("PASS", [])


def _divergence(seen: Observation, newest: int) -> list[str]:
    found = list(seen.diverged)
    if len(set(seen.restored.values())) > 1:
        found.append(f"ranks restored different attempts: {seen.restored}")
    if newest >= 0 and any(r is None for r in seen.restored.values()):
        found.append(f"a rank was told that there never was a step, step {newest} was complete")
    if not seen.marker and (newest >= 0 or seen.listed):
        found.append("the marker is missing: after a loss of memory the job would start from scratch unasked")
    return found


def _loss(seen: Observation, newest: int) -> list[str]:
    found = []
    for rank, restored in seen.restored.items():
        if restored is not None and restored.step < newest:
            found.append(f"rank {rank} resumed from step {restored.step}, step {newest} was complete")
    if seen.resumed >= 0:
        at = max([r.step for r in seen.restored.values() if r is not None], default=-1)
        known = sorted({*(s for s in seen.prior if s <= at), *([at] if at >= 0 else []), seen.resumed})
        promised = known[-seen.retain :]
        if missing := sorted(set(promised) - set(seen.listed)):
            found.append(f"steps {missing} of the promised {promised} are not listed")
    return found
