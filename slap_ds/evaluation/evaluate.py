"""Evaluation of one model on one set of rows: losses, answers, metrics.

    subject -> token store and rows -> loss of every turn
                                    -> answers, in batches -> metrics of each -> of each group
    eval.json            everything with counts, settings and versions
    predictions.jsonl    one line an answer; a second start answers only what is missing

Answers are greedy. The last assistant turn of a row is answered, given all messages before it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from slap_ds.answers.greedy import batches
from slap_ds.answers.metrics import Answer, group_metrics, sample_metrics
from slap_ds.answers.questions import Answering, Question, read_questions
from slap_ds.data.encoding import Template
from slap_ds.data.samples import Rules
from slap_ds.data.store import TokenStore
from slap_ds.data.templates import make_template
from slap_ds.distributed.comm import Comm
from slap_ds.engine import make_engine
from slap_ds.evaluation.answers import Answerer
from slap_ds.evaluation.subject import Subject
from slap_ds.files import write_text
from slap_ds.jsonl import read_lines
from slap_ds.models.load import DTYPES
from slap_ds.train.checks import check_head, check_isolation, check_sharing
from slap_ds.train.evaluate import few_labels
from slap_ds.train.inputs import read_inputs
from slap_ds.train.score_pass import TurnLosses, turn_pass

LIBRARIES = ("torch", "transformers", "tokenizers", "sacrebleu", "rouge_score", "jieba")


def evaluate(subject: Subject, how: Answering) -> dict[str, Any]:
    """Evaluate and write `eval.json` and `predictions.jsonl` into `subject.out`; returns eval.json.

    Raises:
        ValueError: the folder holds predictions of another model or other settings, or bad data.
    """
    config, out = subject.config, subject.out
    inputs = read_inputs(config)
    store, template = inputs.train, make_template(config.data.template, inputs.tokenizer)
    earlier = _earlier(out)
    if earlier and how.samples == 0:  # losses alone: the answers that are there stay
        how = replace(how, max_new_tokens=earlier["settings"]["max_new_tokens"])
    settings = _settings(subject, template, how)
    key = _hash(settings)
    predictions = _Predictions(out / "predictions.jsonl", key, _changed(earlier, settings))
    positions = getattr(inputs.model_config.get_text_config(), "max_position_embeddings", None)
    rules = Rules.of(config.data, template)
    questions, too_long = read_questions(store, config.data.train, rules, how, positions)

    result: dict[str, Any] = {
        "target": str(subject.target),
        "step": subject.step,
        "key": key,
        "settings": {**settings, **asdict(how)},
        "versions": _versions(),
        "data": {"paths": config.data.train, "fingerprint": store.fingerprint}
        | asdict(store.counts),
        "loss": _known_losses(earlier, key, store) or _losses(subject, inputs.model_config, store),
    }
    del inputs
    if earlier and how.samples == 0:
        result |= {"settings": earlier["settings"], "answers": earlier["answers"]}
        write_json(out / "eval.json", result)
        return result
    _answer(subject, questions, store, predictions, how)
    lines = predictions.finish(_line(q, store, predictions) for q in questions)
    result["answers"] = {
        **_groups(lines),
        "too_long": too_long,
        "predictions": len(lines),
    }
    write_json(out / "eval.json", result)
    return result


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Written aside and renamed, so that a visible file is a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def _settings(subject: Subject, template: Template, how: Answering) -> dict[str, Any]:
    """What decides an answer, beside its prompt."""
    return {
        "weights": subject.weights,
        "dtype": subject.config.model.dtype,
        "template": template.name,
        "template_fingerprint": template.fingerprint(),
        "max_new_tokens": how.max_new_tokens,
        "max_tokens": subject.config.data.max_tokens,
        "decoding": "greedy",
    }


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("slap_ds", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _losses(subject: Subject, model_config: Any, store: TokenStore) -> dict[str, Any]:
    config = subject.config
    engine = make_engine(config, model_config, Comm())
    check_sharing(engine, model_config, config.model.dtype)
    check_isolation(engine, model_config, config.model.attention)
    check_head(engine, model_config, config.model.dtype)
    turns = turn_pass(engine, Comm(), store, np.arange(len(store)), config.score_row_tokens)

    def means(groups: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {name: _mean(turns, where) for name, where in groups if where.any()}

    found: dict[str, Any] = {"fingerprint": store.fingerprint}
    found |= {"all": _mean(turns, np.ones(len(turns.loss), dtype=bool))}
    for label in ("task", "source"):
        codes = getattr(store, label)[turns.sample]
        few, codes = few_labels(label, store.names[label], codes, turns.tokens, say=True)
        found[f"by_{label}"] = means((name, codes == code) for code, name in enumerate(few))
    names = store.names["task"]
    talks = store.task[turns.sample] == (names.index("dialogue") if "dialogue" in names else -1)
    last = int(turns.turn.max())
    found["dialogue_by_turn"] = means(
        (str(turn + 1), talks & (turns.turn == turn)) for turn in range(last + 1)
    )
    return found


def _mean(turns: TurnLosses, where: Any) -> dict[str, Any]:
    tokens = int(turns.tokens[where].sum())
    return {
        "loss": float(turns.loss[where].sum() / tokens) if tokens else None,
        "response_tokens": tokens,
        "samples": len(np.unique(turns.sample[where])),
    }


def _earlier(out: Path) -> dict[str, Any]:
    """What an earlier start has left, or nothing."""
    path = out / "eval.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _changed(earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Which settings are others than those of an earlier start, in words."""
    before = earlier.get("settings", {})
    changed = [
        f"{name} {before[name]!r}, not {value!r}"
        for name, value in settings.items()
        if name in before and before[name] != value
    ]
    return ", ".join(changed) or "another model or other settings"


