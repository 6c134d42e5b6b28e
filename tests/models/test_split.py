"""Rows whose tokens lie on several ranks: parts, and attention on them, against the whole row."""

import threading

import numpy as np
import pytest
import torch

from slap_ds.data.packing import IGNORE, Candidate, PackedRow, make_row
from slap_ds.models.attention import packed_attention
from slap_ds.models.load import load_config
from slap_ds.models.split import Split, check_split
from tests.recipes import SIZES, TINY

SIX = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


def samples(lengths):
    rng = np.random.default_rng(0)
    return [
        Candidate(i, rng.integers(3, 50, n), rng.random(n) < 0.6) for i, n in enumerate(lengths)
    ]


def test_parts_hold_every_token_once_and_nothing_else_is_trained():
    row = make_row(samples([7, 1, 12]))
    for ranks in (2, 4):
        parts = [row.part(rank, ranks) for rank in range(ranks)]
        assert {part.lengths for part in parts} == {tuple(-(-n // ranks) for n in (7, 1, 12))}
        for sample, length in enumerate(row.lengths):
            begin = row.cu_seqlens[sample]
            for i in range(length):
                part = parts[i % ranks]
                at = int(part.cu_seqlens[sample]) + i // ranks
                for field in ("input_ids", "position_ids"):
                    assert getattr(part, field)[0, at] == getattr(row, field)[0, begin + i]
                assert part.targets[at] == row.targets[begin + i]
                assert part.sample[at] == sample
        trained = sum(int((part.targets != IGNORE).sum()) for part in parts)
        assert trained == len(row.response) == sum(len(part.response) for part in parts)
        for part in parts:
            assert part.response.tolist() == (part.targets != IGNORE).nonzero()[:, 0].tolist()
            places = row.cu_seqlens.numpy()[part.response_sample] + part.response_offset
            assert (row.targets[places] == part.targets[part.response]).all()


def test_the_part_of_picked_samples_is_their_parts_end_to_end():
    """So forward reuse needs nothing of other ranks: a rank trains its part of what it kept."""
    every = samples([9, 4, 6])
    for rank in range(3):
        scored, picked = make_row(every).part(rank, 3), make_row(every[1:]).part(rank, 3)
        assert torch.equal(scored.input_ids[:, scored.lengths[0] :], picked.input_ids)
        assert torch.equal(scored.targets[scored.lengths[0] :], picked.targets)


def test_an_empty_row_has_a_part_for_every_rank():
    for rank in range(4):
        part = PackedRow.empty().part(rank, 4)
        assert (part.lengths, part.where, len(part.response)) == ((1,), (), 0)


def in_step(ranks, work):
    """`work(split)` on as many threads, whose exchanges autograd sees through; their results."""
    wait, sent, out = threading.Barrier(ranks), [None] * ranks, [None] * ranks

    def run(rank):
        def exchange(x):
            sent[rank] = x
            wait.wait()
            got = torch.stack([other[rank] for other in sent])
            wait.wait()
            return got

        try:
            out[rank] = work(Split(rank, ranks, exchange))
        except BaseException:
            wait.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "window"), [(2, 4, 2, None), (4, 4, 2, 5), (4, 8, 1, None)]
)
def test_attention_of_parts_is_that_of_the_row(ranks, heads, kv_heads, window):
    lengths = (8, 12, 4)
    total = sum(lengths)
    torch.manual_seed(0)
    sizes = [(heads, 6), (kv_heads, 6), (kv_heads, 5)]
    states = [torch.randn(1, h, total, d, dtype=torch.float64) for h, d in sizes]
    for x in states:
        x.requires_grad_()
    options = {
        "sample_lengths": lengths,
        "cu_seq_lens_q": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "sliding_window": window,
    }
    weight = torch.randn(1, total, heads, 5, dtype=torch.float64)
    whole, _ = packed_attention(torch.nn.Module(), *states, None, **options)
    expected = torch.autograd.grad((whole * weight).sum(), states)

    def work(split):
        mine = [x[:, :, split.rank :: ranks] for x in states]
        return packed_attention(torch.nn.Module(), *mine, None, split=split, **options)[0]

    parts = in_step(ranks, work)
    found = torch.stack(parts, 2).flatten(1, 2)  # token i of rank r is the row's i * ranks + r
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-14)
    gradients = torch.autograd.grad((found * weight).sum(), states)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "changes", "ranks", "told"),
    [
        ("llama", {}, 4, "4, and the model has 2 attention heads with 2 for keys"),
        ("llama", SIX, 2, "3 for keys"),
        ("lfm2", {"full_attn_idxs": [1]}, 2, "lfm2 has conv,"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            2,
            "dynamic rotary positions",
        ),
        ("mixtral", {}, 2, "output_router_logits"),
    ],
)
def test_what_ranks_cannot_share_is_refused_in_one_line(kind, changes, ranks, told):
    fields = {**SIZES, **TINY.get(kind, {"model_type": kind}), **changes}
    config = load_config(None, fields)
    check_split(config, 1)
    with pytest.raises(ValueError, match=r".") as caught:
        check_split(config, ranks)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
