# SPDX-License-Identifier: Apache-2.0
"""A state and the table that moves it.

A table says, for each state, which events it knows and where each leads. An event that is not in
its state's row is a bug of the caller: it raises and changes nothing. Tables know neither threads
nor sockets nor vLLM; whoever shares a `Life` between threads holds a lock.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

from lynx_connector.errors import LynxError

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)

Transitions = Mapping[S, Mapping[E, S]]
"""state -> event -> next state. A state without events is an end."""


class IllegalEventError(LynxError, RuntimeError):
    """An event that its state does not know; nothing was changed."""


class Life(Generic[S, E]):
    """Where one thing stands in its table."""

    def __init__(self, table: Transitions[S, E], state: S) -> None:
        self._table = table
        self._state = state

    @property
    def state(self) -> S:
        """Where it stands now."""
        return self._state

    @property
    def over(self) -> bool:
        """Whether nothing can happen any more."""
        return not self._table[self._state]

    def on(self, event: E) -> S:
        """Go where `event` leads, and return that state.

        Raises:
            IllegalEventError: the state does not know the event.
        """
        row = self._table[self._state]
        if event not in row:
            known = ", ".join(row) or "nothing"
            raise IllegalEventError(f"{event!s} in state {self._state!s}, which knows {known}")
        self._state = row[event]
        return self._state
