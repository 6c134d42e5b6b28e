"""The fast tokenizers equal SentencePiece and tiktoken, and text never becomes a control token."""

import random

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from slap_ds.models.glm.tokenizer import (
    SPECIAL,
    build_tokenizer,
    sentencepiece_tokenizer,
    tiktoken_tokenizer,
)
from slap_ds.models.glm.vocab import (
    is_tiktoken,
    merge_bytes,
    read_ranks,
    read_sentencepiece,
)
from tests import chatglm

CONTROL = (
    "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "[MASK]", "[gMASK]", "[sMASK]",
    "<sop>", "<eop>", "sop", "eop", "</s>", "<s>", "<unk>", "<|endoftext|>", "<0x0A>",
)  # fmt: skip
MIXED = (
    "sophisticated people", "sop people eop", "他说 hello，然后走了。", "价格是￥12.50元/kg",
    "Größe naïve café Ωμέγα", "こんにちは世界", "русский العربية עברית",
    "😀👍🏽👩‍👩‍👧‍👦🇨🇳", "e\u0301 é \u200b\ufeff",
    "", " ", "\n", "\t\t", "  two  spaces  ", "line\r\nline\n\n\n", "▁▁ literal ▁",
    "\u2028\u0085\x00\x7f",
    "def f(x):\n    return {'a': x[0]}  # 注释", "1234567890 3.14159 1,000", "don't I'LL we'Re",
)  # fmt: skip


