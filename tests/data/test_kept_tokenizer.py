"""An exported tokenizer gives the ids of training, or is not exported."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from slap_ds.data.kept_tokenizer import PROBE, check_tokenizer, save_tokenizer
from slap_ds.data.templates import TEMPLATES, make_template
from slap_ds.models.load import load_tokenizer
from tests.small_tokenizers import CHATML, byte_tokenizer, spaced_tokenizer


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["llama2", "chatml"])
def test_where_a_llama_tokenizer_puts_spaces_is_kept(
    legacy: bool, name: str, tmp_path: Path
) -> None:
    made = spaced_tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(CHATML[1:])})
    made.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(str(tmp_path))
    template = make_template(name, tokenizer)
    save_tokenizer(tokenizer, template, tmp_path / "out")
    reloaded: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": m.role, "content": m.content} for m in PROBE]
    ids = template.encode(PROBE).ids
    assert reloaded.apply_chat_template(talk)["input_ids"] == ids
    first = {"llama2": ("▁[", "["), "chatml": ("▁u", "u")}[name]
    assert reloaded.convert_ids_to_tokens(ids[1:2]) == [first[not legacy]]


def test_other_chat_templates_of_the_tokenizer_stay(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    source = TEMPLATES["chatml"].chat_template
    tokenizer.chat_template = {"default": source, "tool_use": "{{ 'tools' }}" + source}
    save_tokenizer(tokenizer, make_template("auto", tokenizer), tmp_path)
    kept = AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert kept == {"default": source, "tool_use": "{{ 'tools' }}" + source}
    assert tokenizer.chat_template == kept


def test_a_tokenizer_that_would_give_other_ids_stops_the_run() -> None:
    tokenizer = byte_tokenizer(CHATML)
    template = make_template("chatml", tokenizer)
    check_tokenizer(tokenizer, template)
    template.jinja = template.jinja.replace("<|im_end|>", " <|im_end|>")
    with pytest.raises(ValueError, match="would give other token ids than those of training: at"):
        check_tokenizer(tokenizer, template)
