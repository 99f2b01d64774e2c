# SPDX-License-Identifier: Apache-2.0
"""What a degraded cache costs, from logits and KV tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ANSWER_TOKENS = 64
SHORT_RUN = 24
"""Tokens that a draft typically holds; also the first of the two caps of `accepted`."""


@dataclass(frozen=True)
class Reference:
    """The answer of the unquantized cache.

    tokens: int64 [N]; log_probs: float32 [N, vocabulary], by the same one-pass forward as the
    degraded ones; tied: bool [N], where the reference does not decide the token itself.
    """

    tokens: torch.Tensor
    log_probs: torch.Tensor
    tied: torch.Tensor

    @classmethod
    def of(cls, tokens: list[int], logits: torch.Tensor) -> Reference:
        """tokens: decoded one by one; logits [N, vocabulary]: of all of them in one pass.

        A position is tied where the two best logits are equal, or where the one-pass forward
        decides for another token than decoding did: rounding alone chose there.
        """
        token = torch.tensor(tokens)
        best = logits.topk(2, dim=-1)
        tied = (best.values[:, 0] == best.values[:, 1]) | (best.indices[:, 0] != token)
        return cls(token, logits.log_softmax(dim=-1), tied)


def kl_divergence(reference: Reference, logits: torch.Tensor) -> float:
    """Mean over positions of KL(reference || logits), in nats."""
    draft = logits.log_softmax(dim=-1)
    terms = reference.log_probs.exp() * (reference.log_probs - draft)
    # A token of probability zero adds nothing, whatever the difference of its logarithms.
    return float(terms.nan_to_num(nan=0.0).sum(dim=-1).mean())


def agreeing(reference: Reference, logits: torch.Tensor) -> int:
    """Greedy tokens of `logits` that equal the reference's before the first that does not."""
    same = (logits.argmax(dim=-1) == reference.tokens) | reference.tied
    return int(same.int().cumprod(dim=0).sum())


def vnmse(values: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """|error|^2 / |x|^2 of K and of V, each averaged over layers. Both [T, L, 2, H, D].

    A layer of zeros that is kept counts as 0.
    """
    errors = torch.zeros(truth.shape[1], 2, dtype=torch.float64)
    for layer in range(truth.shape[1]):
        x = truth[:, layer].float()
        error = (values[:, layer].float() - x).square().sum(dim=(0, 2, 3), dtype=torch.float64)
        energy = x.square().sum(dim=(0, 2, 3), dtype=torch.float64)
        errors[layer] = torch.where(error == 0, 0.0, error / energy)
    k, v = errors.mean(dim=0).tolist()
    return k, v
