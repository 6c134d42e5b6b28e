"""YAML and dotted command-line overrides -> one validated `Config`, and back into a file.

    read_config("configs/demo.yaml", ["--selection.keep", "0.6"])

Every mistake is reported at once, by its dotted key, with a suggestion where one is near.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from slap_ds.config.schema import Config

M = TypeVar("M", bound=BaseModel)

# What other trainers call our settings.
_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "weight_decay_rate": "optimizer.weight_decay",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "output_dir": "run_dir",
    "model_name_or_path": "model.path",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "batch_size": "batch.candidates",
    "per_device_train_batch_size": "batch.micro_batch_tokens",
    "save_steps": "checkpoint.every",
    "eval_steps": "evaluation.every",
}


def read_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a YAML file with `--section.key value` overrides.

    Raises:
        ValueError: listing every mistake found, one per line, by dotted key.
        FileNotFoundError: no such file.
    """
    raw = read_yaml(path)
    for key, value in _parse_overrides(overrides):
        set_dotted(raw, key, value)
    return validated(Config, raw, path)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: something else is in it.
        FileNotFoundError: no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no config file at {path!r}")
    try:
        raw = _load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except RepeatedKey as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds {type(raw).__name__}, expected a mapping of sections")
    return raw


def validated(model: type[M], raw: Mapping[str, Any], path: str) -> M:
    """`raw`, the content of the file at `path`, as a `model`.

    Raises:
        ValueError: listing every mistake found, one per line, by dotted key.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(e, model) for e in error.errors()]
        count = f"{len(lines)} mistake{'s' if len(lines) > 1 else ''}"
        raise ValueError(f"{path}: {count}\n" + "\n".join(f"  {line}" for line in lines)) from None


def config_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, description with allowed values and default) of every setting, in order."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        section = next((kind for kind in (inner, *get_args(inner)) if _is_section(kind)), None)
        if section is not inner:
            default = "required" if field.is_required() else f"default {_written(field.default)}"
            key = f"{prefix}{field.alias or name}"
            yield key, f"{field.description} ({_allowed(inner, field.metadata)}; {default})"
        if section is not None:
            yield from config_keys(section, f"{prefix}{name}.")


def _allowed(kind: Any, limits: Sequence[Any] = ()) -> str:
    """The values of a type, as a user writes them: `number > 0, <= 1`, `auto | reuse | null`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _allowed(inner[0], [x for m in inner[1:] for x in getattr(m, "metadata", [])])
    if origin is Literal:
        return " | ".join(inner)
    if origin in (Union, types.UnionType):
        return " | ".join(_allowed(each, limits) for each in inner)
    if origin is list:
        return f"list of {_allowed(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_allowed, inner))}]"
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in limits
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if hasattr(limit, name)
    ]
    names = {str: "text", int: "whole number", float: "number", bool: "true | false"}
    name = "null" if kind is types.NoneType else names.get(kind, "mapping")
    return f"{name} {', '.join(bounds)}".strip() if kind in (int, float) else name


def _written(default: Any) -> str:
    """A default as YAML has it, in one line."""
    return default if isinstance(default, str) else json.dumps(default)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, to which a key that stands twice is an error at any depth."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # the constructor says so
            if key in lines:
                raise RepeatedKey(
                    f"{key!r} is in line {lines[key]} and again in line {line}: the second"
                    " would silently replace the first; put them together"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


class RepeatedKey(ValueError):
    """A key that stands twice in one mapping."""


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)


def _parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """`--a.b value` and `--a.b=value`; values are YAML, so `[a, b]`, `null` and `1e-4` work."""
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) == 2:
            raise ValueError(f"expected an override such as --selection.keep 0.6, found {flag!r}")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} has no value after it")
            text = rest.pop(0)
        try:
            yield key.replace("-", "_"), _load(text)
        except yaml.YAMLError:
            yield key.replace("-", "_"), text


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set `tree[a][b][c]` for the key a.b.c, making sections on the way.

    Raises:
        ValueError: a part of the key is a single value.
    """
    *parents, last = key.split(".")
    for parent in parents:
        below = tree.setdefault(parent, {})
        if not isinstance(below, dict):
            raise ValueError(f"--{key}: {parent!r} is a single value, not a section")
        tree = below
    tree[last] = value


def _explain(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "config"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_hint(error['loc'], model)}"
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default"
    if error["type"] == "list_type" and isinstance(error["input"], str):
        return f"{key}: expected a list, found one text: write [{error['input']}]"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" and (len(error["loc"]) < 2):
        return message if not error["loc"] else f"{key}: {message}"
    return f"{key}: {message} (found {error['input']!r})"


def _hint(location: Sequence[Any], root: type[BaseModel]) -> str:
    """What may have been meant by an unknown key: one further down, or one of a similar name."""
    *parents, name = location
    if not parents and (ours := _ELSEWHERE.get(str(name))):
        return f"did you mean {ours}?"
    section = _section(parents, root)
    known = [field.alias or key for key, field in section.model_fields.items()] if section else []
    below = [
        ".".join(map(str, [*parents, one, name]))
        for one in known
        if (inner := _section([*parents, one], root)) and name in inner.model_fields
    ]
    if below:
        return f"did you mean {' or '.join(below)}?"
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"


def _section(location: Sequence[Any], root: type[BaseModel]) -> type[BaseModel] | None:
    """The section at a dotted key; None: a single value."""
    model: Any = root
    for part in location:
        if get_origin(model) in (list, dict):
            model = get_args(model)[-1]
            continue
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field is not None else None
        if get_origin(model) in (Union, types.UnionType):
            model = next((a for a in get_args(model) if hasattr(a, "model_fields")), None)
    return model if _is_section(model) else None


def write_config(config: Config, path: Path) -> None:
    """Write `config` as YAML that `read_config` reads back."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
