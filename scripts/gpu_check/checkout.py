# SPDX-License-Identifier: Apache-2.0
"""The checkout's packages without installing them: `lynx_kernels` is the folder `kernels`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def use_checkout() -> None:
    """Import `lynx_connector` and `lynx_kernels` from here, even where others are installed."""
    sys.path.insert(0, str(ROOT))
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "lynx_kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    package = importlib.util.module_from_spec(spec)
    sys.modules["lynx_kernels"] = package
    spec.loader.exec_module(package)
