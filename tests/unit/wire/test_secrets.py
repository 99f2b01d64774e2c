# SPDX-License-Identifier: Apache-2.0
"""A secret file: what it may hold, and that it is read again when it changes."""

import logging
import os

import pytest

from lynx_connector.config import LynxConfig, parse_secrets
from lynx_connector.errors import ConfigError
from lynx_connector.wire.secrets import NO_SECRETS, SharedSecrets

OLD, NEW = b"the-old-secret-00", b"the-new-secret-00"


@pytest.mark.parametrize(
    ("content", "secrets"),
    [
        (OLD, (OLD,)),
        (OLD + b"\n", (OLD,)),
        (b"\n " + OLD + b" \r\n\n" + NEW + b"\n", (OLD, NEW)),
        (b"\xff" * 16 + b"\n" + b"\x00" * 16, (b"\xff" * 16 + b"\n" + b"\x00" * 16,)),
    ],
)
def test_content(content, secrets):
    assert parse_secrets(content) == secrets


@pytest.mark.parametrize("content", [b"", b"\n\n", b"short", OLD + b"\nshort", b"\xff" * 15])
def test_short_secrets_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match="at least 16 bytes"):
        parse_secrets(content)
    path = tmp_path / "secret"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"secret_file.*at least 16 bytes"):
        LynxConfig.from_extra_config({"secret_file": str(path)})


def test_a_changed_file_is_read_again(tmp_path, caplog):
    path = tmp_path / "secret"
    path.write_bytes(OLD)
    secrets = SharedSecrets(path)
    assert secrets.current() == (OLD,)
    new = tmp_path / "new"
    new.write_bytes(NEW + b"\n" + OLD)
    with caplog.at_level(logging.INFO):
        os.replace(new, path)  # as mounted secrets change
        assert secrets.current() == (NEW, OLD)
        assert secrets.current() == (NEW, OLD)
    assert caplog.text.count("was read again: 2 secrets") == 1
    assert NEW.decode() not in caplog.text + repr(secrets)


@pytest.mark.parametrize("break_it", [os.unlink, lambda path: path.write_bytes(b"short")])
def test_a_file_that_became_unusable_leaves_the_secrets(tmp_path, caplog, break_it):
    path = tmp_path / "secret"
    path.write_bytes(OLD)
    secrets = SharedSecrets(path)
    secrets.current()
    break_it(path)
    assert secrets.current() == secrets.current() == (OLD,)
    assert caplog.text.count("stay as they were") == 1
    path.write_bytes(NEW)
    assert secrets.current() == (NEW,)


def test_without_a_file_there_are_none():
    assert NO_SECRETS.current() == () and len(NO_SECRETS) == 0


def test_encrypt_needs_a_secret():
    with pytest.raises(ConfigError, match="encrypt = true needs secret_file"):
        LynxConfig.from_extra_config({"encrypt": True})
