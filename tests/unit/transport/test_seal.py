# SPDX-License-Identifier: Apache-2.0
"""What one side seals the other opens, once, in order, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynx_connector.errors import AuthenticationError
from lynx_connector.transport.seal import BrokenSealError, EphemeralKey, Seals


def both_sides(secret=b"s" * 32, said=b"d" * 32):
    consumer, producer = EphemeralKey(), EphemeralKey()
    exchanged = consumer.shared_with(producer.public)
    assert exchanged == producer.shared_with(consumer.public)
    return (
        Seals.derive(exchanged, secret, said, False, True),
        Seals.derive(exchanged, secret, said, True, True),
    )


@given(st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=300)), max_size=20))
def test_both_directions_in_order(sent):
    consumer, producer = both_sides()
    for from_consumer, body in sent:
        a, b = (consumer, producer) if from_consumer else (producer, consumer)
        assert b.into.open_message(a.out.seal_message(body)) == body
        payload = np.frombuffer(body, np.uint8)
        opened = np.empty_like(payload)
        b.into.open_payload(b"header", a.out.seal_payload(b"header", payload), opened)
        assert opened.tobytes() == body


@given(st.integers(0, 99), st.integers(0, 7))
def test_a_bit_that_differs(at, bit):
    consumer, producer = both_sides()
    sealed = bytearray(consumer.out.seal_message(bytes(84)))
    sealed[at] ^= 1 << bit
    with pytest.raises(BrokenSealError):
        producer.into.open_message(bytes(sealed))
    payload = consumer.out.seal_payload(b"h", np.ones(84, np.uint8))
    payload[at] ^= np.uint8(1 << bit)
    opened = np.ones(84, np.uint8)
    with pytest.raises(BrokenSealError):
        producer.into.open_payload(b"h", payload, opened)
    assert not opened.any(), "nothing of a forged payload is left to be read"


def test_replayed_reflected_swapped_and_mislabelled():
    consumer, producer = both_sides()
    first, second = consumer.out.seal_message(b"one"), consumer.out.seal_message(b"two")
    assert producer.into.open_message(first) == b"one"
    for wrong in (consumer.out.seal_message(b"three"), first):  # one too far, and again
        with pytest.raises(BrokenSealError):
            producer.into.open_message(wrong)
    with pytest.raises(BrokenSealError):
        consumer.into.open_message(second)  # sent back to its sender
    payload = np.arange(8, dtype=np.uint8)
    sealed = producer.out.seal_payload(b"tokens 0 to 8", payload)
    with pytest.raises(BrokenSealError):
        consumer.into.open_payload(b"tokens 8 to 16", sealed, np.empty_like(payload))


@pytest.mark.parametrize("other", [{"secret": b"t" * 32}, {"said": b"e" * 32}])
def test_another_secret_or_greeting_gives_other_keys(other):
    exchanged = EphemeralKey().shared_with(EphemeralKey().public)
    facts = {"secret": b"s" * 32, "said": b"d" * 32}
    one = Seals.derive(exchanged, **facts, producer=True, payloads=True)
    two = Seals.derive(exchanged, **{**facts, **other}, producer=False, payloads=True)
    with pytest.raises(BrokenSealError):
        two.into.open_message(one.out.seal_message(b"x"))


@pytest.mark.parametrize("public", [b"", b"short", bytes(32), b"x" * 33])
def test_unusable_keys_are_refused(public):
    with pytest.raises(AuthenticationError, match="no usable key"):
        EphemeralKey().shared_with(public)
