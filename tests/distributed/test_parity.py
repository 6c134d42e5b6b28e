"""One reference, many ways to run it: ranks, accumulation, engines, ZeRO stages, resume."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slap_ds.config.schema import Config
from slap_ds.data.stream import CandidateStream
from slap_ds.engine.whole_state import whole_weights
from slap_ds.train.inputs import read_inputs
from slap_ds.train.schedule import learning_rate
from tests.ranks import run_ranks
from tests.recipes import losses, picks, run_config, tiny_config, tiny_model

pytestmark = pytest.mark.lane

MODELS = ["llama", "glm"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(folder / kind, kind) for kind in MODELS}


def on_ranks(config: Config, world: int) -> list[float]:
    run_ranks(run_config, world, config)
    return losses([json.loads(x) for x in Path(config.run_dir, "metrics.jsonl").open()])


def plain_pytorch(config: Config) -> list[float]:
    """Ordinary training on all candidates, one padded-free sample at a time, no slap_ds engine."""
    store = read_inputs(config).train
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )
    out = []
    for step, indices in enumerate(
        CandidateStream(len(store), config.batch.candidates, config.seed, steps=config.steps)
    ):
        total, tokens = torch.zeros(()), 0
        for i in indices:
            ids = torch.tensor(store[int(i)].ids.astype("int64"))
            mask = torch.tensor(store[int(i)].mask)
            logits = model(ids[None]).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total = total + (each * mask[1:]).sum()
            tokens += int(mask[1:].sum())
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config)
        optimizer.step()
        optimizer.zero_grad()
        out.append(float(total.detach()) / tokens)
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_full_training_is_the_same_everywhere(kind, models, tmp_path):
    def config(name, **sections):
        sections = {"selection": {"method": "full"}, **sections}
        return tiny_config(models[kind], tmp_path / name, **sections)

    plain = plain_pytorch(config("plain"))
    assert plain[-1] < plain[0] - 0.1
    ways = {
        "torch engine": losses(run_config(config("torch", engine={"kind": "torch"}))),
        "one row": losses(
            run_config(config("rows", engine={"kind": "torch"}, batch={"micro_batch_tokens": 4096}))
        ),
        "checkpointing": losses(
            run_config(
                config("ckpt", engine={"kind": "torch"}, model={"gradient_checkpointing": True})
            )
        ),
        "1 rank": on_ranks(config("w1"), 1),
        "2 ranks": on_ranks(config("w2", model={"gradient_checkpointing": True}), 2),
        "4 ranks": on_ranks(config("w4"), 4),
    }
    for way, found in ways.items():
        assert len(found) == 10
        difference = max(abs(a - b) for a, b in zip(found, plain, strict=True))
        assert difference <= 1e-5, f"{way}: {difference}"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_zero_stages_give_the_same(stage, models, tmp_path):
    settings = json.loads(Path("configs/deepspeed/zero2.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    full = {"method": "full"}
    reference = losses(
        run_config(
            tiny_config(models["llama"], tmp_path / "t", engine={"kind": "torch"}, selection=full)
        )
    )
    config = tiny_config(
        models["llama"],
        tmp_path / "z",
        selection=full,
        engine={"deepspeed": str(tmp_path / "ds.json")},
    )
    found = on_ranks(config, 2)
    assert max(abs(a - b) for a, b in zip(found, reference, strict=True)) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", pytest.param("glm", marks=pytest.mark.slow)])
def test_slap_picks_the_same_on_any_number_of_ranks(kind, models, tmp_path):
    reference = tiny_config(models[kind], tmp_path / "torch", engine={"kind": "torch"})
    expected_losses = losses(run_config(reference))
    expected = picks(tmp_path / "torch")
    assert len(expected) == 10
    assert all(len(set(ids)) == 10 for ids in expected)
    for world in (1, 2, 4):
        found = on_ranks(tiny_config(models[kind], tmp_path / f"w{world}"), world)
        assert picks(tmp_path / f"w{world}") == expected, f"{world} ranks"
        assert max(abs(a - b) for a, b in zip(found, expected_losses, strict=True)) <= 1e-5


@pytest.mark.parametrize("kind", ["llama", pytest.param("glm", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("forward", "worlds"),
    # Of four, the first have two groups; the last copy heads of keys and values.
    [("reuse", [(2, 2), (4, 2), (4, 4)]), ("separate", [(2, 2)])],
)
def test_ranks_that_share_rows_train_as_one_process(forward, worlds, kind, tmp_path):
    """Losses, picks, evaluations and weights, by (ranks, ranks that share rows)."""
    model = tiny_model(tmp_path / "model", kind, num_attention_heads=4, num_key_value_heads=2)

    def config(name, **engine):
        return tiny_config(
            model,
            tmp_path / name,
            steps=5,
            model={"gradient_checkpointing": True},
            step={"forward": forward, "balance": "none"},
            engine=engine,
        )

    expected = run_config(config("one", kind="torch"))
    evals = [r["eval_loss"] for r in expected if r["event"] == "eval"]
    weights = whole_weights(tmp_path / "one/checkpoints/step-000005")
    for world, sharing in worlds:
        name = f"{world}-{sharing}"
        found = on_ranks(config(name, sequence_parallel=sharing), world)
        assert picks(tmp_path / name) == picks(tmp_path / "one"), name
        pairs = [*zip(found, losses(expected), strict=True)]
        seen = [r["eval_loss"] for r in read(tmp_path / name) if r["event"] == "eval"]
        pairs += zip(seen, evals, strict=True)
        assert len(pairs) == 7
        assert max(abs(a - b) for a, b in pairs) <= 3e-6, name
        for key, weight in whole_weights(tmp_path / name / "checkpoints/step-000005").items():
            assert float((weight - weights[key]).abs().max()) <= 1e-5, (name, key)


@pytest.mark.parametrize(
    ("engine", "world", "dtype"),
    [
        ("torch", 1, "float32"),
        ("torch", 1, "bfloat16"),
        pytest.param("deepspeed", 1, "float32", marks=pytest.mark.slow),
        ("deepspeed", 2, "float32"),
    ],
)
def test_stop_and_resume_equals_no_stop_bit_for_bit(engine, world, dtype, models, tmp_path):
    def go(name, **sections):
        sections = {"checkpoint": {"every": 4}, "engine": {"kind": engine}, **sections}
        sections["model"] = {"dtype": dtype}
        config = tiny_config(models["llama"], tmp_path / name, **sections)
        if world == 1 and engine == "torch":
            run_config(config)
        else:
            run_ranks(run_config, world, config)

    go("whole")
    go("broken", checkpoint={"every": 4, "keep_last": 9})
    # What a crash after step 8 leaves: later checkpoints gone, later lines still in the files.
    import shutil

    for later in (tmp_path / "broken" / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > 8:
            shutil.rmtree(later)
    go("broken")
    assert losses(read(tmp_path / "broken")) == losses(read(tmp_path / "whole"))
    assert picks(tmp_path / "broken") == picks(tmp_path / "whole")
    last = [r["eval_loss"] for r in read(tmp_path / "broken") if r["event"] == "eval"][-1]
    assert last == [r["eval_loss"] for r in read(tmp_path / "whole") if r["event"] == "eval"][-1]
    trained = [
        [r for r in read(tmp_path / n) if r["event"] == "train"] for n in ("broken", "whole")
    ]
    totals = [records[-1]["total"]["picked"] for records in trained]
    assert totals[0] == totals[1] == 100


def test_small_steps_count_in_bfloat16_too(models, tmp_path):
    """Most of them are far below half a unit of a bfloat16 weight, so both engines keep float32."""
    initial = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.bfloat16)
    moved = {}
    for kind in ("torch", "deepspeed"):
        config = tiny_config(
            models["llama"],
            tmp_path / kind,
            selection={"method": "full"},
            model={"dtype": "bfloat16"},
            optimizer={"lr": 2e-5},
            engine={"kind": kind},
        )
        run_config(config) if kind == "torch" else run_ranks(run_config, 1, config)
        weights = whole_weights(tmp_path / kind / "checkpoints/step-000010")
        steps = [weights[n].flatten() - p.float().flatten() for n, p in initial.named_parameters()]
        moved[kind] = torch.cat(steps).detach()
        assert float((moved[kind] != 0).float().mean()) > 0.8  # not the tokens that never came
    difference = torch.linalg.vector_norm(moved["torch"] - moved["deepspeed"])
    # Torch 2.13 gives equal bits; with 2.11 the two forwards round differently in bfloat16.
    assert difference < 0.05 * torch.linalg.vector_norm(moved["deepspeed"])


def read(run_dir: Path):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]


def test_a_checkpoint_of_other_ranks_is_refused(models, tmp_path):
    config = tiny_config(models["llama"], tmp_path / "run", steps=2)
    run_ranks(run_config, 1, config)
    told = run_ranks(_error_of_run, 2, config)
    assert all("saved by 1 rank, this run has 2" in text for text in told)


def _error_of_run(config: Config) -> str:
    try:
        run_config(config)
    except ValueError as error:
        return str(error)
    return ""


def test_weighted_picks_weigh_in_the_loss_and_gradients():
    """A batch in which a sample weighs 2 trains like one in which it stands twice."""
    from slap_ds.data.packing import Candidate, make_row
    from slap_ds.models.causal import PackedCausalLM
    from slap_ds.models.load import load_config, load_model
    from tests.recipes import TINY

    fields = {**TINY["llama"], "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16}
    fields |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    lm = load_model(None, load_config(None, fields), dtype="float32", attention="sdpa", seed=0)
    model = PackedCausalLM(lm, 8)
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (rng.integers(3, 50, n) for n in (7, 5))
    yes = np.ones(9, dtype=bool)

    def gradient(samples):
        model.zero_grad()
        loss = model(make_row(samples), "train")
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])

    once = [Candidate(0, a, yes[:7], 2.0), Candidate(1, b, yes[:5])]
    twice = [Candidate(0, a, yes[:7]), Candidate(1, b, yes[:5]), Candidate(2, a, yes[:7])]
    (loss, grad), (expected_loss, expected) = gradient(once), gradient(twice)
    assert math.isclose(loss, expected_loss, rel_tol=1e-6)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_a_mistake_on_one_rank_is_told_by_that_rank(models, tmp_path):
    """The first rank of a node cannot read the data: it says so, the others leave quietly."""
    config = tiny_config(models["llama"], tmp_path / "run", data={"train": ["./nowhere.jsonl"]})
    told = run_ranks(_kind_of_error, 2, config)
    assert told[0][0] == "RankError"
    assert "nowhere.jsonl" in told[0][1]
    assert told[1][0] == "OtherRankFailed"


def _kind_of_error(config: Config) -> tuple[str, str]:
    try:
        run_config(config)
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return "", ""
