# SPDX-License-Identifier: Apache-2.0
"""The README's configuration table names every key, and no other, with its default."""

import re
from pathlib import Path

from lynx_connector.config import LynxConfig

README = Path(__file__).parents[2] / "README.md"


def table():
    text = README.read_text().split("## Configuration")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (producer|consumer|both) \|", text, re.M)
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
