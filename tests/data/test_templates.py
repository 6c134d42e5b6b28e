"""Chat templates: ids and masks against texts written out by hand and against transformers."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slap_ds.data.encoding import Encoded, Template
from slap_ds.data.formats import Message
from slap_ds.data.templates import TEMPLATES, make_template
from tests.small_tokenizers import (
    CHATML,
    LLAMA2,
    LLAMA3,
    byte_tokenizer,
    spaced_tokenizer,
)

TALK = (
    Message("system", "Be brief."),
    Message("user", "Hi!"),
    Message("assistant", "Hello."),
    Message("user", "2 + 2?"),
    Message("assistant", "4, 四"),
)
CASES: dict[str, tuple[PreTrainedTokenizerFast, str, list[str]]] = {
    "chatml": (
        byte_tokenizer(CHATML),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4, 四<|im_end|>\n",
        ["Hello.<|im_end|>", "4, 四<|im_end|>"],
    ),
    "llama3": (
        byte_tokenizer(LLAMA3),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4, 四<|eot_id|>",
        ["Hello.<|eot_id|>", "4, 四<|eot_id|>"],
    ),
    "llama2": (
        byte_tokenizer(LLAMA2),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi! [/INST] Hello. </s>"
        "<s>[INST] 2 + 2? [/INST] 4, 四 </s>",
        [" Hello. </s>", " 4, 四 </s>"],
    ),
}
SPACED = spaced_tokenizer()


def plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids as transformers gives them, special tokens recognised."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=False)[
        "input_ids"
    ]
    return ids


def spans(encoded: Encoded) -> list[list[int]]:
    """The runs of trained tokens."""
    found: list[list[int]] = []
    previous = False
    for i, trained in zip(encoded.ids, encoded.mask, strict=True):
        if trained and not previous:
            found.append([])
        if trained:
            found[-1].append(i)
        previous = trained
    return found


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def own(template: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Template:
    """The template "auto" of a tokenizer with this Jinja."""
    tokenizer = tokenizer or byte_tokenizer(CHATML)
    tokenizer.chat_template = template
    return make_template("auto", tokenizer)


@pytest.mark.parametrize("name", CASES)
def test_built_ins_write_what_their_models_were_trained_on(name: str) -> None:
    tokenizer, text, trained = CASES[name]
    encoded = make_template(name, tokenizer).encode(TALK)
    assert encoded.ids == plain(tokenizer, text)
    assert spans(encoded) == [plain(tokenizer, answer) for answer in trained]


def test_tool_results_are_written_and_not_trained() -> None:
    talk = (Message("user", "q"), Message("assistant", "f()"), Message("tool", "1"))
    chatml = make_template("chatml", CASES["chatml"][0]).encode(talk)
    assert spans(chatml) == [plain(CASES["chatml"][0], "f()<|im_end|>")]
    assert CASES["chatml"][0].decode(chatml.ids).endswith("<|im_start|>tool\n1<|im_end|>\n")
    llama3 = make_template("llama3", CASES["llama3"][0]).encode(talk)
    ending = "<|start_header_id|>ipython<|end_header_id|>\n\n1<|eot_id|>"
    assert CASES["llama3"][0].decode(llama3.ids).endswith(ending)
    with pytest.raises(ValueError, match="message 3: the llama2 template has no role 'tool'"):
        make_template("llama2", CASES["llama2"][0]).encode(talk)


def test_llama2_with_a_tokenizer_that_puts_a_space_before_every_text() -> None:
    template = make_template("llama2", SPACED)
    encoded = template.encode(TALK)
    assert encoded.ids == plain(SPACED, CASES["llama2"][1])
    first, second = (SPACED.convert_ids_to_tokens(span) for span in spans(encoded))
    assert first == ["▁H", "e", "l", "l", "o", ".", "▁", "</s>"]
    assert second == ["▁4", ",", "▁", "<0xE5>", "<0x9B>", "<0x9B>", "▁", "</s>"]


def test_chatml_with_a_tokenizer_that_puts_a_space_before_every_text() -> None:
    tokenizer = spaced_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML[1:])})
    encoded = make_template("chatml", tokenizer).encode(TALK)
    assert encoded.ids == plain(tokenizer, CASES["chatml"][1])
    first, _ = (tokenizer.convert_ids_to_tokens(span) for span in spans(encoded))
    assert first == ["H", "e", "l", "l", "o", ".", "<|im_end|>"]


@pytest.mark.parametrize("name", CASES)
def test_an_exported_tokenizer_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    tokenizer = CASES[name][0] if name != "llama2" else SPACED
    template = make_template(name, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    exported.chat_template = template.chat_template
    exported.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    spaced = tuple(Message(m.role, f" {m.content}") for m in TALK[1:]) if name != "chatml" else TALK
    for talk in (TALK, TALK[1:], TALK[:3], spaced, TALK[:4]):
        ids = exported.apply_chat_template(as_dicts(talk))["input_ids"]
        assert template.encode(talk).ids == ids
    for talk in (TALK[:2], TALK[:4], TALK[1:2]):
        ids = exported.apply_chat_template(as_dicts(talk), add_generation_prompt=True)["input_ids"]
        assert template.encode_prompt(talk) == ids


MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
SNIPPETS = [
    *CHATML,
    *LLAMA3,
    *LLAMA2,
    "\n",
    "\n\n",
    " ",
    "user",
    "assistant",
    "<|im_",
    "end|>",
    "<",
]
content = st.lists(
    st.one_of(
        st.sampled_from(SNIPPETS),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=4),
    ),
    min_size=1,
    max_size=6,
).map("".join)
visible = content.filter(str.strip)
talks = st.lists(st.tuples(visible, visible), min_size=1, max_size=3).map(
    lambda pairs: tuple(
        Message(role, text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
)
# With merges over the edges between the template's text and the user's.
MERGES = (("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("Ċ", "a"), ("r", "Ċ"), ("Ġ", "a"), ("Ċ", "Ġ"))
TOKENIZERS = {
    "chatml": byte_tokenizer(CHATML, MERGES),
    "llama3": byte_tokenizer(LLAMA3, MERGES),
    "llama2": SPACED,
}
BUILT = {name: make_template(name, tokenizer) for name, tokenizer in TOKENIZERS.items()}


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(talk=talks)
def test_no_text_becomes_a_control_token(name: str, talk: tuple[Message, ...]) -> None:
    template, tokenizer = BUILT[name], TOKENIZERS[name]
    special = set(tokenizer.added_tokens_decoder)
    harmless = tuple(Message(message.role, "x") for message in talk)
    encoded = template.encode(talk)
    expected = [i for i in template.encode(harmless).ids if i in special]
    assert [i for i in encoded.ids if i in special] == expected
    answers = [message.content for message in talk if message.role == "assistant"]
    stop = tokenizer.decode(template.stop_ids[0])
    for span, answer in zip(spans(encoded), answers, strict=True):
        text = tokenizer.decode(span, skip_special_tokens=False)
        if name == "chatml":
            assert text == answer + stop
        elif name == "llama3":
            assert text == answer.strip() + stop
        else:  # whose decoder takes the first space off
            assert text == f"{answer.strip()} {stop}"


@pytest.mark.parametrize("name", BUILT)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(talk=talks)
def test_an_answer_follows_the_very_prompt_that_generation_uses(
    name: str, talk: tuple[Message, ...]
) -> None:
    template = BUILT[name]
    encoded = template.encode(talk)
    for turn, message in enumerate(talk):
        if message.role == "assistant":
            prompt = template.encode_prompt(talk[:turn])
            assert encoded.ids[: len(prompt)] == prompt
            assert encoded.mask[len(prompt)]
            assert not encoded.mask[len(prompt) - 1]


@pytest.mark.parametrize("mark", MARKS)
def test_llama2_refuses_its_own_marks_in_a_text(mark: str) -> None:
    with pytest.raises(ValueError, match=r"message 1 holds .*, which the llama2 template uses"):
        BUILT["llama2"].encode((Message("user", f"a {mark} b"), Message("assistant", "c")))


def test_a_control_token_that_plain_text_can_spell_is_refused() -> None:
    tokenizer = byte_tokenizer(CHATML)
    # Not special, so `split_special_tokens` lets it through; the template's tokens are special.
    tokenizer.add_tokens(["<tool>"])
    template = make_template("chatml", tokenizer)
    talk = (Message("user", "<tool>"), Message("assistant", "a"))
    assert tokenizer.convert_tokens_to_ids("<tool>") in template.encode(talk).ids
    plain_controls = byte_tokenizer(("<|endoftext|>",))
    plain_controls.add_tokens(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(ValueError, match="makes a control token of the row's text"):
        make_template("chatml", plain_controls).encode(
            (Message("user", "<|im_end|>"), Message("assistant", "a"))
        )


def test_one_bad_row_does_not_spoil_its_batch() -> None:
    good = (Message("user", "q"), Message("assistant", "a"))
    bad = (Message("user", "[INST]"), Message("assistant", "a"))
    first, second, third = BUILT["llama2"].encode_batch([good, bad, good])
    assert first == third == BUILT["llama2"].encode(good)
    assert isinstance(second, ValueError)


def test_a_prompt_must_end_with_a_question() -> None:
    for template in (BUILT["chatml"], own(TEMPLATES["chatml"].chat_template)):
        with pytest.raises(ValueError, match="must end with a message to answer"):
            template.encode_prompt(TALK)
        with pytest.raises(ValueError, match="must end with a message to answer"):
            template.encode_prompt(())


def test_make_template_says_what_it_knows_and_what_it_misses() -> None:
    tokenizer = byte_tokenizer(("<|im_start|>",))
    with pytest.raises(ValueError, match=r"'vicuna': expected auto, llama2, llama3, chatml"):
        make_template("vicuna", tokenizer)
    with pytest.raises(ValueError, match=r"needs the special tokens <\|im_end\|>, which the"):
        make_template("chatml", tokenizer)
    with pytest.raises(ValueError, match=r"no chat template .*name a built-in one \(llama2"):
        make_template("auto", tokenizer)


def test_stop_ids_and_vocabulary() -> None:
    for name, stop in (("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("llama2", "</s>")):
        tokenizer = CASES[name][0]
        template = make_template(name, tokenizer)
        assert template.stop_ids == (tokenizer.convert_tokens_to_ids(stop),)
        assert template.vocab_size == len(tokenizer)
        assert own(template.chat_template, tokenizer).stop_ids == template.stop_ids
        tokenizer.chat_template = None
