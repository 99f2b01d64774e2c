# SPDX-License-Identifier: Apache-2.0
"""Real traffic, changed: trees of fields (what a hostile peer would craft) and raw bytes (what
broken memory or a foreign protocol would send). One seed gives one sequence.

`LYNX_FUZZ_INPUTS` sets how many inputs each parser gets, `LYNX_FUZZ_SEED` where they begin.
"""

import copy
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

INPUTS = int(os.environ.get("LYNX_FUZZ_INPUTS", "10000"))
SEED = int(os.environ.get("LYNX_FUZZ_SEED", "1"))

_NUMBERS = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 65535, 65536, 1 << 30, (1 << 31) - 1, 1 << 31,
            1 << 32, 1 << 40, (1 << 40) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
            -(1 << 63))  # fmt: skip
_TEXTS = ("", "\x00", "a\nb", "x" * 129, "x" * 5000, "\u202e", "é" * 100, "../../etc/passwd", "klt",
          "hadamard", "bf16", "int4", "exact", "0" * 32, "g" * 32, "127.0.0.1", "::1", "[::1]",
          "Frame", "Fetch", "Tables", "ready", "failed", "http://[::1", "%00", "NaN")  # fmt: skip
_FLOATS = (0.0, -0.0, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan"), 0.5)

Tree = Any


class Mutator:
    """Draws changed copies. Everything comes from `random`."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def value(self, depth: int = 0) -> Tree:
        """Any value that JSON or MessagePack can carry."""
        draw = self.random.choice
        kind = self.random.randrange(9 if depth < 3 else 6)
        if kind == 0:
            return draw(_NUMBERS)
        if kind == 1:
            return draw(_TEXTS)
        if kind == 2:
            return draw((None, True, False))
        if kind == 3:
            return draw(_FLOATS)
        if kind == 4:
            return self.random.randrange(1 << 20)
        if kind == 5:
            return "".join(chr(self.random.randrange(0xD7FF)) for _ in range(draw((1, 3, 40))))
        size = draw((0, 1, 2, 5))
        if kind == 6:
            return [self.value(depth + 1) for _ in range(size)]
        return {draw(_TEXTS): self.value(depth + 1) for _ in range(size)}

    def tree(self, original: Tree, changes: int | None = None) -> Tree:
        """A copy with a few fields changed, added, dropped, repeated or swapped."""
        tree = copy.deepcopy(original)
        for _ in range(changes or self.random.choice((1, 1, 1, 2, 3, 8))):
            places = list(_places(tree))
            if not places:
                return self.value()
            holder, key = self.random.choice(places)
            what = self.random.randrange(8)
            if what <= 2:
                holder[key] = self.value()
            elif what == 3:
                holder[key] = self._near(holder[key])
            elif what == 4:
                del holder[key]
            elif what == 5 and isinstance(holder, dict):
                holder[self.random.choice(_TEXTS)] = self.value()
            elif what == 5:
                # Of fields only, and of short lists: trees must not grow without bounds themselves.
                grown = isinstance(holder[key], dict | list) or len(holder) > 100
                holder.extend([holder[key]] * (0 if grown else self.random.choice((1, 2, 600))))
            elif what == 6:
                other, name = self.random.choice(places)
                value = other.get(name) if isinstance(other, dict) else None
                holder[key] = copy.deepcopy(value) if len(places) < 200 else None
            else:
                deep: Tree = holder[key]
                for _ in range(self.random.choice((1, 3, 100))):
                    deep = [deep]
                holder[key] = deep
        return tree

    def _near(self, value: Tree) -> Tree:
        """Something of the same kind, at a distance that off-by-one errors notice."""
        draw = self.random.choice
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            near = value + draw((-2, -1, 1, 2, 16, -16, 1 << 20))
            return min(max(near, -(1 << 63)), (1 << 64) - 1)  # what MessagePack can carry
        if isinstance(value, float):
            return draw((-value, value * 2, value + 1e-9, *_FLOATS))
        if isinstance(value, bytes):
            return self.bytes(value)
        if isinstance(value, str):
            return draw((value + "\n", value[:-1], value.upper(), value * 2, value + "\x00"))
        return self.value()

    def bytes(self, original: bytes) -> bytes:
        """A copy with bits flipped, runs cut, repeated or overwritten."""
        data = bytearray(original)
        for _ in range(self.random.choice((1, 1, 2, 4, 30))):
            at = self.random.randrange(len(data)) if data else 0
            what = self.random.randrange(7)
            if not data or what == 0:
                data[at:at] = self.random.randbytes(self.random.choice((1, 4, 100)))
            elif what == 1:
                data[at] ^= 1 << self.random.randrange(8)
            elif what == 2:
                data[at] = self.random.choice((0, 0x7F, 0x80, 0xFF, 0xC6, 0xDD, 0xDF, 0xDB))
            elif what == 3:
                del data[at : at + self.random.choice((1, 4, 1000))]
            elif what == 4:
                data = data[:at]
            elif what == 5:  # a length that claims the world
                data[at : at + 4] = b"\xff" * 4
            else:
                data[at:at] = data[at : at + self.random.choice((1, 8, 200))]
        return bytes(data)


def _places(tree: Tree) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key
            yield from _places(value)
    elif isinstance(tree, list):
        for index, value in enumerate(tree[:20]):
            yield tree, index
            yield from _places(value)


def survive(
    draw: Callable[[Mutator], Any],
    parse: Callable[[Any], Any],
    refusals: type[Exception] | tuple[type[Exception], ...],
    inputs: int | None = None,
) -> tuple[int, int]:
    """Feed `inputs` drawn inputs; returns how many were accepted and how many refused.

    Raises:
        AssertionError: anything but `refusals` came out, or a refusal that no log should show.
    """
    accepted = refused = 0
    for number in range(inputs or INPUTS):
        one = draw(Mutator(SEED * 1_000_003 + number))
        try:
            parse(one)
            accepted += 1
        except refusals as error:
            refused += 1
            text = str(error)
            assert text and len(text) < 1000 and text.isprintable(), (number, text[:2000])
        except BaseException as error:
            shown = repr(one)
            raise AssertionError(
                f"input {number} of seed {SEED}: {type(error).__name__}: {error}: {shown[:2000]}"
            ) from error
    return accepted, refused
