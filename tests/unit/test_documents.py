# SPDX-License-Identifier: Apache-2.0
"""Documents name what there is: keys with their defaults, examples, files, links, imports."""

import json
import re
import subprocess
from functools import cache
from pathlib import Path

import grimp
import pytest
import typer

from lynx_connector.cli import app
from lynx_connector.config import LynxConfig

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
).stdout.split()
FOUND = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")]
PAGES = TRACKED or [str(page.relative_to(ROOT)) for page in FOUND]
CURRENT = [page for page in PAGES if page != "CHANGELOG.md"]  # which speaks of what was, too


def read(page: str) -> str:
    return (ROOT / page).read_text()


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """Cells of the table rows whose first cell begins with code."""
    lines = re.findall(r"^\| (`.+) \|$", text.replace(" | |\n", " |  |\n"), re.M)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


# ---- configuration -------------------------------------------------------------------------------


def keys() -> dict[str, list[str]]:
    """Key -> default, accepted, side, meaning."""
    return {key.strip("`"): cells for key, *cells in rows(section(CONFIGURATION, "Keys"))}


CONFIGURATION = read("docs/configuration.md")


def test_every_key_is_documented():
    assert set(keys()) == set(LynxConfig.model_fields)


def test_documented_defaults_are_the_real_ones():
    config = LynxConfig()
    for key, (documented, *_) in keys().items():
        value = getattr(config, key)
        documented = documented.strip("`")
        unset = ("this host", "none", "finger", "UCX", "~/.cache")
        if value is None or documented.startswith(unset):
            assert value is None, key
        elif documented == "any":
            assert value == (), key
        elif documented.endswith("iB"):
            number, unit = documented.split()
            assert value == int(number) * {"MiB": 1 << 20, "GiB": 1 << 30}[unit], key
        else:
            assert str(value).removesuffix(".0") == documented, key


def test_documented_ranges_are_the_real_ones():
    for key, (_, accepted, *_) in keys().items():
        field = LynxConfig.model_fields[key]
        numbers = set(map(int, re.findall(r"\d+", accepted)))
        for name in ("ge", "gt", "le", "lt"):
            for bound in (getattr(part, name, None) for part in field.metadata):
                assert bound is None or bound in numbers, (key, bound)
        for value in getattr(field.annotation, "__members__", {}).values():
            assert f"`{value}`" in accepted, key


