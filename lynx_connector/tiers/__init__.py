# SPDX-License-Identifier: Apache-2.0
"""A transfer's bytes, whoever sends or receives them."""
