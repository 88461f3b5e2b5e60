"""Prints in how many blocks the stamps notice a damage of each kind, as JSON (tests/process/test_boundaries.py)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
from stamps import Stamp

OWN = Stamp("ns", 3, 7, bytes(range(16)), 1)


def bad_blocks(data: np.ndarray) -> int:
    found = OWN.faults(OWN.header()[0], data)
    return int(found[0].split()[2]) if found else 0


def main() -> None:
    own = OWN.blocks()
    before = dataclasses.replace(OWN, step=6)
    one_bit, zeros, torn = own.copy(), own.copy(), own.copy()
    one_bit[5, 77] ^= np.uint64(1 << 40)
    zeros[9] = 0
    torn[100, 256:] = before.blocks()[100, 256:]
    others = {
        "step before": before,
        "other rank": dataclasses.replace(OWN, rank=0),
        "other attempt": dataclasses.replace(OWN, attempt=bytes(16)),
        "other generation": dataclasses.replace(OWN, generation=2),
        "other namespace": dataclasses.replace(OWN, ns="os"),
    }
    counts: dict[str, int | str] = {
        "own": bad_blocks(own),
        "one bit": bad_blocks(one_bit),
        "zeros": bad_blocks(zeros),
        "torn": bad_blocks(torn),
        "shifted": bad_blocks(np.roll(own, 1, axis=0)),
    }
    counts.update({name: bad_blocks(stamp.blocks()) for name, stamp in others.items()})
    counts["header of the step before"] = OWN.faults(before.header()[0], own)[0].split()[3]
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
