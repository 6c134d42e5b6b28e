"""Time of a training step: full, score-then-train and reuse, at several pruning rates.

    deepspeed --num_gpus 2 benchmarks/bench_step.py --json benchmarks/results/step.json

All cases run in one process group on one engine, in turn, on the same candidate batches; a case's
ratio is taken within each round, and the median over rounds is reported. The steps are the
trainer's own, of the method `slap`. With --boundaries device host reuse is run both ways.

    deepspeed --num_gpus 2 benchmarks/bench_step.py --lengths real

runs on samples as long as they are: those of SLAP_DATA_DIR, or the demo data. Beside `slap`, which
prunes samples, it measures `default`, whose budget is one of tokens and which scores nothing, and
`by-loss`, the same budget with chances by the loss: scored, with reuse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from slap_ds.bench.environment import describe
from slap_ds.config.schema import Config
from slap_ds.data.batch import CandidateBatch
from slap_ds.engine import stop_ranks
from slap_ds.models.causal import block_flops, head_flops
from slap_ds.scoring import ScoreRequest
from slap_ds.train.inputs import make_parts
from slap_ds.train.record import train_step
from slap_ds.train.run import Run, prepare

PHASES = ("score", "gather", "select", "scatter", "forward", "backward", "optimizer")
ROOT = Path(__file__).parents[1]
# Run on real lengths, beside `slap`: settings of `selection`.
BY_TOKENS: dict[str, dict[str, Any]] = {
    "default": {"method": "sampled"},
    "by-loss": {"method": "sampled", "sampled": {"by": "loss"}},
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    config = base_config(options)
    base = prepare(config)
    cases = {"full": case(base, "reuse", 0.0)}
    for pruning in options.pruning:
        cases[f"separate {pruning:g}"] = case(base, "separate", pruning)
        for boundaries in options.boundaries:
            named = "reuse" if boundaries == options.boundaries[0] else f"reuse-{boundaries}"
            cases[f"{named} {pruning:g}"] = case(base, "reuse", pruning, boundaries)
        for name, selection in BY_TOKENS.items() if options.lengths == "real" else ():
            cases[f"{name} {pruning:g}"] = case(base, "reuse", pruning, **selection)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for number in range(options.warmup + options.rounds):
        batch = CandidateBatch(base.inputs.train, next(base.stream))
        for name, run in cases.items():
            base.comm.barrier(number, name)
            cpu = time.process_time()
            record = one_step(run, number, batch)
            # Wall time is what counts; CPU time tells it apart from a busy machine's.
            (record["cpu_s"],) = base.comm.sum(number, "cpu seconds", [time.process_time() - cpu])
            if number >= options.warmup:
                rounds[name].append(record)
            if base.comm.rank == 0:
                print(f"round {number} {name}: {record['step_s']:.2f} s", flush=True)
    gathered = count_gathers(base, cases)
    profiled = profile_flops(base)
    if base.comm.rank == 0:
        result = summary(rounds, base, options)
        result["gathers"], result["forward_flops"] = gathered, profiled
        show(result)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    stop_ranks(base.comm)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--lengths", choices=["equal", "real"], default="equal")
    parser.add_argument("--row-tokens", type=int, help="default: two of the longest samples")
    parser.add_argument("--max-tokens", type=int, help="default: 256, of real lengths 512")
    parser.add_argument("--pruning", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6])
    parser.add_argument("--boundaries", nargs="+", choices=["device", "host"], default=["device"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--data",
        nargs="+",
        help="training files (default: synthetic conversations, all of --max-tokens tokens, so "
        "that pruning samples and pruning tokens are the same)",
    )
    parser.add_argument("--tokenizer", default="builtin:demo")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--deepspeed", help="DeepSpeed JSON (default: the package's ZeRO-3)")
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    real = options.lengths == "real"
    options.max_tokens = options.max_tokens or (512 if real else 256)
    options.row_tokens = options.row_tokens or 2 * options.max_tokens
    if real and options.data is None:
        folder = os.environ.get("SLAP_DATA_DIR")
        found = sorted(map(str, Path(folder).glob("*/*.train.jsonl*"))) if folder else []
        options.data = found or ["builtin:demo/train"]
    return options


def base_config(options: argparse.Namespace) -> Config:
    heads = max(1, options.hidden // 64)
    return Config.model_validate(
        {
            "run_dir": tempfile.mkdtemp(prefix="slap-bench-"),
            "steps": options.rounds + options.warmup + 2,
            "model": {
                "config": {
                    "model_type": "llama",
                    "vocab_size": options.vocab,
                    "hidden_size": options.hidden,
                    "intermediate_size": options.intermediate,
                    "num_hidden_layers": options.layers,
                    "num_attention_heads": heads,
                    "num_key_value_heads": heads,
                    "max_position_embeddings": options.max_tokens,
                    "pad_token_id": 0,
                    "bos_token_id": 0,
                    "eos_token_id": 2,
                },
                "tokenizer": options.tokenizer,
                "dtype": options.dtype,
            },
            "data": {
                "train": options.data or [synthetic(options)],
                "template": options.template,
                "max_tokens": options.max_tokens,
            },
            "batch": {
                "candidates": options.candidates,
                "micro_batch_tokens": options.row_tokens,
            },
            "engine": {"deepspeed": options.deepspeed},
            "selection": {"method": "slap"},
            "step": {"boundaries": options.boundaries[0]},
            # Steps of this benchmark are not meant to learn: weights stay near their start.
            "optimizer": {"lr": 1e-6},
        }
    )


def synthetic(options: argparse.Namespace) -> str:
    """Conversations of random words, longer than --max-tokens, for every rank the same."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(40)]
    path = Path(tempfile.gettempdir()) / f"slap-bench-{options.max_tokens}.jsonl"
    lines = []
    for _ in range(4 * options.candidates):
        text = " ".join(rng.choices(words, k=2 * options.max_tokens))
        question = " ".join(rng.choices(words, k=16))
        lines.append(json.dumps({"prompt": question, "completion": text}) + "\n")
    if not path.is_file() or path.read_text() != "".join(lines):
        path.write_text("".join(lines))
    return str(path)


