"""What is stored of a conversation: its ids and mask under the length rule, and their hash.

`truncate` cuts the end off at `max_tokens`, and a sample that loses all its trained tokens by that
is dropped; `drop` leaves over-long samples out.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from slap_ds.config.schema import DataConfig
from slap_ds.data.encoding import Encoded, Template
from slap_ds.data.sources import Limits


@dataclass(frozen=True, slots=True)
class Cut:
    """An encoded conversation as it is stored."""

    ids: npt.NDArray[np.uint32]  # (len,) token ids
    mask: bytes  # one byte a token
    trained: int  # tokens predicted with loss
    content: int  # 63-bit hash of ids and mask


def cut(encoded: Encoded, max_tokens: int, over_length: str) -> Cut | str:
    """The sample under the length rule, or why there is none: "too long", "no trained tokens"."""
    if len(encoded.ids) > max_tokens and over_length == "drop":
        return "too long"
    ids = np.array(encoded.ids[:max_tokens], dtype="<u4")
    mask = bytes(encoded.mask[:max_tokens])
    trained = sum(mask[1:])  # nothing predicts the first token
    if trained == 0:
        return "no trained tokens"
    return Cut(ids, mask, trained, content_hash(ids, mask))


def content_hash(ids: npt.NDArray[np.integer], mask: bytes) -> int:
    """63 bits of (len,) token ids and their mask, one byte a token: equal for equal samples."""
    digest = hashlib.blake2b(ids.astype("<u4").tobytes() + mask, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Rules:
    """How rows became samples: what `build_store` was given beside the paths."""

    format: str
    template: Template
    max_tokens: int
    over_length: Literal["truncate", "drop"]
    limits: Limits

    @classmethod
    def of(cls, data: DataConfig, template: Template) -> Rules:
        """Those of a run."""
        limits = Limits(data.max_row_bytes, data.max_depth)
        return cls(data.format, template, data.max_tokens, data.over_length, limits)

    @property
    def token_type(self) -> str:
        """How a token id is stored."""
        return "<u2" if self.template.vocab_size <= 2**16 else "<u4"

    def sample(self, encoded: Encoded | ValueError) -> Cut | None:
        """What is stored of an encoded conversation, if anything is."""
        if isinstance(encoded, ValueError):
            return None
        found = cut(encoded, self.max_tokens, self.over_length)
        return None if isinstance(found, str) else found
