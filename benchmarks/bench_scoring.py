"""What scoring costs: time and peak memory of every curvature source and sketch.

    python benchmarks/bench_scoring.py --json benchmarks/results/scoring.json
    python benchmarks/bench_scoring.py --shape 8b --layers 4 --device cuda

The passes are the engine's own, rows of packed samples through `PackedCausalLM`, without the
optimizer and without other ranks. All cases run in turn in every round, each beside a plain forward
with loss of its own, before or after it in turn; the median of these ratios is reported. Ratios
are of wall seconds on CUDA and of processor seconds on the CPU, where other work on the machine
would count as ours (OMP_NUM_THREADS=1 makes the two the same on a quiet one); both are recorded.
With fewer layers than the real model has, the ratio is also given as if all of them ran.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_bytes

from slap_ds.bench.environment import describe
from slap_ds.config.schema import ScoringConfig
from slap_ds.data.packing import Candidate, PackedRow, pack
from slap_ds.models.causal import (
    PackedCausalLM,
    block_flops,
    count_parameters,
    enable_checkpointing,
)
from slap_ds.models.load import load_config, load_model
from slap_ds.scoring import ScoreRequest, ScoringPlan, Tail
from slap_ds.scoring.head import head_bytes, head_cost
from slap_ds.scoring.plan import block_passes

# Real LLaMA shapes: (width, feed-forward, heads, key and value heads, layers, vocabulary, tied).
SHAPES = {
    "tiny": (64, 176, 4, 2, 2, 32003, False),
    "1b": (2048, 5632, 32, 4, 22, 32000, False),  # TinyLlama 1.1B
    "1b-128k": (2048, 8192, 32, 8, 16, 128256, True),  # Llama 3.2 1B
    "7b": (4096, 11008, 32, 32, 32, 32000, False),  # Llama 2 7B
    "8b": (4096, 14336, 32, 8, 32, 128256, False),  # Llama 3 8B
}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "head_input + exact_head, all tokens": {"curvature_tokens": 1.0},
    "head_input": {"curvature": "none"},
    "head_input + hutchinson_head 16": {"curvature": "hutchinson_head"},
    "head_input + hutchinson_blocks 1, 2": {"curvature": "hutchinson_blocks", "probes": 2},
    "head_kron 16x16": {"sketch": "head_kron", "curvature": "none"},
    "hvp 4": {"sketch": "hvp", "curvature": "none", "probes": 4},
}
LOSS, STEP = "loss", "training step"
SKETCHED = frozenset({"loss", "sketch"})


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    model, model_config, layers = build(options, device)
    rows = make_rows(options, model_config.vocab_size)
    rows = [row.to(device) for row in rows]
    chosen = options.cases or list(CASES)
    plans = {name: ScoringPlan(ScoringConfig(**CASES[name]), SKETCHED, 1) for name in chosen}
    request = {
        LOSS: ScoreRequest(),
        **{name: plan.request(1, None) for name, plan in plans.items()},
    }
    work: dict[str, Callable[[], Any]] = {
        name: lambda order=order: score(model, rows, order) for name, order in request.items()
    }
    if options.train:
        work[STEP] = lambda: train(model, rows)

    memory = {name: peak_bytes(run, device, model.parameters()) for name, run in work.items()}
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(options.rounds):
        # Another order in every round: no case always follows the same one.
        names = sorted(work, key=lambda name, n=number: shuffled(name, n))
        rounds.append({name: pair(work[name], work[LOSS], device, number) for name in names})

    shape = describe_shape(model_config, model, rows, layers)
    clock = "wall_s" if device.type == "cuda" else "cpu_s"
    cases = [case(name, rounds, clock, memory) for name in work]
    for record in cases:
        if record["case"] in request:
            record |= analytic(request[record["case"]], record, shape, options.chunk_tokens)
        print(line(record))
    default = next((c["over_loss_forward"] for c in cases if c["case"] == "default"), None)
    result = {
        "default_over_loss_forward": default,
        "clock": clock,
        "shape": shape,
        "settings": {k: v for k, v in vars(options).items() if k != "json"},
        "environment": describe(device),
        "command": "python benchmarks/bench_scoring.py " + " ".join(sys.argv[1:]),
        "cases": cases,
    }
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer blocks than the real model has")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 512, help="of all rows")
    parser.add_argument("--row-tokens", type=int, default=4096 if cuda else 512)
    parser.add_argument("--sample-tokens", type=int, default=256 if cuda else 128)
    parser.add_argument("--response-share", type=float, default=1.0)
    parser.add_argument("--chunk-tokens", type=int, default=ScoringConfig().chunk_on("cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="default: all")
    parser.add_argument("--train", action="store_true", help="time a forward and backward as well")
    return parser.parse_args()


def build(options: argparse.Namespace, device: torch.device) -> tuple[PackedCausalLM, Any, int]:
    """The wrapped model, its config, and how many layers the real model has."""
    width, inner, heads, kv, layers, vocab, tied = SHAPES[options.shape]
    fields = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": options.layers or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
    }
    config = load_config(None, fields)
    with torch.device(device):
        lm = load_model(None, config, dtype=options.dtype, attention="packed", seed=0)
    if options.train:
        enable_checkpointing(lm)
    return PackedCausalLM(lm, options.chunk_tokens), config, layers


def make_rows(options: argparse.Namespace, vocab: int) -> list[PackedRow]:
    """Random samples: what is in them costs nothing and changes nothing."""
    rng = np.random.default_rng(0)
    length = options.sample_tokens
    first = round(length * (1 - options.response_share))
    mask = np.arange(length) >= first
    count = options.tokens // length
    samples = [Candidate(i, rng.integers(0, vocab, length), mask) for i in range(count)]
    return pack(samples, options.row_tokens)


def score(model: PackedCausalLM, rows: list[PackedRow], request: ScoreRequest) -> None:
    """What `Engine.score` does with its rows."""
    model.eval()
    with torch.no_grad():
        if request.blocks:
            model.tail = Tail(model.lm, request.blocks)
        for row in rows:
            model(row, "score", request)
    model.tail = None


def train(model: PackedCausalLM, rows: list[PackedRow]) -> None:
    """Forward, recompute and backward of all rows: a full step without its optimizer."""
    model.train()
    for row in rows:
        model(row, "train").backward()
    model.zero_grad(set_to_none=True)


def timed(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Seconds on the wall and on the processor."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def pair(
    work: Callable[[], Any], loss: Callable[[], Any], device: torch.device, number: int
) -> dict[str, float]:
    """`work` timed, and beside it the plain forward, which goes first in every other round."""
    if number % 2:
        found, beside = timed(work, device), timed(loss, device)
    else:
        beside, found = timed(loss, device), timed(work, device)
    return {**found, **{f"loss_{clock}": seconds for clock, seconds in beside.items()}}


def shuffled(name: str, number: int) -> int:
    return int(np.random.SeedSequence([number, *name.encode()]).generate_state(1)[0])


def describe_shape(
    model_config: Any, model: PackedCausalLM, rows: list[PackedRow], layers: int
) -> dict[str, Any]:
    parameters = count_parameters(model.lm)
    lengths = [n for row in rows for n in row.lengths]
    tokens = sum(int((row.targets >= 0).sum()) for row in rows)
    return {
        "E": model_config.hidden_size,
        "V": model_config.vocab_size,
        "layers": model_config.num_hidden_layers,
        "layers_of_the_real_model": layers,
        "parameters": parameters,
        "tokens": sum(lengths),
        "response_tokens": tokens,
        "samples": len(lengths),
        "rows": len(rows),
        "block_flops": block_flops(model_config, parameters, lengths),
    }


def case(
    name: str, rounds: list[dict[str, dict[str, float]]], clock: str, memory: dict[str, int]
) -> dict[str, Any]:
    """What was measured."""

    def over(key: str) -> list[float]:
        return [round(r[name][key] / r[name][f"loss_{key}"], 4) for r in rounds]

    ratios = over(clock)
    steps = [r[name][clock] / r[STEP][clock] for r in rounds if STEP in r]
    return {
        "case": name,
        "over_loss_forward": statistics.median(ratios),
        "wall_over_loss_forward": statistics.median(over("wall_s")),
        "over_training_step": statistics.median(steps) if steps else None,
        "wall_s": statistics.median(r[name]["wall_s"] for r in rounds),
        "cpu_s": statistics.median(r[name]["cpu_s"] for r in rounds),
        "ratios": ratios,
        "peak_bytes": memory[name],
        "extra_peak_bytes": memory[name] - memory[LOSS],
    }


def analytic(
    request: ScoreRequest, record: dict[str, Any], shape: dict[str, Any], chunk_tokens: int
) -> dict[str, Any]:
    """The counted FLOPs and bytes, and the ratio with all of the real model's layers."""
    t, n, e, v = (shape[k] for k in ("response_tokens", "samples", "E", "V"))
    blocks, layers = shape["block_flops"], shape["layers"]
    plain = blocks + head_cost(ScoreRequest(), t, n, e, v, chunk_tokens)
    flops = blocks * (1 + block_passes(request, layers))
    flops += head_cost(request, t, n, e, v, chunk_tokens)
    out = {
        "flops": flops,
        "flops_over_loss_forward": flops / plain,
        "head_bytes_bound": head_bytes(request, -(-n // shape["rows"]), e, v, chunk_tokens),
    }
    missing = shape["layers_of_the_real_model"] / layers - 1
    if missing:
        # What a case costs more stays; what it is compared with grows by the missing blocks.
        out["over_loss_forward_all_layers"] = 1 + (record["over_loss_forward"] - 1) / (
            1 + missing * blocks / plain
        )
    return out


def line(record: dict[str, Any]) -> str:
    parts = [f"{record['case']:36s}{record['wall_s']:8.3f} s (cpu {record['cpu_s']:.3f} s)"]
    parts.append(f"{record['over_loss_forward']:.3f} of a loss forward")
    if "flops" in record:
        parts.append(f"FLOPs {record['flops_over_loss_forward']:.3f}")
    if "over_loss_forward_all_layers" in record:
        parts.append(f"with all layers {record['over_loss_forward_all_layers']:.3f}")
    if record["over_training_step"] is not None:
        parts.append(f"{100 * record['over_training_step']:.1f} % of a step")
    parts.append(f"peak {record['peak_bytes'] / 2**20:.0f} MiB")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