def case(
    base: Run, forward: str, pruning: float, boundaries: str = "device", **selection: Any
) -> Run:
    """The same engine and data under another selection; `selection`: if not the base's method."""
    tree = base.config.model_dump()
    tree["step"] |= {"forward": forward, "boundaries": boundaries}
    tree["selection"] |= {"keep": 1 - pruning, **selection}
    config = Config.model_validate(tree)
    _, scorer, selector = make_parts(config, base.inputs.train)
    return Run(config, base.comm, base.inputs, base.engine, base.stream, scorer, selector)


def one_step(run: Run, number: int, batch: CandidateBatch) -> dict[str, Any]:
    """A step's metrics, and on a GPU `syncs`: how often the host waited for it inside."""
    config, inputs = run.config, run.engine.model.block_inputs
    assert inputs is not None
    inputs.on_host = config.step.boundaries == "host"
    with syncs(run.engine.device) as seen:
        record = train_step(run, number, batch).metrics
    scores = config.selection.keep < 1 and bool(run.selector.needs)
    assert record["forward"] == (config.step.forward if scores else "train"), record["forward"]
    return record | {"syncs": len(seen)}


@contextlib.contextmanager
def syncs(device: torch.device) -> Iterator[list[Any]]:
    """Inside, a list of the operations that made the host wait for a GPU, as torch warns of them;
    not of `synchronize`, and not of waits outside torch."""
    if device.type != "cuda":
        yield []
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", "called a synchronizing CUDA operation")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")


def count_gathers(base: Run, cases: dict[str, Run]) -> dict[str, dict[str, float]]:
    """ZeRO-3's all-gathers in one step of each case, in models and calls, by DeepSpeed's logger."""
    from deepspeed import comm as ds_comm

    log = ds_comm.comm.comms_logger
    ds_comm.configure(enabled=True, prof_all=True, verbose=False)
    batch = CandidateBatch(base.inputs.train, next(base.stream))
    size = base.engine.parameters * (2 if base.config.model.dtype == "bfloat16" else 4)
    out = {}
    for name, run in cases.items():
        log.comms_dict.clear()
        train_step(run, 0, batch)
        entries = [
            (bytes_, entry[0])
            for operation, by_size in log.comms_dict.items()
            if "all_gather" in operation or "allgather" in operation
            for bytes_, entry in by_size.items()
        ]
        out[name] = {
            "models": sum(b * n for b, n in entries) / size,
            "calls": sum(n for _, n in entries),
        }
    ds_comm.configure(enabled=False)
    return out


