"""Generation settings of an export: the base's, valid, with the stop tokens of training."""

import json
from pathlib import Path

import pytest
from transformers import GenerationConfig

from slap_ds.checkpoint.generation import generation_config
from tests.models.test_reuse import small


def written(base: Path, settings: dict[str, object]) -> str:
    (base / "generation_config.json").write_text(json.dumps(settings))
    return str(base)


def test_the_settings_of_the_base_are_kept(tmp_path: Path) -> None:
    base = written(tmp_path, {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.05})
    found = generation_config(base, small(), [7, 8])
    assert (found.temperature, found.repetition_penalty) == (0.6, 1.05)
    assert found.eos_token_id == [7, 8]


def test_sampling_values_without_sampling_are_mended_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = written(tmp_path, {"temperature": 0.9, "top_p": 0.6})
    found = generation_config(base, small(), [7])
    found.save_pretrained(tmp_path / "out")
    again = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (again.do_sample, again.temperature, again.eos_token_id) == (True, 0.9, [7])
    assert "do_sample: it is set to true" in capsys.readouterr().err


def test_a_base_without_settings_gets_the_model_s(tmp_path: Path) -> None:
    assert generation_config(str(tmp_path), small(), [3]).eos_token_id == [3]
    assert generation_config(None, small(), None).eos_token_id == small().config.eos_token_id
