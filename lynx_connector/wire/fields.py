# SPDX-License-Identifier: Apache-2.0
"""What msgspec finds wrong with an object, said for whoever has sent it: field, value, accepted."""

import re
from collections.abc import Sequence
from typing import Any

from lynx_connector.config import FinalTier
from lynx_connector.errors import MalformedError, shown

_PLACE = re.compile(r"(.*) - at `\$\.?(.*)`\Z", re.S)
_MISSING = re.compile(r"Object missing required field `(.+)`\Z")
_FORMS = {
    "remote_host": "a host name or address",
    "remote_bootstrap_addr": "http://HOST:PORT",
    "tables": "32 hexadecimal digits",
    "sampling": "32 hexadecimal digits or none",
}
_PRINTABLE = "a text without control characters or lone surrogates"
_STEPS = re.compile(r"[^.\[\]]+")


def malformed(what: str, error: Exception, value: Any) -> MalformedError:
    """An error for `value`, named `what`, that msgspec could not convert."""
    text, place = str(error), ""
    if found := _PLACE.match(text):
        text, place = found[1], found[2]
    if found := _MISSING.match(text):
        field = f"{place}.{found[1]}" if place else found[1]
        return MalformedError(f"malformed {what}: {field} is missing")
    steps = _STEPS.findall(place)
    given = _given(_at(value, steps))
    return MalformedError(f"malformed {what}: {place or what} = {given}: {_accepted(text, steps)}")


def _at(value: Any, steps: Sequence[str]) -> Any:
    """What stands in a value at msgspec's path; the innermost that can be reached."""
    for step in steps:
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
    return value


def _given(value: Any) -> str:
    try:
        return shown(repr(value), 64)
    except (ValueError, RecursionError):  # numbers of thousands of digits, deep nesting
        return f"(a {type(value).__name__} too large to show)"


def _accepted(text: str, steps: Sequence[str]) -> str:
    if "matching regex" in text:
        return "expected " + next((_FORMS[step] for step in steps if step in _FORMS), _PRINTABLE)
    if "enum value" in text:
        return "expected one of " + ", ".join(FinalTier)
    return shown(text[:1].lower() + text[1:].replace("`", ""))
