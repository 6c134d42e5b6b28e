"""The contestants of bench_peers.py, each in a process (or ranks) of its own.

    python benchmarks/peers.py NAME FOLDER       started by bench_peers.py, which fills the folder

All load the same weights, train the same samples in the same order, and stand still between turns,
until the other contestants have had theirs. Nothing of slap_ds is imported for the others. The
learning rate is so small that the weights stay, so that losses can be compared at any time.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

LR = 1e-9
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
Row = dict[str, list[int]]


class Turns:
    """One contestant's clock: `step` after each step stops it at the end of a turn, and waits.

    Turn 0 is the first step, timed from the start of the process; after it the loss is compared.
    """

    def __init__(self, name: str, folder: Path, job: dict[str, Any]) -> None:
        self.name, self.folder, self.per_turn = name, folder, job["steps_a_turn"]
        self.rank = int(os.environ.get("RANK", "0"))
        self.turn = self.steps = 0
        self.tokens = {"candidate_tokens": 0, "trained_tokens": 0}
        self.wall, self.cpu = float(os.environ["PEERS_STARTED"]), 0.0

    def step(self, tokens: int, trained: int, check: Callable[[], tuple[float, int]]) -> None:
        """A step on `tokens` candidate tokens (all ranks) is done, `trained` of which were trained.

        `check` gives the loss of the first step's samples, nats per predicted token, and of how
        many it is the mean.
        """
        self.steps += 1
        self.tokens["candidate_tokens"] += tokens
        self.tokens["trained_tokens"] += trained
        if self.turn and self.steps < self.per_turn:
            return
        _synchronize()
        report: dict[str, Any] = {
            "wall_s": time.time() - self.wall,
            "cpu_s": time.process_time() - self.cpu,
            **self.tokens,
        }
        if self.turn == 0:
            report["loss"], report["predicted"] = check()
        report["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        file = self.folder / f"{self.name}.{self.turn}.{self.rank}"
        part = Path(f"{file}.part")
        part.write_text(json.dumps(report))
        part.rename(file)
        self.turn += 1
        go = self.folder / f"{self.name}.{self.turn}.go"
        while not go.exists():
            time.sleep(0.02)
        self.steps, self.tokens = 0, dict.fromkeys(self.tokens, 0)
        self.wall, self.cpu = time.time(), time.process_time()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_rows(job: dict[str, Any]) -> list[Row]:
    """Every sample of every step, one after the other: input_ids and labels."""
    with Path(job["rows"]).open() as file:
        return [json.loads(line) for line in file]


def load(job: dict[str, Any]) -> tuple[Any, Any]:
    """Model and tokenizer, as anybody would load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    return model, tokenizer


def bare(job: dict[str, Any], turns: Turns) -> None:
    """A loop written by hand: samples by length, `bare_batch` a forward; several ranks: ZeRO-3."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    kept = _zero_loading(job) if world > 1 else None  # transformers looks for a living object
    model, tokenizer = load(job)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **ADAM)
    engine: Any = _Plain(model.to(device), optimizer)
    if kept is not None:
        engine = _Zero(model, optimizer, job)
    rows, n = read_rows(job), job["candidates"]
    for start in range(0, len(rows), n):
        samples = rows[start : start + n]
        parts = list(batches(samples[turns.rank :: world], job["bare_batch"], tokenizer))
        predicted = sum(_predicted(row["labels"]) for row in samples)
        model.train()
        for i, part in enumerate(parts):
            engine.backward(on(engine.device, part), predicted, last=i == len(parts) - 1)
        engine.step()
        tokens = sum(len(row["input_ids"]) for row in samples)
        turns.step(
            tokens, tokens, lambda: _mean_loss(engine.model, batches(rows[:n], 1, tokenizer))
        )


class _Plain:
    """One process."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer, self.device = model, optimizer, model.device

    def backward(self, batch: dict[str, Any], predicted: int, last: bool) -> None:
        self.model(**batch, num_items_in_batch=predicted).loss.backward()

    def step(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Zero:
    """Ranks under ZeRO-3, which clips by itself."""

    def __init__(self, model: Any, optimizer: Any, job: dict[str, Any]) -> None:
        import deepspeed

        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=job["deepspeed"]
        )
        self.device, self.world = self.model.device, int(os.environ["WORLD_SIZE"])

    def backward(self, batch: dict[str, Any], predicted: int, last: bool) -> None:
        loss = self.model(**batch, num_items_in_batch=predicted).loss
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss * self.world, scale_wrt_gas=False)

    def step(self) -> None:
        self.model.step()


def _zero_loading(job: dict[str, Any]) -> Any:
    """Join the ranks; while the object lives, transformers partitions what it loads."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed(verbose=False)
    return HfDeepSpeedConfig(job["deepspeed"])


def batches(rows: Sequence[Row], size: int, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """`size` samples of like length at a time, padded to the longest of them."""
    import torch

    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        longest = max(len(row["input_ids"]) for row in part)

        def filled(name: str, value: int, part: Any = part, longest: int = longest) -> Any:
            return torch.tensor([r[name] + [value] * (longest - len(r[name])) for r in part])

        lengths = torch.tensor([len(row["input_ids"]) for row in part])
        yield {
            "input_ids": filled("input_ids", tokenizer.pad_token_id),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
            "labels": filled("labels", -100),
        }


def on(device: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch there; what is no tensor stays."""
    return {name: x.to(device) if hasattr(x, "to") else x for name, x in batch.items()}


def _predicted(labels: Sequence[int]) -> int:
    return sum(label != -100 for label in labels[1:])


