"""The formulas of `slap-ds estimate` against counts of the model and sums over rows."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slap_ds.data.packing import Candidate, make_row
from slap_ds.estimate import (
    BOUNDARIES,
    GATHERED,
    GPUS,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Hardware,
    Shape,
    estimate,
)
from slap_ds.estimate.outlook import Tokens, outlook
from slap_ds.models.causal import PackedCausalLM
from slap_ds.models.load import load_config, load_model
from slap_ds.models.reuse import host_boundary_bytes, pinned_bytes
from slap_ds.models.split import Split
from slap_ds.train.inputs import settle_candidates
from tests.config.test_recipes import PUBLISHED
from tests.recipes import SIZES, TINY, tiny_config

GIB = 2**30
SLOW_NETWORK = Hardware(gather_bytes_per_s=1e9)
SEPARATE = {"settings": {"stage": 0}, "step": {"forward": "separate"}}


def meta(**changes):
    fields = {**PUBLISHED["llama3-8b"], **changes}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(fields.pop("model_type"), **fields)
        )


def of(model, tmp_path, gpus=8, settings=None, candidates=32, **sections):
    """An estimate for 512 tokens a sample; `settings` go into the DeepSpeed JSON."""
    raw = json.loads(Path("configs/deepspeed/zero2.json").read_text())
    raw["zero_optimization"] |= settings or {}
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    sections = {
        "model": {"dtype": "bfloat16", "gradient_checkpointing": True},
        "batch": {"micro_batch_tokens": 8192},
        **sections,
        "engine": {"deepspeed": str(tmp_path / "ds.json"), **sections.get("engine", {})},
    }
    config = tiny_config("m", tmp_path / "run", **sections)
    return estimate(config, Shape.of(model.config), 512, 0.5, gpus, candidates, SLOW_NETWORK)


def test_each_stage_divides_what_it_divides(tmp_path):
    model = meta()
    count = sum(p.numel() for p in model.parameters())
    found = {s: of(model, tmp_path, settings={"stage": s}) for s in (0, 1, 2, 3)}
    for stage, e in found.items():
        ranks = [8 if stage >= first else 1 for first in (3, 2, 1)]
        summed = 4 if stage >= 2 else 2  # in float32 where they are divided
        for part, each, divided in zip(
            (WEIGHTS, GRADIENTS, OPTIMIZER), (2, summed, 12), ranks, strict=True
        ):
            assert e.memory_gib[part] == pytest.approx(count * each / divided / GIB), (stage, part)
        assert (e.memory_gib[GATHERED] > 0) == (stage == 3)
    totals = [found[s].total_gib for s in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    # 7/8 of 16 GB at 1 GB/s: once a row under ZeRO-3. One row is scored, two are trained, the
    # first of them with the head of the scored one; whole weights are gathered once after the
    # step, and gradients are reduced.
    once = count * 2 * 7 / 8 / 1e9
    head = model.lm_head.weight.numel() / count
    stages = {0: (0, 2), 1: (0, 2), 2: (0, 3), 3: (1, 2 - head)}
    for stage, (score, train) in stages.items():
        parts = found[stage].step_s
        assert parts["train"] == pytest.approx(train * once), stage
        assert parts["score"] == pytest.approx(once) if score else parts["score"] < once / 10


@pytest.mark.parametrize("tied", [False, True])
def test_a_gathered_block_is_a_block_of_the_model(tied, tmp_path):
    model = meta(tie_word_embeddings=tied)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    head = model.get_output_embeddings().weight.numel()
    found = of(model, tmp_path, settings={"stage": 3}).memory_gib[GATHERED]
    assert found == pytest.approx((2 * block + head) * 2 / GIB, rel=1e-4)


def test_offload_counts_each_buffer_of_the_host(tmp_path):
    count = sum(p.numel() for p in meta().parameters())
    for pinned in (False, True):
        cpu = {"device": "cpu", "pin_memory": pinned}
        settings = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
        e = of(meta(), tmp_path, gpus=2, settings=settings)
        assert not {WEIGHTS, GRADIENTS, OPTIMIZER} & set(e.memory_gib)
        # master 4, moments 8, gradients 2 and 4, weights 2
        least = count * 20 / 2 / GIB
        total = sum(e.host_gib.values())
        if not pinned:
            assert total == pytest.approx(least)
        else:  # 4.0e9 a rank: 7.5 GiB twice, and gradients in groups of 3.7 GiB
            expected = {WEIGHTS: 8, GRADIENTS: 8 + 4 * 4 + 1 / 16, OPTIMIZER: count * 6 / GIB}
            assert e.host_gib[WEIGHTS] == expected[WEIGHTS]
            assert e.host_gib[GRADIENTS] == pytest.approx(expected[GRADIENTS], abs=0.1)
            assert e.host_gib[OPTIMIZER] == pytest.approx(expected[OPTIMIZER])


def test_block_inputs_on_the_host_are_shown_there(tmp_path):
    model = meta()
    kept = {
        where: of(model, tmp_path, candidates=100, step={"boundaries": where})
        for where in ("device", "host")
    }
    token = 33 * 4096 * 2
    assert kept["device"].memory_gib[BOUNDARIES] == 100 * 512 * token / GIB
    assert BOUNDARIES not in kept["device"].host_gib
    # Three scored rows of 16,384 tokens and one of 2,048: powers of two already.
    assert kept["host"].host_gib[BOUNDARIES] == 100 * 512 * token / GIB
    assert kept["host"].memory_gib[BOUNDARIES] == 8192 * token / GIB  # the row in training


@pytest.mark.parametrize("width", [4096, 5120])
@pytest.mark.parametrize("tokens", [1, 4999, 16384, 50000])
def test_pinned_rows_take_powers_of_two(tokens, width):
    rows = [16384] * (tokens // 16384) + [tokens % 16384] * (tokens % 16384 > 0)
    pinned = 33 * sum(2 ** math.ceil(math.log2(n * width * 2)) for n in rows)
    assert host_boundary_bytes(tokens, 16384, 32, width, 2) == pinned
    assert [pinned_bytes(n) for n in (0, 1, 2, 3, 4, 5, 1025)] == [0, 1, 2, 4, 4, 8, 2048]


@pytest.mark.parametrize(
    ("scoring", "width"), [({"sketch_dim": 256}, 256), ({"sketch": "head_kron"}, 16 * 16)]
)
def test_gather_and_choice_are_divided_by_a_narrower_sketch(scoring, width, tmp_path):
    model = meta()
    wide, narrow = (of(model, tmp_path, gpus=512, scoring=s) for s in ({}, scoring))
    ratio = model.config.hidden_size / width
    assert wide.step_s["select"] / narrow.step_s["select"] == pytest.approx(ratio)
    saved = 512 * 32 * 4 * (model.config.hidden_size - width) / SLOW_NETWORK.gather_bytes_per_s
    assert wide.step_s["gather"] - narrow.step_s["gather"] == pytest.approx(saved)


def test_a_method_that_scores_nothing_costs_what_it_keeps(tmp_path):
    model = meta()
    shape, found = Shape.of(model.config), {}
    for method in ("sampled", "slap"):
        sections = {"selection": {"method": method, "keep": 0.6}}
        config = tiny_config("m", tmp_path / "run", model={"dtype": "bfloat16"}, **sections)
        found[method] = estimate(config, shape, 512, 0.5, 1, 4096, Hardware())
    assert found["sampled"].ratio_to_full == pytest.approx(0.6)
    assert sum(found["sampled"].step_s[p] for p in ("score", "gather", "select")) == 0
    assert found["slap"].ratio_to_full > 0.6


def test_a_head_chunk_is_that_of_a_gpu(tmp_path):
    """Logits, probabilities and their bfloat16 copy of 2,048 tokens, or of as many as are asked."""
    model = meta()
    vocab = model.config.vocab_size
    found = of(model, tmp_path).memory_gib["head chunk"]
    assert found == 2048 * vocab * (4 + 4 + 2) / GIB
    few = of(model, tmp_path, scoring={"chunk_tokens": 100}).memory_gib["head chunk"]
    assert few == pytest.approx(found * 100 / 2048)


def test_ranks_that_share_rows_hold_their_part(tmp_path):
    whole, shared = (
        of(meta(), tmp_path, gpus=16, engine={"sequence_parallel": n}, **SEPARATE) for n in (1, 4)
    )
    for part in (BOUNDARIES, "one block's activations"):
        assert shared.memory_gib[part] == whole.memory_gib[part] / 4
    assert (whole.exchanged_mib, shared.rows) == (0, 4 * whole.rows)
    # A forward that scores, one that trains, a recompute and a backward, of 60 % of the tokens.
    extra = shared.exchanged_mib * 2**20 * 32 * whole.rows * 4 / 1e9
    assert shared.step_s["score"] - whole.step_s["score"] == pytest.approx(extra)
    assert shared.step_s["train"] - whole.step_s["train"] == pytest.approx(0.6 * 3 * extra)
    with pytest.raises(ValueError, match="does not divide 6 ranks"):
        of(meta(), tmp_path, gpus=6, engine={"sequence_parallel": 4})


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_ranks_exchange_is_what_is_estimated(ranks, tmp_path):
    """Two key heads: on four ranks each goes to two of them."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    fields = {**SIZES, **TINY["llama"], **heads}
    lm = load_model(None, load_config(None, fields), dtype="float32", attention="packed", seed=0)
    sent = []

    def exchange(x):
        sent.append(x[1:].nbytes)  # one entry stays here
        return x

    model = PackedCausalLM(lm, 8)
    model.split = Split(0, ranks, exchange)
    ids = np.arange(3, 131)
    row = make_row([Candidate(i, ids, ids > 9) for i in range(3)])  # of 384 tokens
    model(row.part(0, ranks), "train")
    config = tiny_config("m", tmp_path, engine={"sequence_parallel": ranks})
    e = estimate(config, Shape.of(lm.config), 128, 0.5, ranks, 3)
    assert e.exchanged_mib * 2**20 * 2 == sum(sent)


