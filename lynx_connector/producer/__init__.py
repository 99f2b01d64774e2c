# SPDX-License-Identifier: Apache-2.0
"""The prefill side: handoff and leases (scheduler half), encoding and staging (worker half)."""
