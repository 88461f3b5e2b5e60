"""Other systems, measured by the same runner on the same work. What is not installed is skipped, with the reason."""

from __future__ import annotations

from typing import Any

import torch

from bench.system import System, site_folder


def missing(system: type[System]) -> str | None:
    """Why a system with packages of its own cannot run."""
    assert system.site is not None
    return not_installed(system.site)


def not_installed(site: str) -> str | None:
    return None if site_folder(site).is_dir() else f"not installed: make bench-peers PEERS={site}"


def copy_into(target: Any, source: Any) -> None:
    """What a system returned, into the tensors that were there before; for systems that cannot load in place."""
    for key, value in list(target.items() if isinstance(target, dict) else enumerate(target)):
        if isinstance(value, torch.Tensor):
            value.copy_(source[key])
        elif isinstance(value, (dict, list)):
            copy_into(value, source[key])
        else:
            target[key] = source[key]
