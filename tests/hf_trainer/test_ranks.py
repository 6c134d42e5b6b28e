"""Several ranks: DistributedDataParallel and ZeRO-3, by accelerate, as the Trainer starts them."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from tests.hf_trainer.recipes import apart, contents, run_file, samples, slap_trainer, weights_of
from tests.hf_trainer.test_parity import TOLERANCE, trained
from tests.ranks import run_ranks
from tests.recipes import tiny_model

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 1000,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def train_rank(config, folder, zero3, checkpointing, order=list):
    """Two micro-batches of four a rank, of data in `order`; returns weights, what was chosen at
    every step and whether forwards were reused."""
    named = {"ddp_backend": "gloo"}
    if zero3:
        import deepspeed

        deepspeed.init_distributed(verbose=False)  # as a launched process does
        named = {"deepspeed": ZERO3}
    trainer = slap_trainer(
        config,
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=checkpointing,
        **named,
    )
    trainer.train_dataset = order(trainer.train_dataset)
    trainer.train()
    kind = type(trainer.model_wrapped).__name__
    assert kind == ("DeepSpeedEngine" if zero3 else "DistributedDataParallel")
    chosen = [(each.sample_ids.tolist(), each.selection) for each in trainer.history]
    weights = list(trainer.model.named_parameters())
    if zero3:
        with deepspeed.zero.GatheredParameters([p for _, p in weights]):
            found = weights_of(trainer.model)
            found = {name: x.clone() for name, x in found.items()}
    else:
        found = weights_of(trainer.model)
    dist.barrier()
    return found, chosen, trainer._slap_engine.can_reuse


@pytest.mark.parametrize("zero3", [False, True], ids=["ddp", "zero3"])
@pytest.mark.parametrize(
    ("kind", "method", "checkpointing"),
    [
        ("llama", "hard", False),
        ("llama", "slap", True),
        pytest.param("glm", "slap", True, marks=pytest.mark.slow),
    ],
)
def test_ranks_agree_and_train_as_slap_ds_train_does(tmp_path, kind, method, checkpointing, zero3):
    """Quotas are off, so that the picks are those of one rank."""
    config = run_file(
        tiny_model(tmp_path / "model", kind),
        tmp_path / "run",
        selection={"method": method, "keep": 0.6},
        step={"balance": "none"},
    )
    wanted = trained(config)
    found = run_ranks(train_rank, 2, config, str(tmp_path / "hf"), zero3, checkpointing)
    for weights, chosen, reused in found:
        assert [ids for ids, _ in chosen] == contents(config)
        assert apart(weights, wanted) <= TOLERANCE
        assert reused == checkpointing
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in wanted)


def lopsided(rows):
    """Of every 16 candidates the long ones where rank 0 reads: the first four, and the third."""
    found = []
    for start in range(0, len(rows), 16):
        ordered = sorted(rows[start : start + 16], key=lambda row: -len(row["input_ids"]))
        long, short = ordered[:8], ordered[8:]
        found += long[:4] + short[:4] + long[4:] + short[4:]
    return found


def loads(rows, step, selection):
    """Tokens of a step's picks on either rank."""
    tokens = [0, 0]
    for position in selection.picks.tolist():
        tokens[position // 4 % 2] += len(rows[16 * step + position]["input_ids"])
    return tokens


def plain_loop(config, rows, selections):
    """Weights after steps on these picks, one sample at a time, by PyTorch alone."""
    model, o = AutoModelForCausalLM.from_pretrained(config.model.path), config.optimizer
    settings = {"betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, **settings)
    for step, selection in enumerate(selections):
        loss, weight = torch.zeros(()), 0.0
        for position, of_pick in zip(*(x.tolist() for x in selection[:2]), strict=True):
            row = rows[16 * step + position]
            logits = model(row["input_ids"][None]).logits[0, :-1]
            total = torch.nn.functional.cross_entropy(logits, row["labels"][1:], reduction="sum")
            loss = loss + of_pick * total
            weight += of_pick * int((row["labels"][1:] >= 0).sum())
        (loss / weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize(
    ("method", "zero3", "checkpointing"),
    [("hard", False, False), ("slap", True, True), ("sampled", False, True)],
    ids=["ddp", "zero3-reuse", "sampled"],
)
def test_quotas_spread_the_picks_over_the_ranks_that_hold_them(
    tmp_path, method, zero3, checkpointing
):
    """Rank 0 holds the long samples: under quotas it gives fewer of them, and trains them right."""
    path, busiest = tiny_model(tmp_path / "model"), {}
    for balance in ("none", "quota"):
        config = run_file(
            path,
            tmp_path / balance,
            selection={"method": method, "keep": 0.6},
            step={"balance": balance},
        )
        rows = lopsided(samples(config))
        given = (config, str(tmp_path / "hf"), zero3, checkpointing, lopsided)
        found = run_ranks(train_rank, 2, *given)
        selections = [selection for _, selection in found[0][1]]
        assert all(len(set(s.picks.tolist())) == len(s.picks) > 0 for s in selections)
        for one, other in zip(*([s for _, s in chosen] for _, chosen, _ in found), strict=True):
            assert torch.equal(one.picks, other.picks)
            assert torch.equal(one.weights, other.weights)
        of_steps = [loads(rows, step, s) for step, s in enumerate(selections)]
        busiest[balance] = [2 * max(load) / sum(load) for load in of_steps]
        wanted = plain_loop(config, rows, [(s.picks, s.weights) for s in selections])
        for weights, _, reused in found:
            assert apart(weights, wanted) <= TOLERANCE
            assert reused == (checkpointing and method != "sampled")
    if method == "sampled":  # each is drawn with its chance, wherever it lies
        assert busiest["quota"] == busiest["none"]
    else:  # as even as eight candidates a rank can be
        assert sum(busiest["quota"]) < sum(busiest["none"]) - 0.8
