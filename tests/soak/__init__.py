# SPDX-License-Identifier: Apache-2.0
"""A long mixed load with faults on a whole deployment; `python -m tests.soak --help`."""
