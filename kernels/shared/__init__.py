# SPDX-License-Identifier: Apache-2.0
"""What several kernels use: paged caches, tiles, rotations, codes."""
