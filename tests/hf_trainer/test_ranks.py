"""Several ranks: DistributedDataParallel and ZeRO-3, by accelerate, as the Trainer starts them."""

import pytest
import torch
import torch.distributed as dist

from tests.hf_trainer.recipes import apart, contents, run_file, slap_trainer, weights_of
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


def train_rank(config, folder, zero3, checkpointing, method=None):
    """Two micro-batches of four a rank; returns weights, picks and whether forwards were reused."""
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
    trainer.train()
    kind = type(trainer.model_wrapped).__name__
    assert kind == ("DeepSpeedEngine" if zero3 else "DistributedDataParallel")
    picked = [chosen.sample_ids.tolist() for chosen in trainer.history]
    weights = list(trainer.model.named_parameters())
    if zero3:
        with deepspeed.zero.GatheredParameters([p for _, p in weights]):
            found = weights_of(trainer.model)
            found = {name: x.clone() for name, x in found.items()}
    else:
        found = weights_of(trainer.model)
    dist.barrier()
    return found, picked, trainer._slap_engine.can_reuse


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
    for weights, picked, reused in found:
        assert picked == contents(config)
        assert apart(weights, wanted) <= TOLERANCE
        assert reused == checkpointing
    assert all(torch.equal(found[0][0][name], found[1][0][name]) for name in wanted)
