# SPDX-License-Identifier: Apache-2.0
"""The cache's own values: reference, numba and Triton."""
