# SPDX-License-Identifier: Apache-2.0
"""The demo, and the parts of it that the integration tests use: model, link and servers."""
