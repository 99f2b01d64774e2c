# SPDX-License-Identifier: Apache-2.0
"""INT8 and INT4 per token: reference, numba and Triton."""
