# SPDX-License-Identifier: Apache-2.0
"""Which hosts a client may name."""

import pytest

from lynx_connector.config import LynxConfig
from lynx_connector.errors import ConfigError, NotAllowedError
from lynx_connector.wire.allowed import AllowedPrefills

SOME = AllowedPrefills(("10.0.0.0/8", "192.168.1.7", "fd00::/16", "::1", "Prefill-0.local"))


@pytest.mark.parametrize(
    "host",
    ["10.1.2.3", "192.168.1.7", "fd00::5", "[fd00::5]", "::1", "prefill-0.LOCAL", "::ffff:10.0.0.1",
     "prefill-0.local."],
)  # fmt: skip
def test_allowed(host):
    SOME.check(host)


@pytest.mark.parametrize(
    "host",
    ["11.0.0.1", "192.168.1.8", "fd01::1", "::2", "localhost", "prefill-1.local", "", "0x0a000001",
     "10.0.0.1.evil.example", "167772161", "010.0.0.1", "::ffff:11.0.0.1", "10.0.0.1\n"],
)  # fmt: skip
def test_others_are_refused_by_name(host):
    with pytest.raises(
        NotAllowedError, match=r"remote_host.*not among allowed_prefills"
    ) as refused:
        SOME.check(host)
    assert str(refused.value).isprintable()


def test_an_empty_list_allows_all():
    AllowedPrefills().check("anything")
    AllowedPrefills().check_url("http://anything:1")


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:8998", "https://[::1]:1/", "http://PREFILL-0.local"]
)
def test_bootstrap_servers(url):
    SOME.check_url(url)


@pytest.mark.parametrize(
    "url", ["http://11.0.0.1:8998", "http://evil:1", "http://[::1", "http://10.0.0.1@evil:80", "x"]
)
def test_bootstrap_servers_elsewhere(url):
    with pytest.raises(NotAllowedError, match="remote_bootstrap_addr"):
        SOME.check_url(url)


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "a b", "http://x", "", "10.0.0.1/8"])
def test_entries_that_are_none_are_refused_at_start_up(entry):
    with pytest.raises(ConfigError, match="allowed_prefills"):
        LynxConfig.from_extra_config({"allowed_prefills": [entry]})