def test_documented_sides_are_those_that_the_code_names():
    for key, (_, _, side, _) in keys().items():
        described = LynxConfig.model_fields[key].description.lower()
        named = set(re.findall(r"\b(producer|consumer)(?: \([^)]*\))?: ", described))
        assert side == (named.pop() if len(named) == 1 else "both"), key


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_examples_are_accepted(page, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    examples = [json.loads(found) for found in re.findall(r"'(\{\"kv_.+?\})'", read(page), re.S)]
    assert examples
    for example in examples:
        extra = example.get("kv_connector_extra_config", {})
        if example["kv_connector"] == "MultiConnector":
            example, *_ = extra["connectors"]
            extra = example.get("kv_connector_extra_config", {})
        assert example["kv_connector"] == "LynxConnector"
        assert example["kv_role"] in ("kv_producer", "kv_consumer", "kv_both")
        assert example.get("kv_load_failure_policy", "fail") in ("fail", "recompute")
        if "secret_file" in extra:
            extra["secret_file"] = str(secret)
        LynxConfig.from_extra_config(extra)


def test_settings_by_purpose_are_accepted():
    examples = re.findall(r"\| `(\{.+\})` \|", section(CONFIGURATION, "Examples"))
    assert examples
    for example in examples:
        LynxConfig.from_extra_config(json.loads(example))


# ---- names ---------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


def anchors(text: str) -> set[str]:
    """Of all headings, as GitHub makes them; lines of code blocks are none."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page}: {target}"


def test_the_index_names_every_page():
    linked = {
        (ROOT / "docs" / target).resolve()
        for target in re.findall(r"\]\(([^)\s#]+)\)", read("docs/README.md"))
    }
    pages = [page for page in CURRENT if page.startswith(("docs/", "README", "CONTRIBUTING"))]
    assert {(ROOT / page).resolve() for page in pages} - {ROOT / "docs/README.md"} <= linked


@pytest.mark.parametrize("page", CURRENT)
def test_files_that_are_named_exist(page):
    bases = [ROOT, ROOT / "lynx_connector", (ROOT / page).parent]
    for name in re.findall(r"[\w][\w./-]*/[\w-]+\.(?:py|md|yaml|yml|json|toml|png)\b", read(page)):
        if not name.startswith(("v1/", "vllm/")):  # vLLM's own
            assert any((base / name).exists() for base in bases), f"{page}: {name}"


@pytest.mark.parametrize("page", CURRENT)
def test_folders_of_tests_that_are_named_exist(page):
    for name in re.findall(r"\btests/[\w/]+\b(?!\.)", read(page)):
        assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("page", CURRENT)
def test_modules_that_are_named_exist(page):
    for name in re.findall(r"\b(?:lynx_connector|tests|scripts)(?:\.[a-z_0-9]+)+\b", read(page)):
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists(), f"{page}: {name}"


def commands(group, name: str = "lynx") -> dict[str, set[str]]:
    """`lynx bench codec` -> its options; of groups, too."""
    found = {name: {option for one in group.params for option in one.opts}}
    for sub, command in getattr(group, "commands", {}).items():
        found |= commands(command, f"{name} {sub}")
    return found


@pytest.mark.parametrize("page", CURRENT)
def test_commands_that_are_named_exist(page):
    """Each `lynx ...` with its options, up to the end of its line, code or comment."""
    known = commands(typer.main.get_command(app))
    text = read(page).replace("\\\n", " ")
    quoted = [
        *re.findall(r"`(lynx [^`]+)`", text),
        *re.findall(r"^ {4}.*?\b(lynx .+)$", text, re.M),
    ]
    for line in quoted:
        words = re.split(r" #|&&|[|;&]", line)[0].split()
        names = [" ".join(words[:count]) for count in (3, 2, 1)]
        name = next((name for name in names if name in known), "")
        assert name not in ("", "lynx"), f"{page}: {line}"
        for word in words:
            if word.startswith("--") and name != "lynx serve":  # whose options are vLLM's
                assert word.split("=")[0] in known[name], f"{page}: {line}: {word}"


@pytest.mark.parametrize("page", CURRENT)
def test_make_targets_that_are_named_exist(page):
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    for name in re.findall(r"(?:`|^ {4})make ([a-z-]+)", read(page), re.M):
        assert name in targets, f"{page}: make {name}"


# ---- imports between rooms -----------------------------------------------------------------------


def place(module: str) -> str:
    """The row of a module in the table of rooms; empty: in none."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if package == "lynx_kernels":
        return f"kernels/{name}" if name else ""
    return "vLLM" if package == "vllm" else name if package == "lynx_connector" else ""


@cache
def imports() -> dict[str, set[str]]:
    """Room -> what it imports: rooms, `kernels`, `vLLM`; of a folder of kernels, other folders."""
    packages = ("lynx_connector", "lynx_kernels")
    graph = grimp.build_graph(*packages, include_external_packages=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        room = place(module)
        if not room or room == "vLLM":
            continue
        seen = {place(other) for other in graph.find_modules_directly_imported_by(module)}
        for other in seen - {room, ""}:
            inside, _, folder = other.partition("/")
            found.setdefault(room, set()).add(folder if room.startswith("kernels") else inside)
        found.setdefault(room, set())
    return found


ROOMS = section(read("docs/architecture.md"), "Rooms")


def test_the_table_of_rooms_says_who_sees_whom():
    told = {
        room.strip("`").removesuffix("/").removesuffix(".py"): set(filter(None, sees.split(", ")))
        for room, _, sees in rows(ROOMS)
    }
    assert set(told) == set(imports())
    for room, seen in imports().items():
        assert told[room] == seen, f"{room} sees {', '.join(sorted(seen)) or 'nothing'}"


def drawn() -> set[tuple[str, str]]:
    """The arrows of the picture of imports; dotted ones are none."""
    picture = ROOMS.split("```mermaid\nflowchart TB\n")[1].split("```")[0]
    arrows = set()
    for line in picture.splitlines():
        if found := re.fullmatch(r" +(.+?) (?:-- \w+ )?--> (.+)", line):
            left, right = (side.split(" & ") for side in found.groups())
            arrows |= {(one, other) for one in left for other in right}
    return arrows


def test_the_picture_has_every_import_that_does_not_follow_from_others():
    real: dict[str, set[str]] = {"kernels": set()}
    for room, seen in imports().items():
        if not room.startswith("kernels"):
            real[room] = seen - {"vLLM"}

    def follows(room: str, other: str) -> bool:
        reached, left = set(), list(real[room] - {other})
        while left:
            if (step := left.pop()) not in reached:
                reached.add(step)
                left += real[step]
        return other in reached

    needed = {(room, other) for room in real for other in real[room] if not follows(room, other)}
    assert drawn() == needed
