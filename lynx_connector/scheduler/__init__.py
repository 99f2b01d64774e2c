# SPDX-License-Identifier: Apache-2.0
"""Speculative start for vLLM: draft from a coarse KV cache, verify once the exact one is there.

`--scheduler-cls lynx_connector.scheduler.LynxScheduler` (or `LynxAsyncScheduler` where vLLM
schedules asynchronously). The two classes are imported on first use, so that
`lynx_connector.scheduler.states` needs neither vLLM nor torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lynx_connector.scheduler.mixin import LynxAsyncScheduler, LynxScheduler

__all__ = ["LynxAsyncScheduler", "LynxScheduler"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lynx_connector.scheduler import mixin

        return getattr(mixin, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
