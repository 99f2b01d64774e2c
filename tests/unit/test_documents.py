# SPDX-License-Identifier: Apache-2.0
"""Documents name what there is: keys with their defaults, files, links."""

import re
import subprocess
from pathlib import Path

import pytest

from lynx_connector.config import LynxConfig

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
).stdout.split()
PAGES = TRACKED or [str(page.relative_to(ROOT)) for page in ROOT.glob("[!.]*/**/*.md")]


def table():
    text = (ROOT / "docs/configuration.md").read_text().split("## Keys")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| (producer|consumer|both) \|", text, re.M)
    return {key: default.strip().strip("`") for key, default, _ in rows}


def test_every_key_is_documented():
    assert set(table()) == set(LynxConfig.model_fields)


def test_documented_defaults_are_the_real_ones():
    config = LynxConfig()
    for key, documented in table().items():
        value = getattr(config, key)
        unset = ("this host", "none", "finger", "UCX", "~/.cache")
        if value is None or documented.startswith(unset):
            assert value is None, key
        elif documented.endswith("iB"):
            number, unit = documented.split()
            assert value == int(number) * {"MiB": 1 << 20, "GiB": 1 << 30}[unit], key
        else:
            assert str(value).removesuffix(".0") == documented, key


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in map(anchor_of, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_that_are_named_exist(page):
    bases = [ROOT, ROOT / "lynx_connector", (ROOT / page).parent]
    text = (ROOT / page).read_text()
    for name in re.findall(r"[\w][\w./-]*/[\w-]+\.(?:py|md|yaml|yml|json|toml|png)\b", text):
        if not name.startswith(("v1/", "vllm/")):  # vLLM's own
            assert any((base / name).exists() for base in bases), f"{page}: {name}"
