# SPDX-License-Identifier: Apache-2.0
"""What crosses the network beside KV: messages, what a router carries, identity."""
