# SPDX-License-Identifier: Apache-2.0
"""A compiled kernel comes from the disk cache until a source of the package changes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[3] / "kernels"
COMPILE = """
from lynx_kernels.raw import cpu
stats = cpu._copier(2, True).stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


@pytest.fixture
def compile_in(tmp_path):
    """Compiles a kernel of a copy of the package in a fresh process: (from the cache, compiled)."""
    shutil.copytree(
        KERNELS, tmp_path / "lynx_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )

    def run() -> tuple[int, int]:
        environment = os.environ | {
            "PYTHONPATH": str(tmp_path),
            "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        hits, misses = map(int, done.stdout.split())
        return hits, misses

    return run


def test_a_kernel_is_compiled_anew_when_a_file_that_it_inlines_changes(compile_in, tmp_path):
    assert compile_in() == (0, 1)
    assert compile_in() == (1, 0)
    inlined = tmp_path / "lynx_kernels" / "shared" / "tiles_cpu.py"
    inlined.write_text(inlined.read_text() + "\n# another file than the kernel's own\n")
    assert compile_in() == (0, 1)
