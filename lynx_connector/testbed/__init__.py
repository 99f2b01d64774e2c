# SPDX-License-Identifier: Apache-2.0
"""Real servers, links and models on one machine, for demo, benchmarks and tests."""
