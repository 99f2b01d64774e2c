# SPDX-License-Identifier: Apache-2.0
"""The tables as pictures for the documents: `python -m lynx_connector.lifecycle.picture`."""

from lynx_connector.lifecycle.machine import E, S, Transitions
from lynx_connector.lifecycle.request import REQUEST, RequestState
from lynx_connector.lifecycle.transfer import TRANSFER, TransferState


def mermaid(table: Transitions[S, E], start: S) -> str:
    """A mermaid state diagram; an arrow carries all events that lead the same way."""
    lines = ["stateDiagram-v2", f"  [*] --> {start}"]
    for state, row in table.items():
        if not row:
            lines.append(f"  {state} --> [*]")
        for target in dict.fromkeys(row.values()):
            events = ", ".join(event for event, to in row.items() if to == target)
            lines.append(f"  {state} --> {target}: {events}")
    return "\n".join(lines)


PICTURES = {
    "transfer": mermaid(TRANSFER, TransferState.EXPECTED),
    "request": mermaid(REQUEST, RequestState.WAITING),
}

if __name__ == "__main__":
    for name, picture in PICTURES.items():
        print(f"{name}:\n\n```mermaid\n{picture}\n```\n")
