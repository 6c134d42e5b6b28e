"""The `tokenizer.model` of a ChatGLM folder: what it says, and the plain way to encode with it.

    SentencePiece (ChatGLM2, ChatGLM3): pieces with scores; the pair of best score is joined first
    tiktoken (GLM-4): bytes with ranks; the pair of lowest rank is joined first

Both files are simple and are read here, so that no other package is needed. The plain encoders are
slow and serve to check the fast tokenizer.
"""

import base64
import binascii
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

# The types of a SentencePiece piece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a SentencePiece BPE file says."""

    texts: list[str]
    scores: list[float]
    types: list[int]
    charsmap: bytes  # compiled normalisation rules; empty: none
    prefix_space: bool
    one_space: bool  # runs of spaces become one

    def of_type(self, kind: int) -> list[str]:
        """The pieces of one SentencePiece type, in order."""
        return [text for text, other in zip(self.texts, self.types, strict=True) if other == kind]


def read_sentencepiece(path: Path) -> Pieces:
    """Raises ValueError for a file that is no SentencePiece BPE model."""
    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                texts.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, NORMAL))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                rules = dict(_fields(value))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path} is truncated or no SentencePiece model: {error}") from None
    if trainer.get(3, 1) != 2:
        raise ValueError(
            f"{path} is no SentencePiece BPE model: expected ChatGLM's tokenizer.model"
        )
    if len(set(texts)) != len(texts) or UNUSED in types:
        raise ValueError(f"{path} has double or unused pieces, which no ChatGLM tokenizer has")
    return Pieces(
        texts, scores, types, rules.get(2, b""), bool(rules.get(3, 1)), bool(rules.get(4, 1))
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers for varints, bytes for the rest."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"unknown wire type {kind}")
        size = {1: 8, 5: 4}.get(kind) or varint() if kind != 2 else varint()
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes goes past the end")
        yield key >> 3, data[at : at + size]
        at += size


def read_ranks(path: Path) -> dict[bytes, int]:
    """A tiktoken file: a line has a token in base64 and its rank. Raises ValueError for another."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().split(b"\n"):
            if line.strip():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise ValueError(f"{path} is no list of tiktoken ranks") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise ValueError(f"{path} is truncated: its {len(ranks)} ranks are not 0, 1, 2, ...")
    return ranks


def merge_bytes(ranks: Mapping[bytes, int], word: bytes, below: int) -> list[bytes]:
    """Joins the pair of lowest rank, the leftmost of equals, while there is one under `below`."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        rank, at = min(
            (ranks.get(parts[i] + parts[i + 1], below), i) for i in range(len(parts) - 1)
        )
        if rank >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def merge_pieces(pieces: Pieces, text: str) -> list[str]:
    """SentencePiece's algorithm, plainly: joins the pair of best score, leftmost of equals."""
    score = {
        piece: score
        for piece, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True)
        if kind in (NORMAL, USER_DEFINED)
    }
    whole = sorted(pieces.of_type(USER_DEFINED), key=len, reverse=True)
    parts: list[str] = []
    at = 0
    while at < len(text):
        parts.append(next((piece for piece in whole if text.startswith(piece, at)), text[at]))
        at += len(parts[-1])
    fixed = set(whole)
    while True:
        pairs = [
            (-score[left + right], i)
            for i, (left, right) in enumerate(pairwise(parts))
            if left + right in score and left not in fixed and right not in fixed
        ]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def is_tiktoken(path: Path) -> bool:
    """GLM-4's file begins with a line of base64 and a number, SentencePiece's with a message."""
    with path.open("rb") as file:
        first = file.read(200).split(b"\n")[0].split()
    return len(first) == 2 and first[1].isdigit()
