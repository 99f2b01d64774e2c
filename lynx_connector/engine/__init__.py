# SPDX-License-Identifier: Apache-2.0
"""What touches vLLM's unstable classes, beside `connector.py` and `scheduler/`."""
