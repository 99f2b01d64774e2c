# SPDX-License-Identifier: Apache-2.0
"""Expected errors in 1/8 octaves: what a codec says of its result, and the exact tier reads."""

import numpy as np
from numpy.typing import NDArray

NO_ERROR = -20000  # 1/8 octaves: the reconstruction is the true value


def error_steps(variance: NDArray[np.float64]) -> NDArray[np.int16]:
    """8 * log2 of the standard deviation, rounded; the same on every machine, as exp2 is not."""
    fraction, octave = np.frexp(variance)
    borders = (0.5452538663326288, 0.6484197773255048, 0.7711054127039704, 0.9170040432046712)
    steps = 4 * octave - 4 + sum((fraction >= border).astype(np.int64) for border in borders)
    return np.where(variance > 0, steps, NO_ERROR).astype(np.int16)
