# SPDX-License-Identifier: Apache-2.0
"""Comparison codecs. Adding one means one file here and one entry below."""

from __future__ import annotations

from lynx_connector.bench.baselines.base import Baseline, Code
from lynx_connector.bench.baselines.cachegen import CacheGen
from lynx_connector.bench.baselines.kivi import Kivi2, Kivi4
from lynx_connector.bench.baselines.quantspec import QuantSpec

BASELINES: dict[str, type[Baseline]] = {
    baseline.name: baseline for baseline in (Kivi4, Kivi2, QuantSpec, CacheGen)
}

__all__ = ["BASELINES", "Baseline", "Code"]
