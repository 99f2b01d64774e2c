# SPDX-License-Identifier: Apache-2.0
"""The KV cache of a model, as far as its size goes."""

from dataclasses import dataclass

from lynx_connector.plan.errors import PlanError, require_positive

ELEMENT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


@dataclass(frozen=True)
class KVShape:
    """K and V of all layers that one worker holds. dtype: bfloat16, float16 or float32.

    Raises PlanError, naming the number, for a shape that no cache has.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        require_positive(layers=self.layers, kv_heads=self.kv_heads, head_dim=self.head_dim)
        if self.dtype not in ELEMENT_BITS:
            known = ", ".join(ELEMENT_BITS)
            raise PlanError(f"dtype = {self.dtype!r}: accepted values are {known}")

    @property
    def elements_per_token(self) -> int:
        """K and V elements of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def element_bits(self) -> int:
        """Bits of one element in the cache."""
        return ELEMENT_BITS[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in the cache."""
        return self.elements_per_token * self.element_bits // 8

    def shard(self, ranks: int) -> "KVShape":
        """What one of `ranks` tensor-parallel workers holds; heads are repeated beyond one each.

        Raises PlanError if the heads do not divide.
        """
        require_positive(tensor_parallel_size=ranks)
        if max(self.kv_heads, ranks) % min(self.kv_heads, ranks):
            raise PlanError(
                f"kv_heads = {self.kv_heads} and tensor_parallel_size = {ranks}: "
                "neither divides the other"
            )
        return KVShape(self.layers, max(1, self.kv_heads // ranks), self.head_dim, self.dtype)
