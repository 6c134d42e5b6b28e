"""The tokenizer's own chat template: `data.template: auto`."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from slap_ds.data.encoding import Encoded
from slap_ds.data.formats import Conversation, Message, read_conversations
from slap_ds.data.templates import TEMPLATES, make_template
from tests.data.test_templates import (
    CASES,
    MERGES,
    SPACED,
    TALK,
    as_dicts,
    own,
    plain,
    spans,
    talks,
)
from tests.small_tokenizers import (
    CHATML,
    DATA_DIR,
    LLAMA3,
    byte_tokenizer,
    needs_data,
    real_tokenizer,
)


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