def profile_flops(base: Run) -> dict[str, float]:
    """One row's scoring forward: our formula and DeepSpeed's profiler (which counts what runs)."""
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    batch = CandidateBatch(base.inputs.train, next(base.stream))
    row = batch.rows([0], base.config.batch.micro_batch_tokens)[0]
    profiler = FlopsProfiler(base.engine.model)
    profiler.start_profile()
    base.engine.score([row], ScoreRequest())
    counted = float(profiler.get_total_flops())
    profiler.end_profile()
    config, parameters = base.inputs.model_config, base.engine.parameters
    ours = block_flops(config, parameters, row.lengths)
    ours += head_flops(config, int(batch.response_tokens[0]))
    return {"formula": ours, "deepspeed_profiler": counted}


def summary(
    rounds: dict[str, list[dict[str, Any]]], base: Run, options: argparse.Namespace
) -> dict[str, Any]:
    ratios: dict[str, dict[str, float]] = {}
    cases = []
    for name, records in rounds.items():

        def median(key: str, records: list[dict[str, Any]] = records) -> float:
            return statistics.median(float(r.get(key, 0.0)) for r in records)

        paired = [
            r["step_s"] / full["step_s"] for r, full in zip(records, rounds["full"], strict=True)
        ]
        step = median("step_s")
        entry: dict[str, Any] = {
            "case": name,
            "ratio_to_full": statistics.median(paired),
            "cpu_ratio_to_full": statistics.median(
                r["cpu_s"] / full["cpu_s"] for r, full in zip(records, rounds["full"], strict=True)
            ),
            "step_s": step,
            "tokens_per_s": median("candidate_tokens") / step,
            "trained_tokens_per_s": median("trained_tokens") / step,
            "flops": median("flops"),
            "flops_ratio_to_full": median("flops")
            / statistics.median(float(r["flops"]) for r in rounds["full"]),
            "share": {p: median(f"{p}_s") / step for p in PHASES},
            "selection_share": statistics.median(r["selection_s"] / r["step_s"] for r in records),
            "busiest_rank_over_mean": median("busiest_rank_over_mean"),
            "trained_token_share": median("trained_tokens") / median("candidate_tokens"),
            "boundary_bytes": median("boundary_bytes"),
            "bytes_sent": median("bytes_sent"),
            "peak_gib": median("peak_gib"),
            "syncs": median("syncs"),
        }
        cases.append(entry)
        if name != "full":
            forward, pruning = name.split()
            ratios.setdefault(forward, {})[pruning] = entry["ratio_to_full"]
    pruned = [c["selection_share"] for c in cases if c["case"].startswith("reuse")]
    return {
        "ratio_to_full": ratios,
        "selection_share": max(pruned),
        "cases": cases,
        "model": {
            k: getattr(options, k) for k in ("hidden", "intermediate", "layers", "vocab", "dtype")
        },
        "batch": {
            "lengths": options.lengths,
            "candidates": options.candidates,
            "row_tokens": options.row_tokens,
            "max_tokens": options.max_tokens,
        },
        "rounds": options.rounds,
        "parameters": base.engine.parameters,
        "ranks": base.comm.world,
        "environment": describe(base.engine.device),
    }


def show(result: dict[str, Any]) -> None:
    names = ("case", "of full", "CPU", "FLOPs", "tokens", "step s", "select %", "busiest")
    names += ("gathers",)
    print("\n" + " ".join(f"{name:>13}" for name in names))
    for c in result["cases"]:
        values = (
            c["ratio_to_full"],
            c["cpu_ratio_to_full"],
            c["flops_ratio_to_full"],
            c["trained_token_share"],
            c["step_s"],
            100 * c["selection_share"],
            c["busiest_rank_over_mean"],
            result["gathers"][c["case"]]["models"],
        )
        print(f"{c['case']:>13} " + " ".join(f"{value:13.3f}" for value in values))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
