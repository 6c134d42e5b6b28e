"""What the fields of a message beside its text say: is it trained, calls of tools, reasoning.

Data sets spell these in many ways. What is understood is obeyed; a field that looks like one of
them and is not understood is refused, because reading past it would train something else than the
row says.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slap_ds.data.sources import kind_of

# Fields that say "trained" when true, and those that say the opposite.
TRAINED = (
    "train",
    "trainable",
    "loss",
    "loss_mask",
    "loss_weight",
    "weight",
    "training",
    "train_on_turn",
    "supervised",
)
MASKED = ("masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss")
REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
# Read by `formats`, or known to mean nothing that is trained.
_KNOWN = {"role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call"}
_ABOUT_TRAINING = re.compile(r"(?:^|_)(?:train|loss|mask|weight|supervis|ignor|learn)")
_ABOUT_REASONING = re.compile(r"(?:^|_)(?:reasoning|think|thought|rationale|cot)")
_ABOUT_MEDIA = re.compile(r"^(image|audio|video|file|attachment|document)s?$|_(url|path)s?$")
# Of a row as a whole: they weigh or mask what is trained in it.
_OF_THE_ROW = re.compile(
    r"^(sample_|loss_|token_|turn_)?weights?$|^(loss|assistant|completion|response|token)_masks?$|"
    r"^train_on_inputs?$|^mask_history$|^masked$|^trainable$"
)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an assistant makes.

    `arguments` is a JSON object, as text; `source` the whole call as the row wrote it, where it
    wrote text.
    """

    name: str
    arguments: str
    id: str = ""
    source: str = ""


def is_trained(message: Mapping[str, Any], number: int, role: str) -> bool:
    """Whether the turn is to be trained, as its fields say; True where none does.

    Raises ValueError: a field that may say so is not understood, or two contradict each other.
    """
    said: dict[str, bool] = {}
    for name, value in message.items():
        if value is None or name in _KNOWN or not isinstance(name, str):
            continue
        if name in TRAINED or name in MASKED:
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                raise ValueError(
                    f"message {number}: '{name}' is {value!r:.40}, expected true, false, 0 or 1:"
                    " other weights of a turn are not supported"
                )
            said[name] = bool(value) == (name in TRAINED)
        elif _ABOUT_TRAINING.search(_words(name)):
            raise ValueError(
                f"message {number} has '{name}', which may say whether it is trained: name it"
                " 'train', with true or false, or leave it out"
            )
    if len(set(said.values())) > 1:
        raise ValueError(f"message {number}: {' and '.join(said)} contradict each other")
    trained = next(iter(said.values()), True)
    if said and trained and role != "assistant" and "weight" not in said:
        raise ValueError(
            f"message {number} is '{role}' and has '{next(iter(said))}': only assistant turns are"
            " trained"
        )
    return trained


def reasoning_of(message: Mapping[str, Any], number: int, role: str) -> str:
    """The text that an assistant thinks before its answer, or "".

    Raises ValueError: it is no text, stands under two names, or is another role's.
    """
    found = {}
    for name, value in message.items():
        if value is None or value == "" or name in _KNOWN or not isinstance(name, str):
            continue
        if name in REASONING:
            if not isinstance(value, str):
                raise ValueError(f"message {number}: '{name}' is {kind_of(value)}, expected text")
            if value.strip():
                found[name] = value
        elif _ABOUT_REASONING.search(_words(name)):
            raise ValueError(
                f"message {number} has '{name}', which looks like reasoning: name it"
                f" '{REASONING[0]}', or leave it out"
            )
        elif _ABOUT_MEDIA.search(name.lower()) and value not in ([], {}):
            raise ValueError(f"message {number} has '{name}': only text is trained here")
    if len(set(found.values())) > 1:
        raise ValueError(f"message {number}: {' and '.join(found)} hold different texts")
    if found and role != "assistant":
        raise ValueError(
            f"message {number} is '{role}' and has '{next(iter(found))}': only assistants reason"
        )
    return next(iter(found.values()), "")


