# SPDX-License-Identifier: Apache-2.0
"""The exact tier: its code, reference, numba and Triton."""