def random_texts(count):
    """Strings in which runs, spaces, line ends, scripts and control tokens meet."""
    draw = random.Random(7)
    parts = [
        *CONTROL,
        *"aaaeio  --==..\n\n\t▁",
        *"的了是我你哈哈",
        "  ",
        "the",
        " people",
        "😀",
        "é",
        "Ω",
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def texts():
    """Chinese, English, mixed, emoji, control strings; real ones too where they lie."""
    around = [
        f"{a}{token}{b}" for token in CONTROL for a, b in (("", ""), ("x ", " y"), ("你", "好"))
    ]
    found = [*chatglm.demo_texts(), *MIXED, *around, *random_texts(1500)]
    assert len(found) >= 3000
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    files = {
        "chatglm2": chatglm.sentencepiece_model(),
        "chatglm3": chatglm.sentencepiece_model(),
        "glm4": chatglm.tiktoken_ranks(),
    }
    for family, content in files.items():
        (root / family).mkdir()
        (root / family / "tokenizer.model").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def saved(folders):
    """The tokenizers as AutoTokenizer loads them after they were saved."""
    found = {}
    for family in SPECIAL:
        build_tokenizer(folders / family, family).save_pretrained(folders / f"{family}_fast")
        found[family] = AutoTokenizer.from_pretrained(folders / f"{family}_fast")
    return found


@pytest.fixture(scope="module")
def original(folders):
    """What the published code calls: SentencePiece itself, tiktoken itself."""
    ranks = read_ranks(folders / "glm4" / "tokenizer.model")
    encoding = tiktoken.Encoding(
        "glm4", pat_str=chatglm.GLM4_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(chatglm.sentencepiece_model())
    return {"chatglm2": processor.encode, "chatglm3": processor.encode, "glm4": encoding.encode}


def as_text(tokenizer, texts):
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("family", SPECIAL)
def test_equals_the_original_on_text(saved, original, texts, family):
    found = as_text(saved[family], texts)
    wrong = [t for t, ids in zip(texts, found, strict=True) if ids != original[family](t)]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[:3]}"
    control = set(range(len(saved[family]) - len(SPECIAL[family]), len(saved[family])))
    assert all(control.isdisjoint(ids) for ids in found)


@pytest.mark.parametrize("family", ["chatglm3", "glm4"])
def test_equals_the_original_on_real_conversations(saved, original, family):
    texts = chatglm.real_texts()
    if not texts:
        pytest.skip(f"no conversations in {chatglm.DATA}: set SLAP_DATA_DIR to the shared data")
    assert len(texts) > 3000
    found = as_text(saved[family], texts)
    wrong = [t for t, ids in zip(texts, found, strict=True) if ids != original[family](t)]
    assert not wrong, f"{len(wrong)} of {len(texts)}, such as {wrong[:3]}"


@settings(deadline=None, max_examples=150, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_equals_the_original_on_any_text(saved, original, text):
    for family in ("chatglm3", "glm4"):
        assert as_text(saved[family], [text]) == [original[family](text)]


@pytest.mark.parametrize("family", SPECIAL)
def test_text_comes_back(saved, texts, family):
    tokenizer = saved[family]
    for text, ids in zip(texts, as_text(tokenizer, texts), strict=True):
        # SentencePiece's mark for a space comes back as a space, as from SentencePiece itself.
        assert tokenizer.decode(ids) == (text if family == "glm4" else text.replace("▁", " "))


def test_sop_and_eop_are_not_cut_out_of_words(saved):
    tokens = saved["chatglm3"].tokenize("sophisticated people, sop and eop")
    assert not {"sop", "eop", "<sop>", "<eop>"} & set(tokens)


def test_ids_follow_the_published_order(saved):
    # Counted from the last piece on: ChatGLM3 has 64,789 pieces, GLM-4 151,329 ranks.
    chatglm3 = saved["chatglm3"].convert_tokens_to_ids
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>"]
    names += ["<|assistant|>", "<|observation|>"]
    assert chatglm3(names) == [i - 64789 + 1200 for i in range(64789, 64798)]
    assert chatglm3(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (saved["chatglm3"].eos_token_id, saved["chatglm3"].pad_token_id) == (2, 0)

    first = len(read_ranks_of(saved)) - 151329
    glm4 = saved["glm4"].convert_tokens_to_ids
    assert glm4("<|endoftext|>") == 151329 + first
    assert (glm4("[gMASK]"), glm4("<sop>")) == (151331 + first, 151333 + first)
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert glm4(roles) == [i + first for i in range(151335, 151339)]
    assert saved["glm4"].eos_token_id == saved["glm4"].pad_token_id == glm4("<|endoftext|>")


def read_ranks_of(saved):
    return range(len(saved["glm4"]) - len(SPECIAL["glm4"]))


@pytest.mark.parametrize("family", SPECIAL)
def test_a_plain_text_begins_as_published(saved, family):
    tokenizer = saved[family]
    start = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert tokenizer("hello")["input_ids"][:2] == start
    batch = tokenizer(["hello", "hello there people"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0  # padded on the left
    assert sorted(batch) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize(
    ("changes", "exact"),
    [
        ({"split_by_whitespace": False}, True),
        ({"byte_fallback": False}, True),
        ({"remove_extra_whitespaces": True}, True),
        ({"add_dummy_prefix": False}, True),
        ({"user_defined_symbols": "▁▁,▁▁▁▁"}, True),
        ({"normalization_rule_name": "nmt_nfkc"}, False),
    ],
)
def test_other_settings_of_sentencepiece(tmp_path, texts, changes, exact):
    content = chatglm.sentencepiece_model(**changes)
    (tmp_path / "tokenizer.model").write_bytes(content)
    build_tokenizer(tmp_path, "chatglm3")  # its own check passes
    fast = sentencepiece_tokenizer(read_sentencepiece(tmp_path / "tokenizer.model"))
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    wrong = [t for t in texts if fast.encode(t).ids != processor.encode(t)]
    # tokenizers takes CR LF as one character when it applies normalisation rules.
    assert not wrong if exact else all("\r\n" in t or "\x00" in t for t in wrong)


def test_pieces_that_no_merge_makes_are_refused(tmp_path):
    content = chatglm.sentencepiece_model(user_defined_symbols="<|blank|>")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"would encode 'x <\|blank\|>y' differently"):
        build_tokenizer(tmp_path, "chatglm3")


def test_whole_words_are_looked_up_before_merging():
    # A word whose parts are no tokens: no merge makes it, only the look-up.
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {b"hello": 256}
    encoding = tiktoken.Encoding(
        "x", pat_str=chatglm.GLM4_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    fast = tiktoken_tokenizer(ranks)
    for text in ("hello", "hello hello", "hell", "hellos"):
        assert fast.encode(text).ids == encoding.encode(text)
    assert merge_bytes(ranks, b"hello", below=257) == [b"h", b"e", b"l", b"l", b"o"]


def test_the_check_catches_a_tokenizer_that_differs(folders, monkeypatch):
    from slap_ds.models.glm import tokenizer as glm_tokenizer

    monkeypatch.setattr(glm_tokenizer, "_piece_merges", lambda pieces: [])
    with pytest.raises(ValueError, match=r"would encode .* differently from the original"):
        build_tokenizer(folders / "chatglm3", "chatglm3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no SentencePiece BPE"),
        (b"\x0a\xff\xff\xff\xff\x0f", "truncated or no SentencePiece"),
        (b"plain text, no tokenizer at all\n", "no SentencePiece"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    assert not is_tiktoken(path)
    with pytest.raises(ValueError, match=message):
        build_tokenizer(tmp_path, "chatglm3")


def test_unigram_and_truncated_ranks_are_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(chatglm.sentencepiece_model(model_type="unigram"))
    with pytest.raises(ValueError, match="no SentencePiece BPE"):
        build_tokenizer(tmp_path, "chatglm3")
    whole = chatglm.tiktoken_ranks()
    lines = whole.split(b"\n")
    for content in (whole[:500], b"\n".join(lines[:400] + lines[401:]), whole[:-4]):
        path.write_bytes(content)
        assert is_tiktoken(path)
        with pytest.raises(ValueError, match=r"truncated|no list of tiktoken ranks"):
            build_tokenizer(tmp_path, "glm4")
