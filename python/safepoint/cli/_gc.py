"""The verb `gc`: deletes steps of a durable tier by a rule, and says what and why before it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.table import Table

from safepoint import errors
from safepoint.cli._common import AsJson, Namespace, console, human_bytes, print_json, reported
from safepoint.cli._places import StorePlace


@dataclass(frozen=True, slots=True)
class Rule:
    """What stays: the newest `last` steps, and every step that is a multiple of `every`."""

    last: int
    every: int | None

    def why_kept(self, step: int, age: int) -> str | None:
        """`age`: how many newer steps there are. None: it goes."""
        if age == 0:
            return "the newest step always stays"
        if age < self.last:
            return f"among the newest {self.last}"
        if self.every is not None and step % self.every == 0:
            return f"a multiple of {self.every}"
        return None


def gc(
    url: Annotated[str, typer.Argument(help="The durable tier: file:///path.", metavar="URL")],
    keep_last: Annotated[int, typer.Option(min=1, help="The newest steps that stay.")],
    keep_every: Annotated[int | None, typer.Option(min=1, help="Steps that are a multiple of this stay, too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and why the rest stays.")] = False,
    namespace: Namespace = None,
    as_json: AsJson = False,
) -> None:
    """Delete old steps of a durable tier, each manifest first. Never the newest step, never an object that is not ours.

    Steps that a daemon has not finished yet have no manifest, and are not looked at.
    """
    rule = Rule(keep_last, keep_every)
    with reported():
        place = StorePlace(url)
        spaces = [namespace] if namespace is not None else place.namespaces()
        if namespace is not None and not place.store.steps(namespace):
            raise errors.NotFound(f"{url}: namespace {namespace} has no whole step")
        rows: list[dict[str, object]] = []
        table = Table("namespace", "step", "size", "what", "why")
        freed = 0
        for space in spaces:
            ages: dict[int, int] = {}  # By user: each one's newest step stays.
            for name, pin in place.pins(space):
                info, age = pin.info, ages.get(pin.uid, 0)
                ages[pin.uid] = age + 1
                kept = rule.why_kept(info.step, age)
                if kept is None:
                    freed += info.bytes
                    if not dry_run:
                        place.store.delete(name)
                what = "stays" if kept is not None else "would go" if dry_run else "deleted"
                why = kept or f"not among the newest {rule.last}"
                rows.append(
                    {
                        "namespace": space,
                        "step": info.step,
                        "attempt": info.attempt.hex(),
                        "uid": pin.uid,
                        "bytes": info.bytes,
                        "what": what,
                        "why": why,
                    }
                )
                table.add_row(space, str(info.step), human_bytes(info.bytes), what, why)
        if as_json:
            return print_json({"url": url, "dry_run": dry_run, "bytes": freed, "steps": rows})
        console.print(table)
        verb = "would be freed" if dry_run else "freed"
        console.print(f"{url}: {human_bytes(freed)} {verb}", highlight=False)