def _known_losses(earlier: Mapping[str, Any], key: str, store: TokenStore) -> dict[str, Any] | None:
    """The losses of an earlier start with the same model on the same data."""
    if earlier.get("key") != key or earlier["loss"]["fingerprint"] != store.fingerprint:
        return None
    losses: dict[str, Any] = earlier["loss"]
    return losses


class _Predictions:
    """predictions.jsonl: lines are appended as answers come, and put in order at the end."""

    def __init__(self, path: Path, key: str, changed: str) -> None:
        self.path = path
        self.key = key
        self.known: dict[int, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in read_lines(path) if path.is_file() else []:
            if line["settings"] != key:
                raise ValueError(
                    f"{path} holds predictions with {changed}: choose another --out, or move it "
                    "away"
                )
            self.known[line["id"]] = line
        # A line cut short by a crash must not swallow the next one.
        self._rewrite(self.known.values())

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for line in lines:
                if line["id"] not in self.known:
                    self.known[line["id"]] = line
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write `lines` in their order, then what other subsets left; returns `lines`."""
        found = list(lines)
        self.known |= {line["id"]: line for line in found}
        ids = {line["id"] for line in found}
        self._rewrite([*found, *(v for k, v in self.known.items() if k not in ids)])
        return found

    def _rewrite(self, lines: Iterable[dict[str, Any]]) -> None:
        rows = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.path, "".join(rows))


def _answer(
    subject: Subject,
    questions: Sequence[Question],
    store: TokenStore,
    predictions: _Predictions,
    how: Answering,
) -> None:
    """Answer what `predictions` does not hold yet, a batch at a time.

    Batches are made of all questions, so a second start computes the same batches as the first.
    """
    ids = store.sample_ids
    lengths = [len(question.prompt) for question in questions]
    groups = [
        [questions[i] for i in group]
        for group in batches(lengths, how.max_new_tokens, how.batch_tokens)
    ]
    groups = [g for g in groups if any(int(ids[q.index]) not in predictions.known for q in g)]
    if not groups:
        return
    config = subject.config
    answerer = Answerer(subject.folder, config.data.template, DTYPES[config.model.dtype])
    for group in track(groups, "answering", transient=True):
        answers = answerer.answer([q.prompt for q in group], how.max_new_tokens)
        predictions.add(
            {
                "id": int(ids[question.index]),
                "settings": predictions.key,
                "prediction": answer.text,
                "stopped": answer.stopped,
            }
            for question, answer in zip(group, answers, strict=True)
        )


def _line(question: Question, store: TokenStore, predictions: _Predictions) -> dict[str, Any]:
    """A line of predictions.jsonl with its metrics."""
    i = question.index
    labels = {
        label: store.names[label][getattr(store, label)[i]] for label in ("task", "source", "lang")
    }
    known = predictions.known[int(store.sample_ids[i])]
    answer = Answer(labels["task"], question.references, known["prediction"])
    return {
        "id": known["id"],
        **labels,
        "prompt": [{"role": m.role, "content": m.content} for m in question.messages],
        "reference": question.references[0],
        "references": list(question.references),
        "prediction": known["prediction"],
        "stopped": known["stopped"],
        "metrics": sample_metrics(answer),
        "settings": known["settings"],
    }


def _groups(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics by task, by task and source, and by task and language label."""

    def metrics_of(group: list[dict[str, Any]]) -> dict[str, Any]:
        answers = [
            Answer(line["task"], tuple(line["references"]), line["prediction"]) for line in group
        ]
        return {
            "count": len(group),
            "stopped": sum(line["stopped"] for line in group) / len(group),
            "metrics": group_metrics(answers, [line["metrics"] for line in group]),
        }

    found: dict[str, Any] = {}
    for name, labels in (
        ("by_task", ("task",)),
        ("by_source", ("task", "source")),
        ("by_lang", ("task", "lang")),
    ):
        groups: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            groups.setdefault("/".join(line[label] for label in labels), []).append(line)
        found[name] = {key: metrics_of(group) for key, group in sorted(groups.items())}
    return found
