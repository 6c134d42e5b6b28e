"""The fast tokenizer of a ChatGLM2, ChatGLM3 or GLM-4 folder, built from its `tokenizer.model`.

tokenizer.model -> pieces with scores (SentencePiece), or bytes with ranks (tiktoken)
                -> merges -> tokenizers.Tokenizer -> special tokens, chat template
                -> check: samples encoded by it and by the plain algorithm must agree
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from slap_ds.data.glm_templates import GLM_TEMPLATES
from slap_ds.models.glm.vocab import (
    BYTE,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Pieces,
    merge_bytes,
    merge_pieces,
    read_ranks,
    read_sentencepiece,
)

Family = Literal["chatglm2", "chatglm3", "glm4"]

SPACE = "▁"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
# ChatGLM names two of them `sop` and `eop`. As plain words they would be cut out of "sophisticated"
# and "people", so they get GLM-4's names here; the ids are what the model knows.
_MASKS = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
_MEDIA = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
# In the order of their ids, which follow those of the pieces.
SPECIAL: dict[Family, tuple[str, ...]] = {
    "chatglm2": _MASKS,
    "chatglm3": _MASKS + _ROLES,
    "glm4": ("<|endoftext|>", *_MASKS, *_ROLES, *_MEDIA),
}
_GLM4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLES = (
    "sophisticated people stop at the shop, don't they?  It's 12345 o'clock.",
    "你好，世界！今天天气怎么样？",
    "def f(x):\n    return x ** 2\n\n\tprint(f(3))\r\n",
    "ChatGLM3 是清华技术成果转化的公司智谱 AI 研发的，支持 128K 上下文。",
    "<|user|> [gMASK]<sop></s><unk><0x0A> are only text here",
    "emoji 😀👩‍👩‍👧 and accents: naïve café, Größe, 日本語, русский, العربية",
    "   spaces   before,  between and after   ",
    "aaaaaaaaaaaaa ---------- \n\n\n\n ▁▁",
)


def sentencepiece_tokenizer(pieces: Pieces) -> Tokenizer:
    """The same encoding as SentencePiece, special tokens apart."""
    ids = {text: i for i, text in enumerate(pieces.texts)}
    tokenizer = Tokenizer(
        BPE(
            ids,
            _piece_merges(pieces),
            unk_token=pieces.of_type(UNKNOWN)[0],
            fuse_unk=True,
            byte_fallback=bool(pieces.of_type(BYTE)),
        )
    )
    # Not Metaspace: that would split the text at spaces, and lose pieces with spaces inside.
    steps: list[Any] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.one_space:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" +"), " "))
    if pieces.prefix_space:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if pattern := _whole_pattern(pieces):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*back, decoders.Strip(" ", 1, 0)] if pieces.prefix_space else back
    )
    return tokenizer


def _piece_merges(pieces: Pieces) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first.

    SentencePiece joins the pair with the best score, of equals the leftmost. Where a piece can be
    made in two ways (runs of one character) it finds the longer left part first.
    """
    score = {
        text: float("inf") if kind == USER_DEFINED else score
        for text, score, kind in zip(pieces.texts, pieces.scores, pieces.types, strict=True)
        if kind in (NORMAL, USER_DEFINED)
    }
    found = [
        (-score[text], -cut, text[:cut], text[cut:])
        for text in score
        for cut in range(1, len(text))
        if text[:cut] in score and text[cut:] in score
    ]
    return [(left, right) for _, _, left, right in sorted(found)]


def _whole_pattern(pieces: Pieces) -> str:
    """Matches the pieces that are cut out of a text before anything is merged."""
    whole = sorted(pieces.of_type(USER_DEFINED), key=len, reverse=True)
    return "|".join(
        "".join(char if char.isalnum() else f"\\x{{{ord(char):X}}}" for char in text)
        for text in whole
    )


def tiktoken_tokenizer(ranks: Mapping[bytes, int]) -> Tokenizer:
    """The same encoding as tiktoken with GLM-4's word pattern, special tokens apart."""
    shown = _byte_letters()

    def show(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = merge_bytes(ranks, token, below=rank)
        if len(parts) == 2:
            merges.append((show(parts[0]), show(parts[1])))
    # tiktoken looks a whole word up before it merges.
    model = BPE({show(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GLM4_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_letters() -> list[str]:
    """The visible letter that stands for each byte in a byte-level tokenizer."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def build_tokenizer(folder: Path, family: Family) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder, ready to be saved.

    Raises FileNotFoundError without a tokenizer.model, ValueError for one that cannot be read or
    whose fast form encodes a sample differently.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no tokenizer.model: copy it there from the published checkpoint"
        )
    if family == "glm4":
        ranks = read_ranks(path)
        tokenizer = tiktoken_tokenizer(ranks)
        _check(tokenizer, lambda text: _tiktoken_ids(tokenizer, ranks, text), _SAMPLES, path)
        end = pad = unknown = "<|endoftext|>"
    else:
        pieces = read_sentencepiece(path)
        tokenizer = sentencepiece_tokenizer(pieces)
        samples = [*_SAMPLES, *(f"x {piece}y" for piece in pieces.of_type(USER_DEFINED))]
        _check(tokenizer, lambda text: _sentencepiece_ids(tokenizer, pieces, text), samples, path)
        end, pad, unknown = "</s>", "<unk>", "<unk>"
    count = tokenizer.get_vocab_size()
    special = [
        token for token in ("<unk>", "<s>", "</s>") if tokenizer.token_to_id(token) is not None
    ]
    special += SPECIAL[family]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    ids = {token: tokenizer.token_to_id(token) for token in ("[gMASK]", "<sop>")}
    if [tokenizer.token_to_id(t) for t in SPECIAL[family]] != [
        *range(count, count + len(SPECIAL[family]))
    ]:
        raise ValueError(f"{path} has pieces named like control tokens: is it the published file?")
    tokenizer.post_processor = TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B", special_tokens=list(ids.items())
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=pad,
        unk_token=unknown,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.chat_template = GLM_TEMPLATES[family].chat_template
    return fast


def _check(
    tokenizer: Tokenizer, plain: Callable[[str], list[int]], samples: Sequence[str], path: Path
) -> None:
    for text in samples:
        if tokenizer.encode(text, add_special_tokens=False).ids != plain(text):
            raise ValueError(
                f"{path}: the fast tokenizer would encode {text!r} differently from the original,"
                " so this is not a tokenizer of the known kind: use the published file"
            )


def _sentencepiece_ids(tokenizer: Tokenizer, pieces: Pieces, text: str) -> list[int]:
    ids = {piece: i for i, piece in enumerate(pieces.texts)}
    normal = tokenizer.normalizer.normalize_str(text)
    found: list[int] = []
    for part in merge_pieces(pieces, normal):
        if part in ids and pieces.types[ids[part]] in (NORMAL, USER_DEFINED):
            found.append(ids[part])
        elif pieces.of_type(BYTE):
            found += [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        else:
            unknown = ids[pieces.of_type(UNKNOWN)[0]]
            found += [] if found[-1:] == [unknown] else [unknown]
    return found


def _tiktoken_ids(tokenizer: Tokenizer, ranks: Mapping[bytes, int], text: str) -> list[int]:
    words = pre_tokenizers.Split(Regex(_GLM4_WORDS), "isolated").pre_tokenize_str(text)
    return [
        ranks[part]
        for word in (word.encode() for word, _ in words)
        for part in ([word] if word in ranks else merge_bytes(ranks, word, below=len(ranks)))
    ]
