"""Which chat templates `data.template: auto` takes, and which rows it writes with each.

    python benchmarks/chat_templates.py FOLDER      # of .jinja files; default: those of trl

Prints a table in Markdown. Every template gets a tokenizer of single bytes and the control tokens
that stand in its own text, for only with its control tokens does a template mean anything.
"""

import argparse
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slap_ds.data.formats import FORMATS, Conversation
from slap_ds.data.templates import make_template

CONTROL = re.compile(
    r"<\|[A-Za-z_]+\|>|<\|[a-z_]+>|<[a-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>"
    r"|\[gMASK\]|<sop>|</?s>|<bos>|<eos>"
)
# Tokens that families have and their templates only name by variable.
BASE = ("<s>", "</s>")
CALL = {"id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
QUESTION = {"role": "user", "content": "What is 1?"}
ROWS: dict[str, dict[str, object]] = {
    "two rounds": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "One."},
            {"role": "user", "content": "And 2?"},
            {"role": "assistant", "content": "Two."},
        ]
    },
    "system": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            QUESTION,
            {"role": "assistant", "content": "One."},
        ]
    },
    "reasoning": {
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "One.", "reasoning_content": "It is a digit."},
        ]
    },
    "tools": {
        "tools": [{"name": "get_weather", "description": "now", "parameters": TOOL}],
        "messages": [
            QUESTION,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {
                "role": "tool",
                "content": "sunny",
                "name": "get_weather",
                "tool_call_id": "call00001",
            },
            {"role": "assistant", "content": "Sunny."},
        ],
    },
}


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """Bytes, and the control tokens in the template's text."""
    source = path.read_text("utf-8")
    special = list(dict.fromkeys([*BASE, *CONTROL.findall(source)]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.add_tokens([t for t in ("<think>", "</think>") if t in source])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    return tokenizer


def columns(path: Path) -> list[str]:
    """What becomes of each of ROWS: how many of its answers are trained, or why none is."""
    try:
        template = make_template("auto", tokenizer_of(path))
    except ValueError as error:
        return [f"refused: {error}", *[""] * (len(ROWS) - 1)]
    found = []
    for row in ROWS.values():
        talk = FORMATS["messages"](row)
        assert isinstance(talk, Conversation)
        answers = sum(message.role == "assistant" for message in talk.messages)
        try:
            context = template.encode(talk.messages, talk.tools).context_turns
            found.append(f"{answers - context} of {answers}" if context else "all")
        except ValueError as error:
            found.append(_short(str(error)))
    return found


def _short(reason: str) -> str:
    if found := re.search(
        r"leaves out (?:or changes )?(.*?)(?: of (?:this row|message).*)?$", reason
    ):
        return f"no: loses {found[1]}"
    return "no: " + reason.removeprefix("the tokenizer's chat template refuses this: ")[:60]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="of .jinja files; default: those of trl")
    folder = parser.parse_args().folder
    if folder is None:
        import trl

        folder = Path(trl.__file__).parent / "chat_templates"
    files = sorted(Path(folder).glob("*.jinja"))
    if not files:
        raise SystemExit(f"no .jinja files in {folder}")
    print(f"| template | {' | '.join(ROWS)} |\n|{' --- |' * (len(ROWS) + 1)}")
    taken = 0
    for path in files:
        cells = columns(path)
        taken += not cells[0].startswith("refused")
        print(f"| {path.stem} | {' | '.join(cells)} |")
    print(f"\n{taken} of {len(files)} taken")


if __name__ == "__main__":
    main()
