# SPDX-License-Identifier: Apache-2.0
"""Every step of a request is an event; metrics are sums of events, traces their pictures."""

from lynx_connector.telemetry import logs as logs  # guards every logger of the package
