# SPDX-License-Identifier: Apache-2.0
"""Every step of a request is an event; metrics are sums of events, traces their pictures."""