def calls_of(message: Mapping[str, Any], number: int, role: str) -> tuple[ToolCall, ...]:
    """The calls in `tool_calls` (OpenAI's form, or a name and its arguments) or `function_call`.

    Raises ValueError: they have another form, or are another role's.
    """
    listed, single = message.get("tool_calls") or [], message.get("function_call")
    name = "tool_calls" if listed else "function_call"
    if isinstance(listed, str):
        listed = _json(listed, f"message {number}: 'tool_calls'")
    if not isinstance(listed, list):
        raise ValueError(f"message {number}: 'tool_calls' is {kind_of(listed)}, expected a list")
    values = [*listed, *([single] if single else [])]
    if values and role != "assistant":
        raise ValueError(f"message {number} is '{role}' and has '{name}': only assistants call")
    return tuple(
        call_of(value, f"message {number}: call {i} of '{name}'")
        for i, value in enumerate(values, 1)
    )


def call_of(value: object, where: str) -> ToolCall:
    """A call of the form {"name", "arguments"}, alone or under "function", or the same as text.

    Raises ValueError: it has another form.
    """
    source = value if isinstance(value, str) else ""
    if isinstance(value, str):
        value = _json(value, where)
    inner = value.get("function") or value if isinstance(value, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(inner, Mapping):
        raise ValueError(f"{where} is {kind_of(value)}, expected an object with a name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} has no name")
    arguments = inner.get("arguments", inner.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: its arguments") if arguments.strip() else {}
    if not isinstance(arguments, (Mapping, type(None))):
        raise ValueError(f"{where}: its arguments are {kind_of(arguments)}, expected an object")
    # Tables write every field that any row has; those that this call lacks are null.
    given = {key: item for key, item in (arguments or {}).items() if item is not None}
    id = value.get("id")
    text = json.dumps(given, ensure_ascii=False)
    return ToolCall(name, text, id if isinstance(id, str) else "", source)


def tools_of(row: Mapping[str, Any]) -> str:
    """The tools that a row offers (`tools`, or OpenAI's older `functions`): a JSON list of objects
    as text, "" for none.

    Raises ValueError: they have another form.
    """
    name = "tools" if row.get("tools") else "functions"
    value = row.get(name)
    if isinstance(value, str) and value.strip():
        value = _json(value, f"'{name}'")
    if not value:
        return ""
    tools = value if isinstance(value, list) else None
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"'{name}' is {kind_of(value)}, expected a list of objects")
    whole = [
        tool
        if isinstance(tool.get("function"), Mapping)
        else {"type": "function", "function": tool}
        for tool in tools
    ]
    if not all(isinstance(tool["function"].get("name"), str) for tool in whole):
        raise ValueError(f"a tool in '{name}' has no name")
    return json.dumps(whole, ensure_ascii=False)


def check_row(row: Mapping[str, Any]) -> None:
    """Refuse fields of a row that would change what is trained and are not supported.

    Raises ValueError, naming the field.
    """
    refuse_other_kinds(row)
    for name, value in row.items():
        if value is None or value in ([], {}, ""):
            continue
        if _OF_THE_ROW.search(name.lower()) and value not in (1, True):
            raise ValueError(
                f"the row has '{name}', which would weigh or mask what is trained: not supported;"
                " a turn can be left out of the loss by its own 'train': false"
            )


def has_media(row: Mapping[str, Any]) -> bool:
    """Whether a row comes with images, sounds or films, which are not trained."""
    names = (name.lower() for name, value in row.items() if value is not None and value != [])
    return any(re.match(r"(image|audio|video)s?$", name) for name in names)


def refuse_other_kinds(row: Mapping[str, Any]) -> None:
    """Refuse rows that teach by comparison or by verdict: their worse answers are not to be learnt.

    Raises ValueError, naming what takes them.
    """
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise ValueError(
            "a row of preferences (chosen, rejected): use a method that learns from them, as"
            " TRL's DPOTrainer, or write messages that end with the chosen answer"
        )
    for name in ("label", "kto_tag"):
        if isinstance(row.get(name), bool):
            raise ValueError(
                f"a row with a verdict ({name} true or false): use a method that learns from"
                " them, such as TRL's KTOTrainer, or keep only the good rows, without the field"
            )


def _words(name: str) -> str:
    """A field's name with its words in lower case and apart: `isTrained` -> `is_trained`."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{where} is text that is no JSON: {text[:40]!r}") from None
