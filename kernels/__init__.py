# SPDX-License-Identifier: Apache-2.0
"""Kernels that move KV vectors between vLLM's paged cache and tier rows.

Each operation has a torch reference (any device) and a numba twin for the CPU (`*_cpu.py`); the
twins agree bit for bit, because both keep one fixed float32 operation order. This package imports
neither vLLM nor `lynx_connector`.
"""