def ahead(tmp_path, gpus, candidates, tokens=None, kind="h100", **sections):
    tokens = tokens or Tokens(512, 0.5, 100_000)
    model = meta()
    sections = {
        "model": {"dtype": "bfloat16", "gradient_checkpointing": True},
        "batch": {"micro_batch_tokens": 8192},
        **sections,
    }
    config = tiny_config("m", tmp_path / "run", **sections)
    return outlook(config, Shape.of(model.config), tokens, gpus, candidates, GPUS[kind])


def test_a_run_that_gains_nothing_is_told_what_to_set_and_that_helps(tmp_path):
    for method in ("slap", "sampled"):
        chosen = {"selection": {"method": method, "keep": 0.6}}
        thin = ahead(tmp_path, 32, 256, **chosen)
        assert "no faster than full training with these settings (1.00" in thin.advice
        candidates = int(re.search(r"set batch.candidates (\d+) \(", thin.advice)[1])
        assert ahead(tmp_path, 32, candidates, **chosen).advice is None
        assert ahead(tmp_path, 32, candidates, **chosen).estimate.ratio_to_full < 0.75
    # One chooser for 262,144 candidates: no number of rows helps, a narrower sketch does.
    chosen = {"selection": {"method": "slap", "keep": 0.6}}
    many = ahead(tmp_path, 4096, 262_144, **chosen)
    assert "slower than full training" in many.advice
    assert "set scoring.sketch_dim 256" in many.advice
    narrow = ahead(tmp_path, 4096, 262_144, **chosen, scoring={"sketch_dim": 256})
    assert narrow.estimate.ratio_to_full < 0.95
    assert ahead(tmp_path, 32, 256, selection={"method": "full"}).advice is None


