"""I-42: what the daemon acknowledged, judged by its log alone.

`check(lines)` returns what is wrong with the events of one keeper's life. A worker that was killed between an entry of
the ledger and its line leaves a gap that nobody was told of; so a gap is an error only where no worker was replaced
since the namespace's generation was opened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]


class _Attempt:
    def __init__(self) -> None:
        self.sealed: dict[int, Event] = {}
        self.granted: set[int] = set()
        self.complete: Event | None = None
        self.ended: str | None = None


class _Checker:
    def __init__(self) -> None:
        self.problems: list[str] = []
        self.attempts: dict[str, _Attempt] = defaultdict(_Attempt)
        self.of_namespace: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.generation: dict[tuple[str, str], int] = {}
        self.gaps: set[tuple[str, str]] = set()  # Namespaces that were there when a worker was replaced.

    def wrong(self, event: Event, what: str) -> None:
        self.problems.append(
            f"{event['event']} of step {event.get('step')} attempt {event.get('attempt', '')[:8]}: {what}"
        )

    def take(self, event: Event) -> None:
        handler = getattr(self, f"on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def known(self, event: Event) -> _Attempt:
        if event["attempt"] not in self.attempts:
            self.of_namespace[self.key(event)].append(event["attempt"])
        return self.attempts[event["attempt"]]

    @staticmethod
    def key(event: Event) -> tuple[str, str]:
        return event["uid"], event["namespace"]

    def on_worker_serving(self, event: Event) -> None:
        if event["incarnation"] != "1":
            self.gaps.update(self.generation)

    def on_generation_opened(self, event: Event) -> None:
        key, number = self.key(event), int(event["generation"])
        if number <= self.generation.get(key, 0):
            self.wrong(event, f"generation {number} after {self.generation[key]}")
        self.generation[key] = number

    def on_lease_granted(self, event: Event) -> None:
        self.in_force(event)
        attempt = self.known(event)
        if attempt.ended or attempt.complete:
            self.wrong(event, "after its end")
        attempt.granted.add(int(event["rank"]))

    def on_shard_sealed(self, event: Event) -> None:
        self.in_force(event)
        attempt, rank = self.known(event), int(event["rank"])
        if attempt.ended:
            self.wrong(event, f"after it was {attempt.ended}")
        if rank in attempt.sealed:
            self.wrong(event, f"rank {rank} sealed twice")
        if rank not in attempt.granted and self.key(event) not in self.gaps:
            self.wrong(event, f"rank {rank} had no lease")
        attempt.sealed[rank] = event

    def on_attempt_complete(self, event: Event) -> None:
        attempt = self.known(event)
        if attempt.complete or attempt.ended:
            self.wrong(event, "after its end")
        attempt.complete = event
        whole = set(range(int(event["world_size"])))
        if set(attempt.sealed) - whole or (set(attempt.sealed) != whole and self.key(event) not in self.gaps):
            self.wrong(event, f"ranks {sorted(attempt.sealed)} of {len(whole)} had sealed")
        elif set(attempt.sealed) == whole:
            total = sum(int(seal["bytes"]) for seal in attempt.sealed.values())
            if total != int(event["bytes"]):
                self.wrong(event, f"{event['bytes']} bytes, its seals have {total}")

    def on_attempt_closed(self, event: Event) -> None:
        attempt = self.known(event)
        if attempt.complete or attempt.ended:
            self.wrong(event, "after its end")
        attempt.ended = "closed"

    def on_attempt_retired(self, event: Event) -> None:
        attempt = self.known(event)
        if attempt.complete is None and self.key(event) not in self.gaps:
            self.wrong(event, "it was never complete")
        attempt.ended = "retired"
        others = (self.attempts[each] for each in self.of_namespace[self.key(event)])
        if not any(other.complete and not other.ended for other in others) and self.key(event) not in self.gaps:
            self.wrong(event, "it was the last complete one (I-14)")

    def in_force(self, event: Event) -> None:
        current = self.generation.get(self.key(event))
        if current is None:
            if self.key(event) not in self.gaps:
                self.wrong(event, "its generation was never opened")
        elif int(event["generation"]) < current:
            self.wrong(event, f"generation {event['generation']} was superseded by {current} (I-21)")
        elif int(event["generation"]) > current and self.key(event) not in self.gaps:
            self.wrong(event, f"generation {event['generation']} was never opened")


def check(events: Iterable[Event]) -> list[str]:
    checker = _Checker()
    for event in events:
        checker.take(event)
    return checker.problems
