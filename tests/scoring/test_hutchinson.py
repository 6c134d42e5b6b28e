"""Hutchinson's estimates converge as they should; the blocks' products equal double backward."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from slap_ds.data.packing import Candidate, PackedRow, make_row
from slap_ds.models.causal import PackedCausalLM
from slap_ds.models.load import load_config, load_model
from slap_ds.scoring import Head, ScoreRequest, Tail, score_head
from slap_ds.scoring.probes import signs, token_subset
from tests.recipes import TINY

LENGTHS = (7, 5, 2, 9)


def row_of_samples():
    rng = np.random.default_rng(0)
    return make_row(
        [
            Candidate(i, rng.integers(3, 53, n), np.arange(n) > (n if i == 1 else n // 2 - 1))
            for i, n in enumerate(LENGTHS)
        ]
    )


def tiny(kind, attention="packed", **changes):
    fields = {
        **TINY[kind],
        "vocab_size": 53,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        **({"head_dim": 8} if kind == "glm" else {}),
        **changes,
    }
    config = load_config(None, fields)
    return load_model(None, config, dtype="float32", attention=attention, seed=0).eval()


def score(lm, request, row, chunk_tokens=3):
    model = PackedCausalLM(lm, chunk_tokens)
    if request.blocks:
        model.tail = Tail(lm, request.blocks)
    with torch.no_grad():
        return model(row, "score", request)


def samples_of(row):
    ids, targets = row.input_ids[0].split(row.lengths), row.targets.split(row.lengths)
    return list(zip(ids, targets, strict=True))


def sample_loss(lm, ids, targets):
    logits = lm.base_model(ids[None]).last_hidden_state[0] @ lm.lm_head.weight.t()
    return cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def shifted_hessian(lm, blocks, row):
    """Hessian of the summed loss by a shift of the input of the last blocks, each sample alone, in
    float64 with ordinary autograd through the whole model."""
    lm = lm.double()
    lm.set_attn_implementation("eager")
    layer = lm.base_model.layers[-blocks]

    def loss(shift):
        handle = layer.register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] + shift, *args[1:]), kwargs), with_kwargs=True
        )
        total = sum(sample_loss(lm, *sample) for sample in samples_of(row))
        handle.remove()
        return total

    zero = torch.zeros(lm.config.hidden_size, dtype=torch.float64)
    return torch.autograd.functional.hessian(loss, zero)


@pytest.mark.parametrize(
    ("kind", "blocks", "attention", "changes"),
    [
        ("llama", 1, "packed", {}),
        ("llama", 2, "sdpa", {"tie_word_embeddings": True}),
        ("glm", 2, "packed", {}),
        ("llama", 3, "eager", {}),
    ],
)
def test_blocks_equal_double_backward(kind, blocks, attention, changes):
    lm, row = tiny(kind, attention, **changes), row_of_samples()
    request = ScoreRequest(
        "head_input", "hutchinson_blocks", probes=3, blocks=blocks, seed=1, step=2
    )
    out = score(lm, request, row)
    hessian = shifted_hessian(lm, blocks, row)
    z = signs(1, 2, "probes", 16, 3).double()
    expected = (z * (hessian @ z)).mean(1)
    error = (out.diagonal.double() - expected).abs().max() / expected.abs().max()
    assert error <= 2e-6, f"{error:.1e}"  # eager attention on an AMD processor: 1.09e-6
    assert out.diagonal_tokens == out.tokens.sum() == (row.targets >= 0).sum()


def test_a_broken_sample_stays_out_of_the_blocks_curvature():
    lm, row = tiny("llama"), row_of_samples()
    request = ScoreRequest(None, "hutchinson_blocks", probes=2, blocks=2)
    without = make_row(
        [
            Candidate(i, ids.numpy(), (targets >= 0).roll(1).numpy())
            for i, (ids, targets) in enumerate(samples_of(row))
            if i != 2
        ]
    )
    # Sample 2 alone holds this token, and its embedding is broken.
    ids = row.input_ids.clone()
    ids[row.sample[None] == 2] = 52
    assert (ids == 52).sum() == LENGTHS[2]
    lm.base_model.embed_tokens.weight.data[52] = float("nan")
    clean, broken = score(lm, request, without), score(lm, request, row._replace(input_ids=ids))
    assert broken.loss.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(broken.diagonal, clean.diagonal)
    assert broken.diagonal_tokens == clean.diagonal_tokens


def test_an_empty_row_adds_nothing():
    request = ScoreRequest(None, "hutchinson_blocks", probes=2, blocks=1)
    out = score(tiny("llama"), request, PackedRow.empty())
    assert out.loss.shape == (0,)
    assert out.diagonal.abs().max() == out.diagonal_tokens == 0


def test_models_that_cannot_are_refused():
    with pytest.raises(ValueError, match="blocks is 4, the model has 3"):
        Tail(tiny("llama"), 4)
    lm = tiny("llama")
    lm.base_model.layers[-1].mlp.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"block 2 holds more than a plain LlamaDecoderLayer"):
        Tail(lm, 1)
    lm.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="no second derivative"):
        Tail(lm, 1)


def relative_errors(counts, estimate, exact, repeats):
    """Root mean square over `repeats` of the relative error, for each number of probes."""
    out = []
    for m in counts:
        errors = [float((estimate(m, r) - exact).norm() / exact.norm()) for r in range(repeats)]
        out.append(np.sqrt(np.mean(np.square(errors))))
    return out


def slope(counts, errors):
    return np.polyfit(np.log(counts), np.log(errors), 1)[0]


def test_head_estimates_converge_at_the_root_of_the_probes():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 24, generator=g, dtype=torch.float64)
    head = Head(torch.randn(101, 24, generator=g, dtype=torch.float64))
    targets = torch.randint(0, 101, (40,), generator=g)
    sample = torch.arange(40) // 10

    def run(request):
        return score_head(hidden, head, targets, sample, 4, request, chunk_tokens=64)

    exact = run(ScoreRequest(None, "exact_head")).diagonal
    counts = [4, 16, 64, 256]

    def estimate(m, r):
        return run(ScoreRequest(None, "hutchinson_head", probes=m, seed=r)).diagonal

    errors = relative_errors(counts, estimate, exact, 12)
    assert abs(slope(counts, errors) + 0.5) <= 0.07, errors

    # The samples' own diagonals, from the sketch.
    parts = [
        score_head(
            hidden[sample == s],
            head,
            targets[sample == s],
            sample[sample == s] * 0,
            1,
            ScoreRequest(None, "exact_head"),
            chunk_tokens=64,
        ).diagonal
        for s in range(4)
    ]

    def sketch(m, r):
        return run(ScoreRequest("hvp", None, probes=m, seed=r)).gradient

    errors = relative_errors([4, 16, 64], sketch, torch.stack(parts), 8)
    assert abs(slope([4, 16, 64], errors) + 0.5) <= 0.07, errors


def test_block_estimates_converge_at_the_root_of_the_probes():
    lm = tiny("llama", num_hidden_layers=1)
    row = make_row([Candidate(0, np.arange(3, 12), np.arange(9) > 2)])

    def estimate(m, r):
        request = ScoreRequest(None, "hutchinson_blocks", probes=m, blocks=1, seed=r)
        return score(lm, request, row).diagonal.double()

    counts = [2, 8, 32]
    estimates = {(m, r): estimate(m, r) for m in counts for r in range(8)}
    exact = shifted_hessian(lm, 1, row).diagonal()
    errors = relative_errors(counts, lambda m, r: estimates[m, r], exact, 8)
    assert abs(slope(counts, errors) + 0.5) <= 0.1, errors


def test_signs_depend_on_seed_step_and_name_alone():
    first = signs(1, 2, "probes", 50, 4)
    torch.manual_seed(99)
    assert torch.equal(first, signs(1, 2, "probes", 50, 4))
    assert set(first.unique().tolist()) == {-1.0, 1.0}
    for other in [(2, 2, "probes"), (1, 3, "probes"), (1, 2, "P")]:
        assert 0.3 < (signs(*other, 50, 4) == first).float().mean() < 0.7


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_token_subsets_have_their_share_wherever_tokens_lie(share):
    position = torch.arange(400).repeat_interleave(50)
    offset = torch.arange(50).repeat(400)
    kept = token_subset(3, 7, position, offset, share)
    assert abs(kept.double().mean() - share) < 4 * (share * (1 - share) / 20000) ** 0.5
    order = torch.randperm(20000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_subset(3, 7, position[order], offset[order], share), kept[order])
    # By sample and by place in the sample, too, and anew at each step.
    for group in (position, offset):
        counts = torch.zeros(int(group.max()) + 1).index_add_(0, group, kept.float())
        total = torch.bincount(group).float()
        deviation = (counts - share * total) / (total * share * (1 - share)).sqrt()
        assert deviation.abs().max() < 5
        assert 0.7 < deviation.std() < 1.3
    again = token_subset(3, 8, position, offset, share)
    both = (kept & again).double().mean()
    assert abs(both - share**2) < 0.02
