# SPDX-License-Identifier: Apache-2.0
"""Codec `hadamard`: reference, numba and Triton."""
