"""export, generate, convert: model folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from slap_ds.cli.common import Commands


def add(commands: Commands) -> None:
    export = commands.add_parser("export", help="write a run's model as a Hugging Face folder")
    export.add_argument("run_dir")
    export.add_argument("--out", help="target folder (default RUN_DIR/model)")
    export.add_argument("--best", action="store_true", help="of checkpoint.best, not the newest")
    export.add_argument("--merge", action="store_true", help="LoRA: add the adapter into the model")
    export.add_argument("--license", help="for the model card, such as apache-2.0")
    export.add_argument("--push", metavar="OWNER/NAME", help="upload to a hub, privately")
    export.add_argument("--public", action="store_true", help="with --push: upload publicly")
    export.set_defaults(run=_export)

    generate = commands.add_parser("generate", help="answer prompts with an exported model")
    generate.add_argument("model")
    generate.add_argument("prompt", nargs="+")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.set_defaults(run=_generate)

    convert = commands.add_parser("convert", help="published checkpoints to transformers' layout")
    layouts = convert.add_subparsers(required=True, metavar="LAYOUT")
    chatglm = layouts.add_parser("chatglm", help="ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B, and back")
    chatglm.add_argument("src", help="the published folder, downloaded whole")
    chatglm.add_argument("dst", help="a new folder")
    chatglm.add_argument("--reverse", action="store_true", help="back to the published layout")
    chatglm.add_argument("--dtype", help="float32, bfloat16, float16 (default: each tensor's own)")
    chatglm.add_argument("--family", help="chatglm2, chatglm3, glm4 (default: seen in the folder)")
    chatglm.set_defaults(run=_convert)


def _export(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.checkpoint.card import push
    from slap_ds.checkpoint.export import export

    run_dir = Path(options.run_dir)
    out = Path(options.out or run_dir / "model")
    export(run_dir, out, options.merge, options.license, options.best)
    note = json.loads((out / "slap_ds.json").read_text("utf-8"))
    print(f"wrote {out}: step {note['step']} of {note['steps']}")
    if options.push:
        print(f"pushed to {push(out, options.push, options.public)}")


def _generate(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.evaluation.answers import Answerer
    from slap_ds.models.load import whole_files

    folder = Path(options.model)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"no exported model at {options.model!r}: run slap-ds export first")
    with whole_files("generate", options.model):
        answer = Answerer(folder)
    for prompt in options.prompt:
        print(f"user: {prompt}\nassistant: {answer(prompt, options.max_new_tokens)}")


def _convert(options: argparse.Namespace, rest: list[str]) -> None:
    from slap_ds.models.glm.convert import convert_chatglm

    convert_chatglm(
        Path(options.src),
        Path(options.dst),
        reverse=options.reverse,
        dtype=options.dtype,
        family=options.family,
    )
