# SPDX-License-Identifier: Apache-2.0
"""Codec `klt`: reference, numba and Triton."""
