# SPDX-License-Identifier: Apache-2.0
"""Which queries are kept of a step, and that they are told apart and turned back rightly."""

import torch
from lynx_kernels.shared.rotation import Rotation

from lynx_connector.engine.metadata import EncodeChunk, EncodePlan
from lynx_connector.producer.queries import MAX_SAMPLES, QuerySampler

LAYERS, HEADS, D, BLOCK = 2, 4, 16, 16
PLAN = EncodePlan("klt", 4, "residual")
ROTATION = Rotation(tuple(1 << (24 - i) for i in range(8)), is_neox=True)


def chunk(start, end, block_ids, fresh=None, name="r"):
    fresh = start if fresh is None else fresh
    return EncodeChunk(name, "t-" + name, end, start, end, block_ids, PLAN, fresh)


class Attention:
    """Stands for vLLM's layers: shows a pass to whoever taps it."""

    def __init__(self):
        self.see = None

    def tap(self, see):
        self.see = see
        return self.untap

    def untap(self):
        self.see = None

    def run(self, slots, queries):
        for layer in range(len(queries)):
            if self.see is not None:
                self.see(layer, queries[layer], torch.tensor(slots))


def sampler():
    attention = Attention()
    return attention, QuerySampler(LAYERS, BLOCK, attention.tap)


def queries(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, tokens, HEADS, D, generator=generator)


def test_rows_of_a_mixed_batch_are_found_by_their_slots_and_turned_back():
    attention, one = sampler()
    plain = queries(48)
    # Blocks 7 and 3 hold tokens 16 to 47; 16 rows of another request come first.
    positions = torch.arange(16, 48)
    slots = [7 * BLOCK + i for i in range(16)] + [3 * BLOCK + i for i in range(16)]
    turned = plain.clone()
    for layer in range(LAYERS):
        turned[layer, 16:] = ROTATION.turn(plain[layer, 16:], 16)
    one.expect([chunk(16, 48, [7, 3])])
    attention.run([*range(1600, 1616), *slots], turned)
    sample = one.take()
    assert len(sample.slots) == 8  # a quarter
    rows = [slots.index(slot) for slot in sample.slots.tolist()]
    assert [sample.positions[slot] for slot in sample.slots.tolist()] == positions[rows].tolist()
    expected = plain[:, [16 + row for row in rows]].transpose(0, 1)
    torch.testing.assert_close(sample.before_rope(ROTATION), expected, atol=1e-3, rtol=1e-3)


def test_tokens_of_the_prefix_cache_have_no_queries():
    attention, one = sampler()
    one.expect([chunk(0, 32, [0, 1], fresh=32)])
    attention.run(range(100, 132), queries(32))
    assert one.take() is None


def test_a_step_without_prefill_and_a_pass_that_shows_nothing():
    attention, one = sampler()
    one.expect([])
    attention.run(range(4), queries(4))
    assert one.take() is None
    one.expect([chunk(0, 32, [0, 1])])
    assert one.take() is None  # replayed from a CUDA graph
    one.expect([chunk(0, 32, [0, 1])])
    attention.run(range(32), queries(32)[:1])
    assert one.take() is None  # a layer is missing


def test_a_sample_is_bounded_whatever_the_step():
    attention, one = sampler()
    blocks = list(range(400))
    one.expect([chunk(0, 3200, blocks[:200]), chunk(0, 3200, blocks[200:], name="s")])
    attention.run(range(6400), queries(6400))
    assert len(one.take().slots) == MAX_SAMPLES


def test_a_sample_that_fails_does_not_fail_the_pass(caplog):
    attention, one = sampler()
    one.expect([chunk(0, 32, [0, 1])])
    attention.run(range(32), queries(8))  # fewer rows than slots
    assert one.take() is None
    assert "queries cannot be read" in caplog.text
    one.expect([chunk(0, 32, [0, 1])])
    attention.run(range(32), queries(32))
    assert one.take() is None  # and it is not tried again


def test_attention_is_left_as_it_was():
    attention, one = sampler()
    one.close()
    assert attention.see is None
