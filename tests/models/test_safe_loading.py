"""Nothing that is loaded can run code, and no secret of the environment gets into a run's files."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from slap_ds.checkpoint import find as checkpoint
from slap_ds.checkpoint.export import export
from slap_ds.checkpoint.find import newest
from slap_ds.cli import main
from slap_ds.distributed.comm import Comm
from slap_ds.engine.tensor_files import file_fact, read_tensors
from slap_ds.engine.whole_state import open_whole, whole_weights
from tests.recipes import run_config, tiny_config, tiny_model


class Hostile:
    """Unpickled freely, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "code-ran"
    pickle.loads(pickle.dumps(Hostile(path)))
    assert path.exists(), "the hostile pickle must work where nothing holds it up"
    path.unlink()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def config(model, run_dir, **sections):
    sections = {"steps": 2, "data": {"eval": []}, "engine": {"kind": "torch"}, **sections}
    return tiny_config(model, run_dir, **sections)


def _reseal(found: checkpoint.Checkpoint) -> None:
    """What somebody does who can write the folder: the manifest fits the hostile file."""
    manifest = dict(found.manifest)
    manifest["files"] = {
        name: vars(file_fact(found.folder / name)) for name in found.manifest["files"]
    }
    sealed = checkpoint.sealed(manifest)
    (found.folder / "manifest.json").write_text(json.dumps(sealed, sort_keys=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_file_is_refused_and_not_run(zipped, trace, tmp_path):
    path = tmp_path / "shard.pt"
    torch.save({"x": Hostile(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"shard.pt is refused") as told:
        read_tensors(path)
    assert "\n" not in str(told.value)
    assert not trace.exists()


def test_a_run_refuses_a_hostile_shard_and_does_not_run_it(model, trace, tmp_path):
    again = config(model, tmp_path / "run")
    run_config(again)
    found = newest(tmp_path / "run", Comm())
    torch.save({"model": Hostile(trace)}, found.folder / "torch.pt")
    _reseal(found)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000001", ignore_errors=True)
    assert newest(tmp_path / "run", Comm()).step == found.step
    for work in (
        lambda: run_config(again),
        lambda: whole_weights(found.folder),
        lambda: export(tmp_path / "run", tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"torch.pt is refused"):
            work()
    assert not trace.exists()


@pytest.mark.parametrize("part", ["optim_states", "model_states"])
def test_a_hostile_zero_shard_is_refused_and_not_run(part, trace, tmp_path):
    folder = tmp_path / "engine"
    folder.mkdir()
    state = {"module": {}, "buffer_names": [], "shared_params": {}, "param_shapes": [{}]}
    torch.save(state, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save(
        {"optimizer_state_dict": Hostile(trace)} if part == "optim_states" else Hostile(trace),
        folder / f"zero_pp_rank_0_mp_rank_00_{part}.pt",
    )
    with pytest.raises(ValueError, match=rf"{part}.pt is refused"):
        open_whole(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("python", ["this one", "3.11.2"])
def test_deepspeed_reads_its_files_through_the_same_door(python, trace, tmp_path, monkeypatch):
    """The object it loads with takes its own classes, and nothing else."""
    from slap_ds.engine.tensor_files import TensorWriter
    from slap_ds.engine.zero import tensor_files

    pytest.importorskip("deepspeed")
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if python == "3.11.2":  # and its neighbours reduce a member of an enum to a call of getattr
        reduce = lambda stage, protocol: (getattr, (ZeroStageEnum, stage.name))  # noqa: E731
        monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", reduce)
    files = tensor_files(TensorWriter())
    state = {"zero_stage": ZeroStageEnum.weights, "scaler": LossScaler(scale=1.0)}
    files.save(state, str(tmp_path / "good.pt"))
    found = files.load(str(tmp_path / "good.pt"))
    assert found["zero_stage"] is ZeroStageEnum.weights
    assert isinstance(found["scaler"], LossScaler)
    assert found["scaler"].cur_scale == 1.0
    torch.save({"x": Hostile(trace)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt is refused"):
        files.load(str(tmp_path / "bad.pt"))
    assert not trace.exists()


def test_a_pickled_model_is_refused(model, trace, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Hostile(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        run_config(config(str(folder), tmp_path / "run"))
    assert not trace.exists()


def test_a_model_with_code_of_its_own_is_not_run(model, trace, tmp_path):
    folder = tmp_path / "coded"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "hostile", "auto_map": {"AutoConfig": "hostile.HostileConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "hostile.py").write_text(f"open({str(trace)!r}, 'w')\nclass HostileConfig: pass\n")
    with pytest.raises(ValueError, match=r"\w"):
        run_config(config(str(folder), tmp_path / "run"))
    assert not trace.exists()


CANARIES = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret",
    "WANDB_API_KEY": "canarywandb0123456789",
}


def test_no_secret_of_the_environment_is_in_any_file_or_in_the_output(
    model, tmp_path, monkeypatch, capfd
):
    for name, secret in CANARIES.items():
        monkeypatch.setenv(name, secret)
    run_config(config(model, tmp_path / "run", checkpoint={"every": 1}))
    out, err = capfd.readouterr()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 8
    texts = {str(path): path.read_bytes() for path in files}
    texts |= {"stdout": out.encode(), "stderr": err.encode()}
    for where, text in texts.items():
        for name, secret in CANARIES.items():
            assert secret.encode() not in text, f"{name} in {where}"


def test_a_password_in_a_data_address_is_not_repeated(model, tmp_path, capfd):
    path = "https://user:canary-password@host.example/data.jsonl"
    (tmp_path / "run.yaml").write_text(
        f"run_dir: {tmp_path / 'run'}\nsteps: 1\nengine: {{kind: torch}}\n"
        f"model: {{path: {model}, tokenizer: 'builtin:demo'}}\n"
        f"data: {{train: ['{path}'], max_tokens: 256}}\n"
    )
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "run.yaml")])
    out, err = capfd.readouterr()
    assert "addresses are not read" in err
    assert "https://***@host.example" in err
    assert "canary-password" not in out + err
    written = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not any(b"canary-password" in file.read_bytes() for file in written)
