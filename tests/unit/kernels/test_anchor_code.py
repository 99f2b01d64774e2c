# SPDX-License-Identifier: Apache-2.0
"""The quantiser's tables: reproducible, ordered, consistent with each other."""

from __future__ import annotations

import numpy as np
import pytest
from lynx_kernels.shared import anchor_code as tables


@pytest.mark.parametrize("head_dim", sorted(tables._HALF_TABLES))
def test_tables_follow_from_their_derivation(head_dim: int) -> None:
    borders, levels = tables.derive(head_dim)
    stored_borders, stored_levels = tables._HALF_TABLES[head_dim]
    assert np.abs(np.subtract(borders, stored_borders)).max() <= 1
    assert np.abs(np.subtract(levels, stored_levels)).max() <= 2


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_every_level_is_coded_as_itself(head_dim: int) -> None:
    code = tables.anchor_code(head_dim)
    grid = ((code.refined_level.astype(np.float64) + 1) * tables.GRID).astype(int)
    assert (code.code_of_grid[grid] == np.arange(256)).all()
    grid = ((code.anchor_level.astype(np.float64) + 1) * tables.GRID).astype(int)
    assert (code.code_of_grid[grid] >> 4 == np.arange(16)).all()


def test_codes_ascend_over_the_whole_interval() -> None:
    code = tables.anchor_code(64)
    assert len(code.code_of_grid) == 2 * tables.GRID + 1
    assert code.code_of_grid[0] == 0 and code.code_of_grid[-1] == 255
    assert (np.diff(code.code_of_grid.astype(int)) >= 0).all()
    assert len(np.unique(code.code_of_grid)) == 256


def test_tables_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        tables.anchor_code(64).anchor_level[0] = 0
