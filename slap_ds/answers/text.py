"""What language a text is written in, and the words that metrics count in it."""

from __future__ import annotations

import functools
import logging
import re
import unicodedata
from collections.abc import Callable
from types import ModuleType
from typing import Literal

Words = Callable[[str], list[str]]
Language = Literal["zh", "ja", "other"]

_KANA = r"\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_KANA_LETTER = re.compile(f"[{_KANA}]")
_CJK_LETTER = re.compile(f"[{_HAN}{_KANA}]")
# Accents and vowel signs, which `\w` leaves out, belong to the letter before them.
_MARKS = "".join(
    c
    for c in map(chr, (*range(0x300, 0x1F000), *range(0xE0100, 0xE01F0)))
    if unicodedata.category(c).startswith("M")
)
_CJK = rf"[{_HAN}{_KANA}][{_MARKS}]*"
_CHARACTER = re.compile(rf"{_CJK}|[^\W_{_HAN}{_KANA}]+(?:[{_MARKS}]+[^\W_{_HAN}{_KANA}]*)*")
_APART = re.compile(rf"{_CJK}|[^{_HAN}{_KANA}]+")
_WORD = re.compile(rf"[^\W_]+(?:[{_MARKS}]+[^\W_]*)*")


def language_of(text: str) -> Language:
    """zh where a third of the letters or more are Han characters, ja where there is kana too.

    The text decides, not the row's label: labels of translations name both languages, or one of
    them whichever way the row goes.
    """
    letters = sum(c.isalpha() for c in text)
    if not letters or len(_CJK_LETTER.findall(text)) * 3 < letters:
        return "other"
    return "ja" if _KANA_LETTER.search(text) else "zh"


def characters(text: str) -> list[str]:
    """Each Han or kana character by itself, other letters and digits in whole words; lower case."""
    return _CHARACTER.findall(folded(text))


def characters_apart(word: str) -> list[str]:
    """Each Han or kana character by itself, and whatever stands between them as it is."""
    return _APART.findall(word)


def folded(text: str) -> str:
    """Lower case, and a letter with its accent as one character where Unicode has one."""
    return unicodedata.normalize("NFC", text).lower()


def words_like(reference: str) -> Words:
    """The segmentation that fits a reference; its prediction is segmented in the same way.

    Chinese: jieba's words. Japanese: characters. Other texts: rouge-score's own words where all
    letters are ASCII, else runs of letters, digits and their marks. Punctuation never counts.
    """
    language = language_of(reference)
    if language == "zh":
        return _jieba_words
    if language == "ja":
        return characters
    if any(c.isalpha() and not c.isascii() for c in folded(reference)):
        return _unicode_words
    return _english_words


def without_punctuation(text: str) -> str:
    """The text without ASCII punctuation and symbols, and without any other punctuation."""
    return "".join(c for c in text if not (_is_ascii_mark(c) or _is_punctuation(c)))


def needed(name: str) -> ModuleType:
    """The module of a library of the extra `eval`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return __import__(name, fromlist=["_"])
    except ImportError:
        raise ValueError(
            f"evaluation needs {name.split('.')[0]}: pip install 'slap_ds[eval]'"
        ) from None


def _unicode_words(text: str) -> list[str]:
    return _WORD.findall(folded(text))


def _english_words(text: str) -> list[str]:
    words: list[str] = needed("rouge_score.tokenize").tokenize(folded(text), None)
    return words


def _jieba_words(text: str) -> list[str]:
    return [word for word in _jieba().lcut(folded(text)) if _WORD.search(word)]


@functools.cache
def _jieba() -> ModuleType:
    jieba = needed("jieba")
    jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary
    return jieba


def _is_ascii_mark(c: str) -> bool:
    return c.isascii() and c.isprintable() and not c.isalnum() and c != " "


def _is_punctuation(c: str) -> bool:
    return unicodedata.category(c).startswith("P")