def _mean_loss(
    model: Any, parts: Iterator[dict[str, Any]], loss_of: Any = None
) -> tuple[float, int]:
    """Over all predicted tokens of `parts`, all of which every rank sees; and how many they are."""
    import torch

    losses, counts = [], []
    with torch.no_grad():
        for part in parts:
            part = on(model.device, part)
            loss = loss_of(model, part) if loss_of else model(**part).loss
            counts.append(int((part["labels"][:, 1:] != -100).sum()))
            losses.append(float(loss) * counts[-1])
    return math.fsum(losses) / sum(counts), sum(counts)


def trainer(job: dict[str, Any], turns: Turns) -> None:
    """transformers' Trainer, padding each batch to its longest sample."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    given = TrainingArguments(**_arguments(job, job["hf_batch"]))
    model, tokenizer = load(job)
    rows = read_rows(job)
    collate = DataCollatorForSeq2Seq(tokenizer)
    check = rows[: job["candidates"]]
    made = Trainer(model, given, collate, train_dataset=rows, eval_dataset=check)
    _run(made, turns)


def trl_packed(job: dict[str, Any], turns: Turns) -> None:
    """TRL's SFTTrainer, whole samples packed into rows before training."""
    _sft(job, turns, 1, max_length=job["row_tokens"], packing=True)


def trl_free(job: dict[str, Any], turns: Turns) -> None:
    """TRL's SFTTrainer, each batch as one row without padding."""
    _sft(job, turns, job["hf_batch"], max_length=None, padding_free=True)


def _sft(job: dict[str, Any], turns: Turns, size: int, **named: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    given = SFTConfig(**_arguments(job, size), **named)
    model, tokenizer = load(job)
    rows = read_rows(job)
    made = SFTTrainer(
        model,
        given,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: job["candidates"]]),
        processing_class=tokenizer,
    )
    _run(made, turns)


def _arguments(job: dict[str, Any], size: int) -> dict[str, Any]:
    """What the run of slap_ds says, in a Trainer's words; `size` samples or packed rows a batch."""
    import torch
    from transformers import TrainingArguments

    known = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    world = int(os.environ.get("WORLD_SIZE", "1"))
    each = job["rows_a_step"] if size == 1 else job["candidates"]
    named: dict[str, Any] = {}
    if world > 1:
        import deepspeed

        deepspeed.init_distributed(verbose=False)
        own = dict.fromkeys(
            (
                "train_micro_batch_size_per_gpu",
                "gradient_accumulation_steps",
                "train_batch_size",
                "gradient_clipping",
            ),
            "auto",
        )
        zero = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        named = {"ddp_backend": "gloo", "deepspeed": {**job["deepspeed"], **own, **zero}}
    return {
        "output_dir": job["output"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": max(1, round(each / world / size)),
        "train_sampling_strategy": "sequential",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta1": ADAM["betas"][0],
        "adam_beta2": ADAM["betas"][1],
        "adam_epsilon": ADAM["eps"],
        "activation_checkpointing" if known else "gradient_checkpointing": True,
        "bf16": False,  # the weights are of the wanted type
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **named,
    }


def _run(made: Any, turns: Turns) -> None:
    """Train, telling `turns` of every step."""
    from torch.utils.data import DataLoader
    from transformers import TrainerCallback

    args = made.args
    a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    sizes = [len(row["input_ids"]) for row in made.train_dataset]

    def check() -> tuple[float, int]:
        collate = made.data_collator
        parts = DataLoader(made.eval_dataset, args.per_device_train_batch_size, collate_fn=collate)
        return _mean_loss(made.model_wrapped, iter(parts), made.compute_loss)

    class Told(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            end = state.global_step * a_step
            tokens = sum(sizes[i % len(sizes)] for i in range(end - a_step, end))
            turns.step(tokens, tokens, check)

    made.add_callback(Told())
    made.train()


def slap(job: dict[str, Any], turns: Turns, selection: dict[str, Any]) -> None:
    """The steps of `slap-ds train`, and what it writes of them."""
    import numpy as np

    from slap_ds.config.schema import Config
    from slap_ds.data.batch import CandidateBatch
    from slap_ds.scoring import ScoreRequest
    from slap_ds.train.journal import Journal
    from slap_ds.train.record import train_step
    from slap_ds.train.run import prepare

    run_dir = f"{job['output']}/{turns.name}-{turns.wall}"
    config = Config.model_validate({**job["run"], "run_dir": run_dir, "selection": selection})
    run = prepare(config)
    with Journal(run) as journal:
        for step in run.steps_left():
            batch = CandidateBatch(run.inputs.train, next(run.stream))
            record = train_step(run, step, batch)
            journal.step(record)
            run.step_done(step)
            metrics = record.metrics

            def check(batch: Any = batch, metrics: Any = metrics) -> tuple[float, int]:
                count = int(batch.response_tokens.sum())
                if metrics["picked"] == len(batch):
                    return metrics["loss"], count
                rows = batch.rows(np.arange(len(batch)), config.batch.micro_batch_tokens)
                loss = run.engine.score(rows, ScoreRequest()).loss
                return float(loss.double().sum()) / count, count

            turns.step(metrics["candidate_tokens"], metrics["trained_tokens"], check)


CONTESTANTS: dict[str, Callable[..., None]] = {
    "bare": bare,
    "trainer": trainer,
    "trl-packed": trl_packed,
    "trl-free": trl_free,
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    turns = Turns(name, folder, job)
    if name in CONTESTANTS:
        CONTESTANTS[name](job, turns)
    else:
        slap(job, turns, job["selections"][name])


if __name__ == "__main__":
    main()
