"""Metrics of answers against references. A row's task label says which ones apply:

    translation         BLEU, chrF (corpus scores)
    qa                  exact match, token F1; number match where the reference ends in "#### 42"
    dialogue, general   ROUGE-L, distinct-1 and distinct-2
    any other label     ROUGE-L

All values lie in 0..1, save BLEU and chrF, which are sacrebleu's 0..100.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import zip_longest
from typing import Any

from slap_ds.answers.text import (
    Words,
    characters,
    characters_apart,
    folded,
    language_of,
    needed,
    without_punctuation,
    words_like,
)

TALK = ("dialogue", "general")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
# Digits with points and commas between them; a point before them is a decimal one only where a
# number can begin.
_DIGITS = r"(?:(?<!\d)-)?\$?(?:(?<![\w.,)\]])\.)?\d+(?:[.,]\d+)*"
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{2,3})*,\d{3}(?:\.\d+)?")
_AT_THE_END = re.compile(rf"####\s*({_DIGITS})[.\s]*$")


@dataclass(frozen=True)
class Answer:
    """A prediction beside what it should be. `references` holds at least one text."""

    task: str
    references: tuple[str, ...]
    prediction: str


def sample_metrics(answer: Answer) -> dict[str, float]:
    """The metrics of one answer by itself, the best over its references."""
    task, references, prediction = answer.task, answer.references, answer.prediction
    if task == "translation":
        bleu = _bleu(_bleu_tokens(references[0]), effective_order=True)
        return {
            "sentence_bleu": bleu.sentence_score(prediction, references).score,
            "sentence_chrf": _chrf().sentence_score(prediction, references).score,
        }
    if task == "qa":
        wanted = next((n for text in references if (n := marked_number(text)) is not None), None)
        if wanted is not None:
            return {"number_match": float(said_number(prediction) == wanted)}
        return {
            "exact_match": max(exact_match(prediction, text) for text in references),
            "f1": max(token_f1(prediction, text) for text in references),
        }
    found = {"rouge_l": max(rouge_l(prediction, r, words_like(r)) for r in references)}
    if language_of(references[0]) == "zh":
        found["rouge_l_characters"] = max(rouge_l(prediction, r, characters) for r in references)
    return found


def group_metrics(answers: Sequence[Answer], samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Metrics of answers of one task: {name: {"value", "count", ...}}.

    Means of `samples`, what `sample_metrics` gave for each answer, over the answers that have the
    metric; for translations corpus scores instead. `count` is the number of answers behind it.
    """
    task = answers[0].task
    if task == "translation":
        return {"bleu": _corpus_bleu(answers), "chrf": _corpus_chrf(answers)}
    found: dict[str, Any] = {}
    for name in sorted({name for sample in samples for name in sample}):
        values = [sample[name] for sample in samples if name in sample]
        found[name] = {"value": sum(values) / len(values), "count": len(values)}
    if task in TALK:
        texts = [words_like(a.references[0])(a.prediction) for a in answers]
        for n in (1, 2):
            found[f"distinct_{n}"] = {"value": distinct(texts, n), "count": len(texts)}
    return found


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where both are the same after SQuAD's normalisation (`answer_tokens`); without it where
    it leaves nothing of the reference."""
    found, wanted = _tokens_of(prediction, reference)
    return float(found == wanted)


def token_f1(prediction: str, reference: str) -> float:
    """SQuAD's F1 of the tokens of both as bags (Rajpurkar et al. 2016, section 6.1)."""
    found, wanted = _tokens_of(prediction, reference)
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted))


def _tokens_of(prediction: str, reference: str) -> tuple[list[str], list[str]]:
    """The tokens of both; where nothing of the reference is left by the normalisation ("A", "+"),
    the words of both as they are, in lower case."""
    wanted = answer_tokens(reference)
    if wanted:
        return answer_tokens(prediction), wanted
    return folded(prediction).split(), folded(reference).split()


