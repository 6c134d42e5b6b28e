"""Chat templates: ids and masks against texts written out by hand and against transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slap_ds.data.encoding import Encoded, Template
from slap_ds.data.formats import Conversation, Message, read_conversations
from slap_ds.data.templates import TEMPLATES, make_template
from tests.small_tokenizers import (
    CHATML,
    DATA_DIR,
    LLAMA2,
    LLAMA3,
    byte_tokenizer,
    needs_data,
    real_tokenizer,
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


@pytest.mark.parametrize("name", CASES)
def test_auto_finds_the_same_answers_as_the_built_in(name: str) -> None:
    tokenizer = CASES[name][0] if name != "llama2" else SPACED
    built = make_template(name, tokenizer)
    auto = own(built.chat_template, tokenizer)
    for talk in (TALK, TALK[1:], TALK[:3], TALK[:4]):
        assert auto.encode(talk) == built.encode(talk)
    assert auto.encode_prompt(TALK[:4]) == built.encode_prompt(TALK[:4])
    tokenizer.chat_template = None


def test_auto_keeps_the_prompt_whole_where_an_answer_would_merge_with_it() -> None:
    tokenizer = byte_tokenizer(CHATML, MERGES)
    auto = own(TEMPLATES["chatml"].chat_template, tokenizer)
    talk = (*TALK[:2], Message("assistant", "\nHello."), *TALK[3:])
    encoded = auto.encode(talk)
    assert encoded == make_template("chatml", tokenizer).encode(talk)
    assert spans(encoded)[0] == plain(tokenizer, "\nHello.<|im_end|>")
    whole = tokenizer.apply_chat_template(as_dicts(talk))["input_ids"]
    assert tokenizer.decode(whole) == tokenizer.decode(encoded.ids)
    assert len(whole) < len(encoded.ids)


@settings(max_examples=60, deadline=None)
@given(talk=talks)
def test_auto_refuses_special_tokens_in_texts_and_changes_no_other(
    talk: tuple[Message, ...],
) -> None:
    (result,) = AUTO.encode_batch([talk])
    if any(token in message.content for token in CHATML for message in talk):
        assert isinstance(result, ValueError)
        assert "would turn into a control token" in str(result)
    else:
        assert isinstance(result, Encoded)
        assert result.ids.count(1) == result.ids.count(2) == len(talk)
        assert len(spans(result)) == len(talk) // 2


AUTO = own(TEMPLATES["chatml"].chat_template, byte_tokenizer(CHATML, MERGES))


def test_auto_refuses_what_only_becomes_special_on_the_way() -> None:
    template = TEMPLATES["chatml"].chat_template.replace(
        "message['content']", "message['content'].replace('~', '')"
    )
    with pytest.raises(ValueError, match="leaves out or changes the text of message 1"):
        own(template).encode((Message("user", "<|im_~end|>"), Message("assistant", "a")))


def test_auto_says_what_is_wrong_with_a_chat_template() -> None:
    message = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    loop = "{% for message in messages %}" + message + "{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    assert own(loop + prompt).stop_ids == (2,)
    last_only = "{% for message in messages %}{% if loop.last %}LAST{% endif %}" + message
    with pytest.raises(ValueError, match="cannot be told apart: name a built-in"):
        own(last_only + "{% endfor %}" + prompt)
    with pytest.raises(ValueError, match="without a special token"):
        own(
            loop.replace("<|im_end|>", "").replace("<|im_start|>", "#")
            + prompt.replace("<|im_start|>", "#")
        )
    with pytest.raises(ValueError, match="refuses this: roles"):
        own("{{ raise_exception('roles') }}" + loop + prompt)
    no_system = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    strict = own(no_system + loop + prompt)
    assert len(spans(strict.encode(TALK[1:]))) == 2
    with pytest.raises(ValueError, match="refuses this: no system"):
        strict.encode(TALK)


def test_auto_writes_no_date_of_today() -> None:
    dated = "{{ strftime_now('%d %b %Y') + ' ' + strftime_now('%Y-%m-%d') }}"
    template = own(dated + TEMPLATES["chatml"].chat_template)
    text = byte_tokenizer(CHATML).decode(template.encode(TALK).ids)
    assert text.startswith("26 Jul 2024 2024-07-26<|im_start|>system")


def test_the_fingerprint_tells_templates_and_tokenizers_apart() -> None:
    tokenizer = byte_tokenizer(CHATML)
    before = make_template("chatml", tokenizer).fingerprint()
    tokenizer(["abc"], truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert make_template("chatml", tokenizer).fingerprint() == before
    assert make_template("chatml", byte_tokenizer(CHATML)).fingerprint() == before
    others = [
        make_template("chatml", byte_tokenizer(CHATML, MERGES)).fingerprint(),
        make_template("chatml", byte_tokenizer((*CHATML, "<x>"))).fingerprint(),
        own(TEMPLATES["chatml"].chat_template).fingerprint(),
        own("{# another #}" + TEMPLATES["chatml"].chat_template).fingerprint(),
        make_template("llama3", byte_tokenizer(LLAMA3)).fingerprint(),
    ]
    assert len({before, *others}) == 6


def real_talks(path: Path, count: int) -> list[tuple[Message, ...]]:
    rows = [row for row in read_conversations([str(path)]) if isinstance(row, Conversation)]
    return [row.messages for row in rows[:count]]


@needs_data
def test_real_conversations_against_transformers() -> None:
    tokenizer: Any = real_tokenizer()
    template = make_template("chatml", tokenizer)
    auto = own(template.chat_template, tokenizer)
    files = sorted(DATA_DIR.glob("*/*.jsonl.gz"))
    assert files
    for path in files:
        talk = real_talks(path, 60)
        expected = tokenizer.apply_chat_template([as_dicts(row) for row in talk])["input_ids"]
        found = template.encode_batch(talk)
        assert [row.ids for row in found if isinstance(row, Encoded)] == expected
        assert auto.encode_batch(talk[:15]) == found[:15]
        for row, messages in zip(found, talk, strict=True):
            assert isinstance(row, Encoded)
            answers = [m.content for m in messages if m.role == "assistant"]
            texts = [tokenizer.decode(span) for span in spans(row)]
            assert texts == [f"{answer}<|im_end|>" for answer in answers]
