# SPDX-License-Identifier: Apache-2.0
"""The demo: one long prompt, with speculative start and blocking, on two servers and a router."""
