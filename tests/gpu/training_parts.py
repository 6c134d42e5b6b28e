"""The parts of tests/gpu/check.py that train: attention, parity, the step, its peers, a
real model."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slap_ds.config.schema import Config
from slap_ds.jsonl import read_lines
from slap_ds.models.attention import packed_attention
from slap_ds.train.record import train_step
from slap_ds.train.run import Run, prepare
from tests.gpu.check import Skip
from tests.recipes import tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]


def one_step(folder: Path, dtype: str) -> dict[str, Any]:
    """The metrics of one ZeRO-3 step of a tiny model with forward reuse."""
    config = tiny_config(
        tiny_model(folder / "model"),
        folder / "run",
        steps=1,
        model={"dtype": dtype, "gradient_checkpointing": True},
        step={"forward": "reuse"},
    )
    metrics = train_step(prepare(config), 0).metrics
    assert math.isfinite(metrics["loss"]), metrics
    return metrics


def attention(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """Packed attention and its backward in bfloat16, against SDPA sample by sample in float32."""
    facts = {}
    lengths = (1, 5, 130, 64) if tiny else (1, 5, 2000, 513, 1029)
    cases = {"plain": (8, 8, 64, None), "gqa": (8, 2, 128, None), "window": (8, 8, 64, 100)}
    cases["odd width"] = (4, 4, 60, None)
    for name, (heads, shared, width, window) in cases.items():
        generator = torch.Generator().manual_seed(0)
        wide = [
            torch.randn(1, h, sum(lengths), width, generator=generator).to(device)
            for h in (heads, shared, shared)
        ]
        upstream = torch.randn(1, sum(lengths), heads, width, generator=generator).to(device)
        expected = attend(wide, upstream, lengths, window)
        found = attend([x.bfloat16() for x in wide], upstream.bfloat16(), lengths, window)
        worst = max(
            float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)
        )
        facts[name.replace(" ", "_")] = worst
        assert worst < 1e-2, f"{name}: relative error {worst:.3g}"
    return facts


def attend(
    qkv: list[Tensor], upstream: Tensor, lengths: tuple[int, ...], window: int | None
) -> list[Tensor]:
    """The output and the three gradients."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(qkv[0].device, torch.int32)
    result, _ = packed_attention(
        torch.nn.Identity(),
        *leaves,
        None,
        sample_lengths=lengths,
        cu_seq_lens_q=ends,
        sliding_window=window,
    )
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


