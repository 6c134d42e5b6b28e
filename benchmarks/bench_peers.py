"""slap_ds beside what users would take instead: cost per token, start-up, tokenising, memory.

    python benchmarks/bench_peers.py --json benchmarks/results/peers.json --into docs/performance.md
    python benchmarks/bench_peers.py --ranks 2      ZeRO-3, the others by accelerate's DeepSpeed
    python benchmarks/bench_peers.py --tiny         seconds, as the tests do

A loop written by hand, transformers' Trainer with padding, TRL's SFTTrainer packed and without
padding (where trl is installed), slap_ds on all data and with its default selection: the same
weights, samples, tokenizer, AdamW, activation checkpointing. Each is a process of its own
(peers.py) and they take turns, so that a round holds one turn of each; ratios are taken within a
round. Before anything is printed all must have had the same loss on the same samples.

A token counts once, padding does not count. Where samples are left out the unit is a candidate
token: what it costs to pass a data set by. CPU seconds are user and system, all ranks and threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from peer_tables import TITLES, put, tables

from slap_ds.bench.environment import describe
from slap_ds.config.deepspeed import resolve_deepspeed
from slap_ds.config.schema import Config
from slap_ds.models.load import load_config, load_model, load_tokenizer
from slap_ds.train.inputs import make_parts, read_inputs

HERE = Path(__file__).resolve().parent
SELECTIONS = {
    "slap-full": {"method": "full", "keep": 1.0},
    "slap-20": {"keep": 0.8},
    "slap-40": {"keep": 0.6},
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # nats; bfloat16 logits have 8 bits
TINY = {"hidden": 64, "intermediate": 128, "layers": 2, "candidates": 8, "max_tokens": 128}
TINY |= {"row_tokens": 512, "hf_batch": 4, "rounds": 1, "starts": 1, "limit_s": 100.0}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    names = [name for name in TITLES if name in {"bare", *options.peers}]
    if missing := [n for n in ("trl", "datasets") if importlib.util.find_spec(n) is None]:
        print(f"{' and '.join(missing)} not installed: TRL's rows are left out", flush=True)
        names = [name for name in names if not name.startswith("trl")]
    with tempfile.TemporaryDirectory(prefix="slap-peers-") as made:
        folder = Path(made)
        config = write_job(options, folder)
        starts, rounds = measure(names, options, folder)
        check_losses(starts[-1], TOLERANCE[options.dtype])
        rates = tokenising(config, folder)
    result = {
        "throughput": throughput(rounds, names),
        "start": start_up(starts, names),
        "tokenising": rates,
        "losses": {name: reports[0]["loss"] for name, reports in starts[-1].items()},
        "settings": {k: v for k, v in vars(options).items() if k not in ("json", "into")},
        "environment": describe(torch.device("cuda") if torch.cuda.is_available() else None),
        "command": "python benchmarks/bench_peers.py " + " ".join(sys.argv[1:]),
    }
    text = tables(result, options.ranks)
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.into:
        put(Path(options.into), text, options.ranks)
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=1, help="several: ZeRO-3")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--candidates", type=int, default=32, help="samples of a step")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest sample")
    parser.add_argument("--row-tokens", type=int, default=1024, help="of a packed row")
    parser.add_argument("--hf-batch", type=int, default=8, help="samples of a padded batch")
    parser.add_argument(
        "--peers", nargs="+", choices=list(TITLES), default=list(TITLES), help="bare always is one"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that count, after one")
    parser.add_argument("--starts", type=int, default=3, help="starts of each process")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="longest start or turn")
    parser.add_argument("--data", nargs="+", help="files (default: $SLAP_DATA_DIR, or demo data)")
    parser.add_argument("--tokenizer", default="builtin:demo")
    parser.add_argument("--tiny", action="store_true", help="sizes of seconds")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--into", help="a page with the places of the tables")
    known, _ = parser.parse_known_args(arguments)
    if known.tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    if options.candidates % (options.hf_batch * options.ranks):
        parser.error("--candidates must be whole batches of --hf-batch on every rank")
    if options.data is None:
        folder = os.environ.get("SLAP_DATA_DIR")
        found = sorted(map(str, Path(folder).glob("*/*.train.jsonl*"))) if folder else []
        options.data = found or ["builtin:demo/train"]
    return options


def write_job(options: argparse.Namespace, folder: Path) -> Config:
    """Into the folder: weights, tokens in their order, and what the contestants have to know.

    The tokens of slap_ds are in its cache afterwards: a start is a warm one.
    """
    tokenizer, batch = load_tokenizer(options.tokenizer), options.hf_batch
    model = str(folder / "model")
    heads = max(1, options.hidden // 64)
    fields = {
        "model_type": "llama",
        "vocab_size": -(-(max(tokenizer.get_vocab().values()) + 1) // 64) * 64,
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": options.row_tokens,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    made: Any = load_model(
        None, load_config(None, fields), dtype="float32", attention="sdpa", seed=0
    )
    made.save_pretrained(model)
    tokenizer.save_pretrained(model)
    turns = 1 + options.rounds
    run = {
        "run_dir": str(folder / "run"),
        "steps": 1 + turns * options.steps,
        "model": {"path": model, "dtype": options.dtype},
        "data": {
            "train": options.data,
            "max_tokens": options.max_tokens,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"candidates": options.candidates, "micro_batch_tokens": options.row_tokens},
        "engine": {"kind": "torch" if options.ranks == 1 else "deepspeed"},
        "optimizer": {"lr": 1e-9},
    }
    config = Config.model_validate(run)
    store = read_inputs(config).train
    stream, *_ = make_parts(config, store)
    tokens = 0
    with (folder / "rows.jsonl").open("w") as file:
        for index in (int(i) for indices in stream for i in indices):
            sample = store[index]
            ids, mask = sample.ids.tolist(), sample.mask.tolist()
            labels = [token if on else -100 for token, on in zip(ids, mask, strict=True)]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
            tokens += len(ids)
    job = {
        "model": model,
        "dtype": options.dtype,
        "rows": str(folder / "rows.jsonl"),
        "output": str(folder / "output"),
        "run": run,
        "steps": config.steps,
        "steps_a_turn": options.steps,
        "candidates": options.candidates,
        "row_tokens": options.row_tokens,
        "rows_a_step": max(1, round(tokens / len(stream) / options.row_tokens)),
        "hf_batch": batch,
        # One sample fills a CPU, and has nothing to pad; it does not fill a GPU, and under ZeRO-3
        # each forward gathers all weights.
        "bare_batch": 1 if options.ranks == 1 and not torch.cuda.is_available() else batch,
        "selections": SELECTIONS,
        "deepspeed": resolve_deepspeed(config, options.ranks, options.hidden),
    }
    (folder / "job.json").write_text(json.dumps(job))
    return config


class Peer:
    """One contestant's processes."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.folder, self.options = name, folder, options
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        command = [sys.executable]
        if options.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(options.ranks)]
        command += [str(HERE / "peers.py"), name, str(folder)]
        own = {"PEERS_STARTED": str(time.time()), "HF_HUB_OFFLINE": "1"}
        threads = str(max(1, len(os.sched_getaffinity(0)) // options.ranks))
        environ = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", **os.environ}
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env={**environ, **own, "PYTHONPATH": path},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def turn(self, number: int) -> list[dict[str, Any]]:
        """Let it have this turn (0: it has begun); the reports of its ranks."""
        (self.folder / f"{self.name}.{number}.go").touch()
        ranks = range(self.options.ranks)
        files = [self.folder / f"{self.name}.{number}.{rank}" for rank in ranks]
        end = time.monotonic() + self.options.limit_s
        while not all(file.exists() for file in files):
            time.sleep(0.05)
            if self.process.poll() is not None or time.monotonic() > end:
                if all(file.exists() for file in files):  # it has ended after its last turn
                    break
                told = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise SystemExit(f"{self.name} has ended, or taken too long:\n{told}")
        return [json.loads(file.read_text()) for file in files]

    def stop(self) -> None:
        """End its processes, whatever they do."""
        if self.process.poll() is None:
            # torchrun gives its ranks sessions of their own.
            started = psutil.Process(self.process.pid)
            for process in [started, *started.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


Reports = dict[str, list[dict[str, Any]]]  # by contestant, one a rank


def measure(
    names: list[str], options: argparse.Namespace, folder: Path
) -> tuple[list[Reports], list[Reports]]:
    """Every start and every round that counts; who comes first changes."""
    peers: dict[str, Peer] = {}
    starts: list[Reports] = []
    rounds: list[Reports] = []
    try:
        for number in range(options.starts):
            for peer in peers.values():
                peer.stop()
            starts.append({})
            for name in rotated(names, number):
                peers[name] = Peer(name, folder, options)
                starts[-1][name] = peers[name].turn(0)
                print(f"start {number} {name}: {starts[-1][name][0]['wall_s']:.2f} s", flush=True)
        for number in range(1, 2 + options.rounds):
            rounds.append({})
            for name in rotated(names, number):
                rounds[-1][name] = peers[name].turn(number)
                print(f"round {number} {name}: {rounds[-1][name][0]['wall_s']:.2f} s", flush=True)
    finally:
        for peer in peers.values():
            peer.stop()
    return starts, rounds[1:]


def rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def check_losses(reports: Reports, tolerance: float) -> None:
    """Refuse to compare what does not compute the same."""
    predicted = {name: ranks[0]["predicted"] for name, ranks in reports.items()}
    losses = {name: ranks[0]["loss"] for name, ranks in reports.items()}
    if len(set(predicted.values())) > 1:
        raise SystemExit(f"no table: the predicted tokens of one batch differ: {predicted}")
    if not max(losses.values()) - min(losses.values()) <= tolerance:
        raise SystemExit(f"no table: losses on one batch differ by over {tolerance}: {losses}")


def throughput(rounds: list[Reports], names: list[str]) -> list[dict[str, Any]]:
    """A row a contestant: cost per candidate token, and per round in relation to the bare loop."""

    def per_token(ranks: list[dict[str, Any]], clock: str) -> float:
        return spent(ranks, clock) / float(ranks[0]["candidate_tokens"])

    out = []
    for name in names:
        mine = [reports[name] for reports in rounds]
        row: dict[str, Any] = {"name": name, "peak_gib": max(r["peak_gib"] for r in mine[-1])}
        for clock in ("cpu_s", "wall_s"):
            costs = [per_token(ranks, clock) for ranks in mine]
            row[f"{clock}_per_1000_tokens"] = 1000 * statistics.median(costs)
            base = [per_token(reports["bare"], clock) for reports in rounds]
            row[f"{clock}_of_bare"] = spread([a / b for a, b in zip(costs, base, strict=True)])
        tokens = [sum(r[0][key] for r in mine) for key in ("trained_tokens", "candidate_tokens")]
        row["trained_token_share"] = tokens[0] / tokens[1]
        out.append(row)
    return out


def spent(ranks: list[dict[str, Any]], clock: str) -> float:
    """Processor seconds of all ranks; of wall seconds the longest."""
    values = [float(report[clock]) for report in ranks]
    return sum(values) if clock == "cpu_s" else max(values)


def spread(ratios: list[float]) -> list[float]:
    """Median, least and largest."""
    return [statistics.median(ratios), min(ratios), max(ratios)]


def start_up(starts: list[Reports], names: list[str]) -> list[dict[str, Any]]:
    """From the start of the process to the end of its first step."""
    out = []
    for name in names:
        row: dict[str, Any] = {"name": name}
        for clock in ("cpu_s", "wall_s"):
            row[clock] = statistics.median(spent(r[name], clock) for r in starts)
            pairs = [spent(r[name], clock) / spent(r["bare"], clock) for r in starts]
            row[f"{clock}_of_bare"] = spread(pairs)
        out.append(row)
    return out


def tokenising(config: Config, folder: Path) -> dict[str, dict[str, float]]:
    """Rows a second into ids: ours with masks, checks and a store; a chat template row by row."""
    fresh = config.data.model_copy(update={"cache_dir": str(folder / "fresh")})
    ours = config.model_copy(update={"data": fresh})
    out = {}
    with clocked() as spent:
        store = read_inputs(ours).train
    out["slap_ds, a store with masks"] = {"rows": store.counts.rows, **spent}
    if importlib.util.find_spec("datasets") is None:
        return out
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = load_tokenizer(str(config.model.path))
    rows = [{"messages": row} for row in conversations(config)]
    data = Dataset.from_list(rows)
    with clocked() as spent:
        data.map(
            lambda row: {"ids": tokenizer.apply_chat_template(row["messages"], return_dict=False)}
        )
    out["datasets.map, apply_chat_template, no masks"] = {"rows": len(rows), **spent}
    return out


def conversations(config: Config) -> Iterator[list[dict[str, str]]]:
    """The rows' messages as plain dictionaries."""
    from slap_ds.data.formats import Conversation, read_sources
    from slap_ds.data.sources import Limits, find_sources

    for row in read_sources(find_sources(config.data.train), "auto", Limits()):
        if isinstance(row, Conversation):
            yield [{"role": m.role, "content": m.content} for m in row.messages]


@contextmanager
def clocked() -> Iterator[dict[str, float]]:
    """Filled with wall and processor seconds of the block, its child processes included."""
    out: dict[str, float] = {}
    before = os.times()
    yield out
    after = os.times()
    out["wall_s"] = after.elapsed - before.elapsed
    out["cpu_s"] = sum(after[:4]) - sum(before[:4])


if __name__ == "__main__":
    main()
