"""The candidate stream and packed rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slap_ds.data.packing import Candidate, PackedRow, deal, pack
from slap_ds.data.stream import CandidateStream

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(samples=st.integers(1, 50), candidates=st.integers(1, 70), seed=st.integers(0, 9))
def test_every_epoch_draws_every_sample_once(samples, candidates, seed):
    drawn = np.concatenate(list(CandidateStream(samples, candidates, seed, epochs=3)))
    assert len(drawn) == 3 * samples
    for epoch in drawn.reshape(3, samples):
        assert sorted(epoch) == list(range(samples))


def test_epochs_and_seeds_differ_and_repeat():
    first, second = np.concatenate(list(CandidateStream(50, 10, 1, epochs=2))).reshape(2, 50)
    assert (first != second).any()
    again = np.concatenate(list(CandidateStream(50, 10, 1, epochs=1)))
    assert (again == first).all()
    other = np.concatenate(list(CandidateStream(50, 10, 2, epochs=1)))
    assert (other != first).any()


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_a_resumed_stream_goes_on_exactly(stop):
    whole = list(CandidateStream(23, 9, 4, steps=13))
    assert [len(b) for b in whole] == [9] * 13
    stream = CandidateStream(23, 9, 4, steps=13)
    for _ in range(stop):
        next(stream)
    resumed = CandidateStream(23, 9, 4, steps=13)
    resumed.load_state_dict(stream.state_dict())
    assert [b.tolist() for b in resumed] == [b.tolist() for b in whole[stop:]]


def test_a_state_of_other_data_is_refused():
    with pytest.raises(ValueError, match="samples = 23"):
        CandidateStream(24, 9, 4, steps=3).load_state_dict(
            CandidateStream(23, 9, 4, steps=3).state_dict()
        )
    with pytest.raises(ValueError, match="empty"):
        CandidateStream(0, 9, 4, steps=3)


@given(lengths=lengths, world=st.integers(1, 6))
def test_deal_is_a_balanced_partition(lengths, world):
    shares = deal(lengths, world)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    # Graham (1969): LPT is within 4/3 - 1/(3 world) of the optimum, which is at least this.
    best = max(max(lengths), -(-sum(lengths) // world))
    ordered = sorted(lengths, reverse=True)
    if len(ordered) > world:
        best = max(best, ordered[world - 1] + ordered[world])
    assert max(loads) <= (4 / 3 - 1 / (3 * world)) * best * (1 + 1e-9) or max(loads) <= best + max(
        lengths
    )


@settings(max_examples=50)
@given(lengths=lengths, seed=st.integers(0, 99))
def test_rows_hold_every_sample_whole(lengths, seed):
    rng = np.random.default_rng(seed)
    samples = [
        Candidate(i, rng.integers(0, 1000, n), rng.random(n) < 0.5, float(i % 3))
        for i, n in enumerate(lengths)
    ]
    rows = pack(samples, 60)
    seen = []
    for row in rows:
        assert row.tokens <= 60
        for slot, position in enumerate(row.positions.tolist()):
            inside = row.sample == slot
            sample = samples[position]
            seen.append(position)
            assert row.input_ids[0, inside].tolist() == sample.ids.tolist()
            assert row.position_ids[0, inside].tolist() == list(range(len(sample.ids)))
            assert row.weights[slot] == sample.weight
            targets = row.targets[inside].tolist()
            for t in range(len(sample.ids)):
                trained = t + 1 < len(sample.ids) and sample.mask[t + 1]
                assert targets[t] == (sample.ids[t + 1] if trained else -100)
    assert sorted(seen) == list(range(len(samples)))
    # First fit leaves at most one row half empty (else two of them would have been one).
    assert sum(row.tokens <= 30 for row in rows) <= 1


@given(needs=st.lists(st.integers(1, 50), max_size=200), room=st.integers(50, 120))
def test_rows_are_those_of_a_plain_first_fit(needs, room):
    samples = [Candidate(i, np.arange(n), np.ones(n, dtype=bool)) for i, n in enumerate(needs)]
    rows, free = [], []
    for position in sorted(range(len(needs)), key=lambda i: (-needs[i], i)):
        slot = next((i for i, left in enumerate(free) if left >= needs[position]), len(free))
        if slot == len(free):
            rows.append([])
            free.append(room)
        rows[slot].append(position)
        free[slot] -= needs[position]
    assert [list(row.where) for row in pack(samples, room)] == [sorted(row) for row in rows]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="61 tokens"):
        pack([Candidate(0, np.arange(61), np.ones(61, dtype=bool))], 60)


def test_an_empty_row_trains_nothing():
    row = PackedRow.empty()
    assert row.tokens == 1
    assert (row.targets < 0).all()
    assert len(row.positions) == len(row.weights) == 0
    assert row.input_ids.dtype == torch.int64
