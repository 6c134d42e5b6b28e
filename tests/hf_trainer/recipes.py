"""Trainers on the candidates that `slap-ds train` would draw, in the same order."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from slap_ds.data.stream import CandidateStream
from slap_ds.hf_trainer import SlapTrainer
from slap_ds.jsonl import read_lines
from slap_ds.train.inputs import read_inputs
from tests.recipes import tiny_config

STEPS = 4


def run_file(path: str, run_dir: Any, **sections: Any) -> Any:
    """A constant learning rate, which both loops know."""
    own = {"optimizer": {"warmup_steps": 0, "min_lr_ratio": 1.0}, "steps": STEPS}
    return tiny_config(path, run_dir, engine={"kind": "torch"}, **{**own, **sections})


def samples(config: Any) -> list[dict[str, Any]]:
    """All candidates of a run, one after the other."""
    store = read_inputs(config).train
    stream = CandidateStream(
        len(store), config.batch.candidates, config.seed, steps=config.steps, epochs=config.epochs
    )
    drawn = [store[int(i)] for indices in stream for i in indices]
    rows = []
    for sample in drawn:
        ids = torch.from_numpy(sample.ids.astype("int64"))
        labels = ids.masked_fill(~torch.from_numpy(sample.mask.copy()), -100)
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator that fills up on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


def packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A collator without padding: samples one after the other, positions that begin anew."""
    return {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
    }


def arguments(config: Any, folder: Any, **named: Any) -> TrainingArguments:
    """What `config` says, in a Trainer's words, for one process."""
    o = config.optimizer
    given = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch.candidates,
        "train_sampling_strategy": "sequential",
        "learning_rate": o.lr,
        "lr_scheduler_type": "constant",
        "adam_beta1": o.betas[0],
        "adam_beta2": o.betas[1],
        "adam_epsilon": o.eps,
        "weight_decay": o.weight_decay,
        "max_grad_norm": o.max_grad_norm,
        "seed": config.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **named,
    }
    return TrainingArguments(**given)


class Noting(SlapTrainer):
    """Keeps what every step has trained."""

    def get_batch_samples(self, *args: Any) -> Any:
        found = super().get_batch_samples(*args)
        self.history = [*getattr(self, "history", []), self.chosen]
        return found


def slap_trainer(
    config: Any, folder: Any, collate: Any = padded, lora: Any = None, **named: Any
) -> Noting:
    """A Trainer with the selection of `config`."""
    given = arguments(config, folder, **named)  # first: ZeRO-3 partitions the model as it is made
    return Noting(
        adapted(AutoModelForCausalLM.from_pretrained(config.model.path), lora),
        given,
        train_dataset=samples(config),
        data_collator=collate,
        selection=config.selection.model_dump(exclude_unset=True),
        scoring=config.scoring.model_dump(exclude_unset=True),
        step=config.step.model_dump(exclude_unset=True),
    )


def adapted(model: Any, lora: Any) -> Any:
    """peft's model around it, fresh adapters from one seed."""
    if lora is None:
        return model
    import peft

    torch.manual_seed(7)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))


def plain_trainer(config: Any, folder: Any, lora: Any = None, **named: Any) -> Trainer:
    """transformers' own, on the same data."""
    model = adapted(AutoModelForCausalLM.from_pretrained(config.model.path), lora)
    data = samples(config)
    return Trainer(
        model, arguments(config, folder, **named), data_collator=padded, train_dataset=data
    )


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def apart(one: Any, other: Any) -> float:
    """The largest difference between two models' weights."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def contents(config: Any) -> list[list[int]]:
    """The contents of the samples that a finished run has trained, by step."""
    store = read_inputs(config).train
    of = dict(zip(store.sample_ids.tolist(), store.content.tolist(), strict=True))
    lines = read_lines(config_dir(config) / "picks.jsonl")
    return [[of[number] for number in line["ids"]] for line in lines]


def config_dir(config: Any) -> Any:
    from pathlib import Path

    return Path(config.run_dir)
