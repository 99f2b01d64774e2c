# SPDX-License-Identifier: Apache-2.0
"""Frames between workers over UCX. Knows transfers, tiers and bytes, never what tensors mean."""
