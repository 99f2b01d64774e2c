# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, with speculative start on a decode instance (draft from a coarse KV cache,
verify once the exact one is there) and early reply on a prefill instance.

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
