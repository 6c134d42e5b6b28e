"""The tokenizer that goes with a model: saved, read again, and compared with what was trained."""

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

from slap_ds.data.encoding import Template, describe
from slap_ds.data.formats import Message
from slap_ds.data.own_template import as_dict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Contents with the edges at which tokenizers differ: spaces, digits, other scripts, line ends.
PROBE = (
    Message("user", "Hi! Is 12 + 30 = 42?"),
    Message("assistant", "Yes, 42.\nNext: 你好"),
    Message("user", "a  b"),
    Message("assistant", "c"),
)
# Settings that transformers' own saving leaves out of tokenizer_config.json.
_LOST = ("legacy", "add_prefix_space")


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", template: Template, folder: Path) -> None:
    """Write the tokenizer with the template as its chat template; others that it has by name stay.

    Raises:
        ValueError: read from the folder again, it gives other token ids than those of training.
    """
    before = tokenizer.chat_template
    if template.chat_template:
        named = isinstance(before, dict)
        chat = {**before, "default": template.chat_template} if named else template.chat_template
        tokenizer.chat_template = chat
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = before
    if _differs(tokenizer, folder):
        _add_lost(tokenizer, folder)
    _check(template, folder)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", template: Template) -> None:
    """Before training: can the tokenizer be exported so that it gives the ids of training?

    Raises:
        ValueError: it cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, template, Path(folder))


def _differs(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> bool:
    return describe(AutoTokenizer.from_pretrained(folder)) != describe(tokenizer)


def _add_lost(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    given = {name: tokenizer.init_kwargs[name] for name in _LOST if name in tokenizer.init_kwargs}
    held = {name: getattr(tokenizer, name, None) for name in _LOST}
    given |= {name: value for name, value in held.items() if value is not None}
    path.write_text(json.dumps({**config, **given}, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _check(template: Template, folder: Path) -> None:
    if not template.chat_template:
        return
    reloaded = AutoTokenizer.from_pretrained(folder)
    encoded = template.encode(PROBE)
    given = reloaded.apply_chat_template(
        [as_dict(message, template.in_parts) for message in PROBE],
        chat_template=template.jinja,
        return_dict=True,
    )["input_ids"]
    # A stop token that the chat template leaves to the next turn is ours.
    ours = encoded.ids[: len(given)] if encoded.mask[-1] else encoded.ids
    if ours != given or len(encoded.ids) > len(given) + 1:
        first = next(
            (i for i, (a, b) in enumerate(zip(ours, given, strict=False)) if a != b), len(given)
        )
        raise ValueError(
            "the exported tokenizer would give other token ids than those of training: at token"
            f" {first + 1} of a probe {reloaded.convert_ids_to_tokens(given[first : first + 3])}"
            f" instead of {reloaded.convert_ids_to_tokens(ours[first : first + 3])}; the template"
            f" {template.name!r} does not fit this tokenizer: name another data.template"
        )