def parity(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """A step's gradients with reuse against those of score-then-train, beside what two runs of the
    latter differ by; from saved weights, since ZeRO-3 draws fresh ones from the device."""
    sizes: dict[str, Any] = {}
    if not tiny:
        sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
        sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    model = tiny_model(out / "parity-model", **sizes)
    half = "float32" if tiny else "bfloat16"
    ways: dict[str, dict[str, Any]] = {
        "plain float32": {"engine": {"kind": "torch"}},
        f"ZeRO-3 {half} device": {"model": {"dtype": half}},
    }
    if not tiny:
        ways["ZeRO-3 bfloat16 host"] = {"model": {"dtype": half}, "step": {"boundaries": "host"}}
        ways["ZeRO-3 bfloat16 LoRA"] = {"model": {"dtype": half, "lora": {"r": 8}}}
    facts: dict[str, Any] = {}
    for name, way in ways.items():
        runs = {}
        for number, forward in enumerate(("separate", "separate", "reuse")):
            folder = out / f"parity-{len(facts)}-{number}"
            changes = {**way, "step": {**way.get("step", {}), "forward": forward}}
            changes["model"] = {**way.get("model", {}), "gradient_checkpointing": True}
            config = tiny_config(model, folder, steps=2, **changes)
            runs[f"{forward} {number}"] = step_with_gradients(prepare(config))
        first, again, reuse = runs.values()
        noise, apart = distance(first, again), distance(first, reuse)
        facts[name.replace(" ", "_")] = apart["gradients"]
        facts[f"{name}: details"] = {"separate again": noise, "reuse": apart}
        # Two runs of one way differ by the order of sums alone; reuse must not be farther off than
        # that by more than the size of such noise can vary.
        limit = max(4 * noise["gradients"], 1e-6 if "float32" in name else 2e-3)
        assert apart["gradients"] <= limit, (name, facts)
        assert apart["loss"] <= max(4 * noise["loss"], 1e-5 if "float32" in name else 1e-3), facts
    return facts


def step_with_gradients(run: Run) -> tuple[float, float, Tensor]:
    """Loss, gradient norm and all gradients (a vector on the CPU) of the run's first step."""
    seen: list[Tensor] = []
    engine: Any = run.engine
    take = engine._step

    def step() -> float:
        for parameter in engine.model.parameters():
            if not parameter.requires_grad:
                continue
            gradient = parameter.grad
            if hasattr(parameter, "ds_id"):
                from deepspeed.utils import safe_get_full_grad

                gradient = safe_get_full_grad(parameter)
            assert gradient is not None
            seen.append(gradient.detach().double().flatten().cpu())
        return float(take())

    engine._step = step
    metrics = train_step(run, 0).metrics
    return metrics["loss"], metrics["grad_norm"], torch.cat(seen)


def distance(a: tuple[float, float, Tensor], b: tuple[float, float, Tensor]) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity(a[2], b[2], 0)
    return {
        "loss": abs(a[0] - b[0]) / abs(a[0]),
        "norm": abs(a[1] - b[1]) / a[1],
        "gradients": float((a[2] - b[2]).norm() / a[2].norm()),
        "1 - cosine": float(1 - cosine),
    }


def step(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """benchmarks/bench_step.py: full, separate and reuse at 20 and 40 %; block inputs on device and
    on host."""
    real = ["--hidden", "2048", "--intermediate", "5504", "--layers", "24", "--vocab", "32000"]
    real += ["--candidates", "64", "--max-tokens", "1024", "--row-tokens", "8192"]
    real += ["--dtype", "bfloat16", "--rounds", "3", "--warmup", "2", "--pruning", "0.2", "0.4"]
    small = ["--hidden", "64", "--intermediate", "128", "--layers", "2", "--candidates", "6"]
    small += ["--max-tokens", "64", "--row-tokens", "256", "--rounds", "1", "--warmup", "0"]
    small += ["--pruning", "0.4"]
    file = out / "step.result"
    options = [*(small if tiny else real), "--boundaries", "device", "host", "--json", str(file)]
    runpy.run_path(str(ROOT / "benchmarks" / "bench_step.py"))["main"](options)
    result = json.loads(file.read_text())
    facts = {case["case"].replace(" ", "_"): case["ratio_to_full"] for case in result["cases"][1:]}
    full = result["cases"][0]
    facts |= {"full_tokens_s": full["tokens_per_s"], "syncs": result["cases"][-1]["syncs"]}
    return {"full_tflop_s": full["flops"] / full["step_s"] / 1e12, **facts, "result": result}


def peers(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """benchmarks/bench_peers.py: a loop by hand, Trainer, TRL where it is installed, and slap_ds, a
    process each on this device; ratios to the loop."""
    real = ["--hidden", "768", "--intermediate", "2048", "--layers", "12", "--dtype", "bfloat16"]
    real += ["--candidates", "64", "--row-tokens", "8192", "--steps", "2", "--rounds", "3"]
    file = out / "peers.result"
    options = ["--tiny", "--peers", "slap-40"] if tiny else [*real, "--starts", "1"]
    command = [sys.executable, "benchmarks/bench_peers.py", *options, "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True)
    result = json.loads(file.read_text())
    facts = {row["name"]: row["wall_s_of_bare"][0] for row in result["throughput"]}
    return {**facts, "result": result}


def smollm2(device: torch.device, tiny: bool, out: Path) -> dict[str, Any]:
    """SmolLM2-135M on the demo data: all data, a random part, SLAP, at equal cost; losses before
    and after. SLAP_SMOLLM2 names the folder (examples/convert_smollm2.py)."""
    if tiny:
        path, tokenizer, budget = tiny_model(out / "tiny-model"), "builtin:demo", 3
    else:
        found = os.environ.get("SLAP_SMOLLM2")
        if found is None:
            raise Skip("SLAP_SMOLLM2 names no folder with the model")
        path, tokenizer, budget = found, found, 20
    # Cost of a step: all data 1; a random part 0.6; SLAP with reuse at 40 % 0.7.
    ways = {
        "full": ("random", 1.0, 1.0),
        "random": ("random", 0.6, 0.6),
        "slap": ("slap", 0.6, 0.7),
    }
    facts: dict[str, Any] = {}
    for name, (method, keep, cost) in ways.items():
        config = tiny_config(
            path,
            out / f"run-{name}",
            steps=round(budget / cost),
            model={"tokenizer": tokenizer, "gradient_checkpointing": True}
            | ({} if tiny else {"dtype": "bfloat16"}),
            selection={"method": method, "keep": keep},
            optimizer={"lr": 1e-3 if tiny else 5e-5, "warmup_steps": 2},
        )
        before, after, peak = trained(config)
        facts |= {f"{name}_before": before, f"{name}_after": after}
        if peak is not None:
            facts[f"{name}_peak_gib"] = peak
        assert after < before, f"{name}: the evaluation loss rose from {before} to {after}"
    return facts


def trained(config: Config) -> tuple[float, float, float | None]:
    """Train; the evaluation loss before and after, and the peak of memory."""
    from slap_ds.train.loop import train

    train(prepare(config))
    records = read_lines(Path(config.run_dir) / "metrics.jsonl")
    losses = [r["eval_loss"] for r in records if r["event"] == "eval"]
    return (
        losses[0],
        losses[-1],
        max((r["peak_gib"] for r in records if "peak_gib" in r), default=None),
    )
