# SPDX-License-Identifier: Apache-2.0
"""What speculative start must do, on every flavour, one idea a file.

Each case asserts on its own outputs, and the harness asserts after each that no block, request or
scheduler state is left.
"""

# Each registers its cases; they run in this order.
from . import (  # noqa: F401, I001
    acceptance,
    ends,
    batches,
    interruptions,
    failures,
    sampling,
    structured,
    ordinary,
    early_reply,
    first_token,
    first_token_interrupted,
    full_cache,
    lora,
    multi_connector,
)
from .registry import CASES

__all__ = ["CASES"]