def test_hours_disk_and_what_fits(tmp_path):
    found = ahead(tmp_path, 8, 256, steps=None, epochs=2, checkpoint={"keep_last": 3})
    e = found.estimate
    assert found.steps == math.ceil(200_000 / 256)
    assert found.hours == pytest.approx(found.steps * sum(e.step_s.values()) / 3600)
    count = sum(p.numel() for p in meta().parameters())
    assert found.checkpoint_bytes == 12 * count
    assert found.disk_bytes == 4 * 12 * count
    assert e.needed_gib == pytest.approx(1.1 * e.total_gib + 2)
    assert found.fits
    assert not ahead(tmp_path, 1, 32).fits
    assert ahead(tmp_path, 8, 256, kind="a100-40").fits == (e.needed_gib <= 39)
    warm = ahead(tmp_path, 8, 256, steps=100, selection={"method": "slap", "warmup": 0.5})
    mean = (sum(warm.estimate.step_s.values()) + warm.estimate.full_step_s) / 2
    assert warm.hours == pytest.approx(100 * mean / 3600)
    assert ahead(tmp_path, 8, 256, Tokens(), steps=None, epochs=2).hours is None


@pytest.mark.parametrize("gpus", [1, 8, 32, 64, 512])
def test_rows_per_rank_auto_gains_on_every_cluster(gpus, tmp_path):
    model, shape = meta(), Shape.of(meta().config)
    for method in ("sampled", "slap"):
        config = tiny_config(
            "m",
            tmp_path / "run",
            model={"dtype": "bfloat16", "gradient_checkpointing": True},
            batch={"rows_per_rank": "auto", "micro_batch_tokens": 8192},
            selection={"method": method},
        )
        mine = settle_candidates(config, model.config, 512, 0.5, gpus)
        e = estimate(
            mine,
            shape,
            512,
            0.5,
            gpus,
            mine.batch.candidates / gpus,
            Hardware.of(GPUS["h100"], gpus),
        )
        assert e.ratio_to_full < {"sampled": 0.7, "slap": 0.85}[method]
        assert e.rows == pytest.approx(0.9 * mine.batch.rows_per_rank, rel=0.05)
        # What a run writes down gives the same run again.
        assert settle_candidates(mine, model.config, 512, 0.5, gpus) == mine
