# SPDX-License-Identifier: Apache-2.0
"""What a transfer and a request go through, as tables: `transfer.py`, `request.py`."""