def answer_tokens(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles, split at white space.

    A Chinese or Japanese character is a token by itself, as in CMRC 2018's evaluation, and
    punctuation that is not ASCII goes too.
    """
    plain = _ARTICLE.sub(" ", without_punctuation(folded(text)))
    return [token for word in plain.split() for token in characters_apart(word)]


def marked_number(reference: str) -> Decimal | None:
    """The number after "####" with which GSM8K's answers end; None without one, as after a
    heading in Markdown."""
    match = _AT_THE_END.search(reference)
    found = _numbers(match[1]) if match else []
    return found[0] if len(found) == 1 else None


def said_number(text: str) -> Decimal | None:
    """The number that an answer gives: the first after its last "####", else the last in it."""
    _, mark, after = text.rpartition("####")
    if mark and (found := _numbers(after)):
        return found[0]
    return found[-1] if (found := _numbers(text)) else None


def rouge_l(prediction: str, reference: str, words: Words) -> float:
    """rouge-score's ROUGE-L F-measure (Lin 2004, section 3), both texts cut up by `words`."""
    scores = _rouge(words).score(reference, prediction)
    return float(scores["rougeL"].fmeasure)


def distinct(texts: Iterable[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams, of all texts together (Li et al. 2016, section 5); 0.0
    where there is none. It falls as texts get longer or more: compare equal sets only."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _numbers(text: str) -> list[Decimal]:
    """All numbers, in order. Commas that make no groups of thousands separate numbers; what has
    more than one point (a version, a date) is none."""
    found = []
    for digits in re.findall(_DIGITS, text):
        plain = digits.replace("$", "")
        for part in [plain] if _THOUSANDS.fullmatch(plain) else plain.split(","):
            if part.count(".") < 2:
                found.append(Decimal(part.replace(",", "")))
    return found


@functools.cache
def _rouge(words: Words) -> Any:
    class Tokenizer:
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return needed("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=Tokenizer())


def _bleu_tokens(reference: str) -> str:
    """sacrebleu's tokenizer for the language of the reference."""
    language = language_of(reference)
    if language == "ja":
        return "ja-mecab" if _has_mecab() else "13a"
    return "zh" if language == "zh" else "13a"


@functools.cache
def _has_mecab() -> bool:
    try:
        needed("sacrebleu.metrics").BLEU(tokenize="ja-mecab")
    except (ImportError, RuntimeError):
        return False
    return True


@functools.cache
def _bleu(tokens: str, effective_order: bool = False) -> Any:
    return needed("sacrebleu.metrics").BLEU(tokenize=tokens, effective_order=effective_order)


@functools.cache
def _chrf() -> Any:
    return needed("sacrebleu.metrics").CHRF()


def _corpus_bleu(answers: Sequence[Answer]) -> dict[str, Any]:
    """Corpus BLEU of each tokenizer's answers; `value` is their mean, weighted by count."""
    parts = {}
    for tokens in sorted({_bleu_tokens(a.references[0]) for a in answers}):
        group = [a for a in answers if _bleu_tokens(a.references[0]) == tokens]
        metric = _bleu(tokens)
        score = metric.corpus_score([a.prediction for a in group], _streams(group)).score
        signature = str(metric.get_signature())
        parts[tokens] = {"value": score, "count": len(group), "signature": signature}
    value = sum(part["value"] * part["count"] for part in parts.values()) / len(answers)
    return {"value": value, "count": len(answers), "by_tokenizer": parts}


def _corpus_chrf(answers: Sequence[Answer]) -> dict[str, Any]:
    score = _chrf().corpus_score([a.prediction for a in answers], _streams(answers)).score
    return {"value": score, "count": len(answers), "signature": str(_chrf().get_signature())}


def _streams(answers: Sequence[Answer]) -> list[list[str | None]]:
    """References as sacrebleu wants them: the first of each answer, the second of each, ..."""
    return [list(stream) for stream in zip_longest(*(a.references for a in answers))]
