# SPDX-License-Identifier: Apache-2.0
"""Lynx: speculative start for disaggregated serving with vLLM.

After "Lynx: Progressive Speculative Quantization for accelerating KV Transfer in
Long-Context Inference" (arXiv 2607.01831). Importing this package imports neither vLLM nor torch.
"""

__version__ = "0.1.0"
