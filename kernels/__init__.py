# SPDX-License-Identifier: Apache-2.0
"""Kernels that move KV vectors between vLLM's paged cache and tier rows.

A folder a codec. Each operation has a reference (torch on any device; numpy for the exact tier), a
numba twin for the CPU (`cpu.py`) and a Triton kernel for GPUs (`gpu.py`). They agree bit for bit,
because all keep one fixed float32 operation order, and the exact tier is integer arithmetic. This
package imports neither vLLM nor `lynx_connector`.
"""
