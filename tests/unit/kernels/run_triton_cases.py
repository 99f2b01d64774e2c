# SPDX-License-Identifier: Apache-2.0
"""Runs cases of the Triton kernels, named as arguments, on CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, hence a process of its own
(`test_triton.py` starts it). Prints one JSON object: case -> "" or what differs.
"""

from __future__ import annotations

import json
import sys
import traceback

import numpy as np
import torch

from tests.unit.kernels.triton_cases import CASES
from tests.unit.kernels.triton_exact_cases import EXACT_CASES


def main() -> None:
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    results = {}
    for name in sys.argv[1:]:
        case, codec, dtype = (CASES | EXACT_CASES)[name]
        try:
            case(codec, dtype, "cpu")
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()[-2000:]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
