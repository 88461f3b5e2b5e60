"""Makes `from safepoint import _core` work without importing torch: import this module first."""

from __future__ import annotations

import importlib.util
import sys
import types

if "safepoint" not in sys.modules:
    found = importlib.util.find_spec("safepoint")
    assert found is not None and found.submodule_search_locations is not None
    package = types.ModuleType("safepoint")
    package.__path__ = list(found.submodule_search_locations)
    package.__file__ = found.origin
    sys.modules["safepoint"] = package
