# SPDX-License-Identifier: Apache-2.0
"""The decode side: admission (scheduler half), receiving and patching (worker half)."""
