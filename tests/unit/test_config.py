# SPDX-License-Identifier: Apache-2.0
"""Every wrong key is refused with its name, its value and what is accepted."""

import pytest

from lynx_connector.codec import CODECS
from lynx_connector.config import CODEC_NAMES, LynxConfig, StartMode
from lynx_connector.errors import ConfigError


def test_defaults_are_valid():
    config = LynxConfig.from_extra_config({})
    assert (config.codec, config.start, config.draft_limit) == ("klt", StartMode.AUTO, 64)
    assert not config.encrypt


def test_configured_codecs_are_the_registered_ones():
    assert set(CODEC_NAMES) == set(CODECS)


@pytest.mark.parametrize("size", ["4MiB", 4 << 20])
def test_sizes_take_units(size):
    assert LynxConfig.from_extra_config({"frame_bytes": size}).frame_bytes == 4 << 20


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ({"draft_limt": 3}, ["draft_limt = 3", "unknown key", "'draft_limit'"]),
        ({"zzz": 1}, ["zzz = 1", "known keys", "codec"]),
        ({"draft_limit": 0}, ["draft_limit = 0", "greater than or equal to 1"]),
        ({"draft_limit": "many"}, ["draft_limit = 'many'", "integer"]),
        ({"codec": "zip"}, ["codec = 'zip'", "hadamard"]),
        ({"start": "soon"}, ["start = 'soon'", "'speculative'"]),
        ({"listen_port": 70000}, ["listen_port = 70000", "65000"]),
        ({"frame_bytes": "1B"}, ["frame_bytes = '1B'", "64KiB"]),
        ({"staging_bytes": 5}, ["staging_bytes = 5", "1MiB"]),
        ({"reuse_bytes": -1}, ["reuse_bytes = -1", "could not parse"]),
        ({"lease_seconds": -1}, ["lease_seconds = -1", "greater than 0"]),
        ({"anchor_bits": 6}, ["anchor_bits = 6", "less than or equal to 5"]),
        ({"anchor_bits": 3, "codec": "hadamard"}, ["anchor_bits = 3", "'klt' only"]),
        ({"final_tier": "anchor"}, ["final_tier = 'anchor'", "'exact'"]),
        ({"final_tier": "exact", "codec": "int8"}, ["final_tier = 'exact'", "'int8'", "klt"]),
        ({"learn_tokens": 100}, ["learn_tokens = 100", "512"]),
        ({"secret_file": "/nonexistent/secret"}, ["secret_file", "No such file"]),
    ],
)
def test_wrong_values_name_key_value_and_remedy(extra, parts):
    with pytest.raises(ConfigError) as error:
        LynxConfig.from_extra_config(extra)
    for part in parts:
        assert part in str(error.value)


def test_all_wrong_keys_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        LynxConfig.from_extra_config({"draft_limit": 0, "nope": 1})
    assert "draft_limit" in str(error.value)
    assert "nope" in str(error.value)


def test_short_secret_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("short")
    with pytest.raises(ConfigError, match="16 bytes"):
        LynxConfig.from_extra_config({"secret_file": str(secret)})
    secret.write_text("x" * 32 + "\n")
    assert LynxConfig.from_extra_config({"secret_file": str(secret)}).secret_file == secret


@pytest.mark.parametrize("extra", [{"codec": "bf16", "final_tier": "exact"}, {"learn_tokens": 0}])
def test_keys_that_go_together(extra):
    LynxConfig.from_extra_config(extra)


def test_tables_lie_in_the_cache_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert LynxConfig().tables_root() == tmp_path / "lynx-connector" / "tables"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LynxConfig().tables_root() == tmp_path / ".cache" / "lynx-connector" / "tables"
    assert LynxConfig(tables_dir="~/t").tables_root() == tmp_path / "t"


@pytest.mark.parametrize(
    ("extra", "host"),
    [
        ({}, ""),
        ({"advertise_host": "10.0.0.1"}, ""),
        ({"advertise_host": "127.0.0.1"}, "127.0.0.1"),
        ({"advertise_host": "[::1]"}, "::1"),
        ({"advertise_host": "localhost"}, "localhost"),
        ({"advertise_host": "127.0.0.1", "listen_host": "10.0.0.2"}, "10.0.0.2"),
    ],
)
def test_what_is_listened_on(extra, host):
    assert LynxConfig.from_extra_config(extra).listens_on() == host


def test_exposures_are_told_by_role(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 32)
    of = LynxConfig.from_extra_config
    assert len(of({}).exposures(True, True)) == 2
    (one,) = of({}).exposures(True, False)
    assert "secret_file" in one and "listen_host" in one
    (one,) = of({}).exposures(False, True)
    assert "allowed_prefills" in one
    assert of({"listen_host": "127.0.0.1"}).exposures(True, False) == []
    assert of({"allowed_prefills": ["10.0.0.0/8"]}).exposures(False, True) == []
    assert of({"secret_file": str(secret)}).exposures(True, True) == []


@pytest.mark.parametrize("ports", ["7700", "7700-", "7731-7700", "0-10", "1-70000", "a-b", "1-2-3"])
def test_data_ports_that_are_no_range(ports):
    with pytest.raises(ConfigError, match=r"data_ports.*FIRST-LAST"):
        LynxConfig.from_extra_config({"data_ports": ports})
