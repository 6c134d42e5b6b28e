"""el2n, nuclear norm, mean hidden state and the file of losses, against whole logits and loops."""

import json
import math

import pytest
import torch

from slap_ds.cli import main
from slap_ds.config.file import write_config
from slap_ds.config.schema import ScoringConfig
from slap_ds.scoring import Head, Scorer, ScoreRequest, Scores, ScoringPlan, score_head
from slap_ds.scoring.head import head_bytes, head_cost
from tests.recipes import tiny_config, tiny_model

EXTRAS = ("el2n", "nuclear", "hidden")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "capped": {"cap": 3.0},
    "all": {"bias": True, "cap": 2.0, "scale": 1.7},
}
N, T, E, V = 4, 40, 7, 53  # answers longer than E: logits of less than full rank


def case(dtype=torch.float64, bias=False, cap=None, scale=1.0, tokens=T, vocab=V):
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, E, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, E, generator=g, dtype=torch.float64).to(dtype)
    b = torch.randn(vocab, generator=g, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[::5] = -100
    sample = torch.arange(tokens) * N // tokens
    return hidden, Head(weight, b, cap), targets, sample, scale


def expected(hidden, head, targets, sample, scale):
    """Written out with whole logits in float64."""
    logits = scale * hidden.double() @ head.weight.double().t()
    if head.bias is not None:
        logits = logits + head.bias.double()
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    rows = []
    for i in range(N):
        t = ((sample == i) & (targets >= 0)).nonzero()[:, 0]
        error = torch.softmax(logits[t], 1) - torch.nn.functional.one_hot(targets[t], len(head[0]))
        norm = torch.linalg.matrix_norm(logits[t], "nuc")
        rows.append(
            torch.cat([error.norm(dim=1).sum()[None], norm[None], hidden[t].double().sum(0)])
        )
    return torch.stack(rows)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("others", [{}, {"sketch": "head_input", "diagonal": "exact_head"}])
@pytest.mark.parametrize("chunk", [3, 64])
def test_signals_equal_whole_logits_in_float64(kind, others, chunk):
    hidden, head, targets, sample, scale = case(**HEADS[kind])
    request = ScoreRequest(extras=EXTRAS, **others)
    args = (hidden, head, targets, sample, N)
    found = score_head(*args, request, chunk_tokens=chunk, scale=scale)
    want = expected(hidden, head, targets, sample, scale)
    # What is below rounding of the largest singular value has its root's accuracy.
    error = (found.extras - want).abs() / want.abs()
    assert float(error[:, [0, *range(2, 2 + E)]].max()) < 1e-10
    assert float(error[:, 1].max()) < 1e-6
    # Nothing else is changed by them.
    alone = score_head(*args, ScoreRequest(**others), chunk_tokens=chunk, scale=scale)
    for a, b in zip(found[:5], alone[:5], strict=True):
        assert a is b is None or torch.equal(a, b)
    part = score_head(*args, ScoreRequest(extras=("nuclear",)), chunk_tokens=chunk, scale=scale)
    assert torch.equal(part.extras[:, 0], found.extras[:, 1])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_signals_of_low_precision_models(dtype, bound):
    hidden, head, targets, sample, scale = case(dtype, tokens=200, vocab=300)
    request = ScoreRequest(extras=EXTRAS)
    found = score_head(hidden, head, targets, sample, N, request, chunk_tokens=32).extras
    assert found.dtype == torch.float32
    want = expected(hidden, head, targets, sample, scale)
    assert float((found - want).norm() / want.norm()) < bound


def test_el2n_keeps_its_digits_where_the_model_is_sure():
    """1 - p_y = 1e-9: the sum of squares cancels to 0 in float32."""
    gap = math.log(1e9)
    logits = torch.tensor([gap, 0.0])
    head = Head(logits[:, None].float())
    one = torch.ones(1, 1)
    zero = torch.zeros(1, dtype=torch.int64)
    found = score_head(one, head, zero, zero, 1, ScoreRequest(extras=("el2n",)), chunk_tokens=4)
    assert 0.5e-9 < float(found.extras) < 2e-9


def test_broken_logits_give_nan_norms_of_their_sample_alone():
    hidden, head, targets, sample, scale = case(torch.float32)
    hidden[1] = math.inf
    request = ScoreRequest(extras=EXTRAS)
    found = score_head(hidden, head, targets, sample, N, request, chunk_tokens=8, scale=scale)
    assert math.isnan(found.extras[0, 1])
    assert torch.isfinite(found.extras[1:]).all()


def test_memory_does_not_grow_with_the_tokens():
    from benchmarks.memory import TensorPeak

    peaks = []
    for tokens in (400, 800):
        hidden, head, targets, sample, _ = case(torch.float32, tokens=tokens, vocab=8191)
        sample = torch.arange(tokens) // 20
        with TensorPeak([hidden, head.weight, targets, sample]) as peak:
            n = tokens // 20
            score_head(
                hidden, head, targets, sample, n, ScoreRequest(extras=EXTRAS), chunk_tokens=16
            )
        bound = head_bytes(ScoreRequest(extras=EXTRAS), n, E, 8191, 16)
        assert peak.bytes <= bound
        peaks.append(peak.bytes)
    assert peaks[1] < 1.1 * peaks[0]


def test_cost_counts_the_second_product_and_the_gram_matrices():
    plain = head_cost(ScoreRequest(), 100, 5, 16, 1000, 32)
    more = head_cost(ScoreRequest(extras=("nuclear",)), 100, 5, 16, 1000, 32)
    assert more - plain == 2 * (100 * 16 * 1000 + 5 * 20**2 * 1000)


def test_the_scorer_divides_what_is_a_sum_and_twins_are_equal():
    plan = ScoringPlan(ScoringConfig(), frozenset({"loss", *EXTRAS}))
    assert plan.request(0, None).extras == EXTRAS
    tokens = torch.tensor([2, 4, 5, 1])
    extras = torch.arange(20.0).reshape(4, 5)
    scores = Scores(torch.arange(4), torch.ones(4), tokens, extras=extras)
    batch = Scorer(plan).finish(scores, torch.tensor([7, 8, 7, 9]))
    assert batch.el2n.tolist() == [0, 5 / 4, 0, 15]
    assert batch.nuclear.tolist() == [1, 6, 1, 16]
    assert batch.hidden[:, 0].tolist() == [2 / 2, 7 / 4, 2 / 2, 17]
    assert batch.hidden.shape == (4, 3)
    assert batch.sketch is None


def test_validation_is_the_mean_of_preconditioned_sketches():
    plan = ScoringPlan(ScoringConfig(curvature_floor=1e-6), frozenset({"sketch", "validation"}))
    scorer = Scorer(plan)
    g = torch.Generator().manual_seed(0)
    gradient = torch.randn(3, 5, generator=g)
    gradient[2, 1] = math.nan
    diagonal = torch.rand(5, generator=g)
    tokens = torch.tensor([2, 3, 4])
    scores = Scores(torch.arange(3), torch.ones(3), tokens, gradient, diagonal, 6)
    validation = Scores(torch.arange(3), torch.ones(3), tokens, gradient * 2)
    found = scorer.finish(scores, torch.arange(3), validation).validation
    mean = (2 * gradient / tokens[:, None])[:2].mean(0) / (diagonal / 6)
    torch.testing.assert_close(found, mean)
    broken = Scores(torch.arange(3), torch.ones(3), tokens, gradient * math.nan)
    with pytest.raises(ValueError, match="no validation sample has a finite gradient"):
        scorer.finish(scores, torch.arange(3), broken)


def test_losses_writes_what_a_plain_loop_computes(tmp_path):
    from transformers import AutoModelForCausalLM

    from slap_ds.selection.methods.rho_loss import read_losses
    from slap_ds.train.inputs import read_inputs
    from slap_ds.train.run import prepare

    path = tiny_model(tmp_path / "model")
    config = tiny_config(path, tmp_path / "run", engine={"kind": "torch"})
    write_config(config, tmp_path / "run.yaml")
    out = tmp_path / "losses.jsonl"
    main(["losses", str(tmp_path / "run.yaml"), "--out", str(out)])
    assert not (tmp_path / "run").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["losses.jsonl", "model", "run.yaml"]
    store = read_inputs(config).train
    rows = [json.loads(line) for line in out.open()]
    assert [row["id"] for row in rows] == store.sample_ids.tolist()
    assert max(row["id"] for row in rows) > 2**53
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for i in range(0, len(store), 9):
        ids = torch.tensor(store[i].ids.astype("int64"))
        mask = torch.tensor(store[i].mask[1:])
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[mask], ids[1:][mask])
        assert abs(rows[i]["loss"] - float(loss)) < 1e-5
    ids, losses = read_losses(out)
    assert torch.equal(ids, torch.from_numpy(store.sample_ids).sort().values)
    assert losses.dtype == torch.float64
    # A file of other data is refused before any step, with the number of samples it lacks.
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    selection = {"method": "rho_loss", "reference_losses": str(out)}
    config = tiny_config(path, tmp_path / "run", engine={"kind": "torch"}, selection=selection)
    with pytest.raises(ValueError, match=rf"lacks 3 of the {len(rows)} training samples"):
        prepare(config)


def test_validation_samples_may_not_be_evaluation_samples(tmp_path):
    from slap_ds.train.inputs import read_inputs

    selection = {"method": "greats", "validation": ["builtin:demo/eval"]}
    config = tiny_config("unused", tmp_path, selection=selection)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"path": tiny_model(tmp_path / "m")})}
    )
    with pytest.raises(ValueError, match=r"samples of selection.validation are in data.eval too"):
        read_inputs(config)
