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
import sys
from lynx_kernels.raw import cpu
from lynx_kernels.shared import tiles_cpu
for argument in sys.argv[1:]:
    if argument == "edit":
        with open(tiles_cpu.__file__, "a") as source:
            source.write("# edited by a running process\\n")
    else:
        stats = cpu._copier(int(argument), True).stats
        print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
LOADED, COMPILED = (1, 0), (0, 1)


@pytest.fixture
def compile_in(tmp_path):
    """Compiles a kernel of a copy of the package in a fresh process, for elements of these sizes;
    says of each whether it came from the cache. "edit" changes a file that the kernel inlines.
    """
    shutil.copytree(
        KERNELS, tmp_path / "lynx_kernels", ignore=shutil.ignore_patterns("__pycache__")
    )

    def run(*arguments: str, **environment: str) -> list[tuple[int, ...]]:
        environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")} | environment
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, *(arguments or ("2",))],
            env=os.environ | {"PYTHONPATH": str(tmp_path)} | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return run


def test_a_kernel_is_compiled_anew_when_a_file_that_it_inlines_changes(compile_in, tmp_path):
    assert compile_in() == [COMPILED]
    assert compile_in() == [LOADED]
    inlined = tmp_path / "lynx_kernels" / "shared" / "tiles_cpu.py"
    inlined.write_text(inlined.read_text() + "\n# another file than the kernel's own\n")
    assert compile_in() == [COMPILED]


def test_what_a_process_compiled_before_does_not_matter(compile_in):
    assert compile_in("2", "4") == [COMPILED, COMPILED]
    assert compile_in("4", "2") == [LOADED, LOADED]


def test_a_process_that_runs_while_a_file_is_edited_does_not_keep_its_kernel_for_the_new_one(
    compile_in,
):
    assert compile_in("edit", "2") == [COMPILED]
    assert compile_in() == [COMPILED]


@pytest.mark.parametrize(("home", "then"), [("folder", LOADED), ("file", COMPILED)])
def test_a_package_that_cannot_be_written_is_cached_below_the_users_folder_or_not_at_all(
    compile_in, tmp_path, home, then
):
    for folder in (tmp_path / "lynx_kernels").iterdir():
        if folder.is_dir():
            (folder / "__pycache__").touch()  # root may write everywhere, but not below a file
    cache = tmp_path / "user"
    cache.mkdir() if home == "folder" else cache.touch()
    places = {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": str(cache)}
    assert compile_in(**places) == [COMPILED]
    assert compile_in(**places) == [then]
