# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: every Triton kernel compiled, run against its reference and timed, in minutes.

For a bare GPU machine: it runs with that machine's own Python, installs nothing and needs torch,
Triton and numpy; what else is missing is named and left out. A process of its own runs the kernels
(`worker.py`), so that one that crashes does not stop the others. Without a GPU the same is done in
Triton's interpreter, as a rehearsal.
"""
