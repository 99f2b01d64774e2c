# SPDX-License-Identifier: Apache-2.0
"""Sets the number of threads before NumPy and torch are imported.

The tests' arrays are small and several processes share the cores: with a thread a core in each,
most of the time went into threads that waited for each other.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
