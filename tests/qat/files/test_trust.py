"""Folders that somebody else wrote: what is not safetensors or JSON is not read, and nothing outside of them."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import make_llama, save_llama
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from qat.checkpoints.pack import export_checkpoint
from qat.files.trust import check_checkpoint
from training.arguments.model import ModelArguments
from training.start.loading import load_tokenizer
from training.start.start import load_model


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_weights_are_refused_with_a_remedy_that_works(tmp_path):
    model = make_llama()
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle.*convert it once") as error:
        load_model(ModelArguments(str(tmp_path / "model")))
    code = str(error.value).partition('python -c "')[2].partition('"')[0]
    exec(code.replace("NEW_FOLDER", str(tmp_path / "new")), {})
    new = load_model(ModelArguments(str(tmp_path / "new"))).state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret", "sub/x.safetensors"])
def test_an_index_that_points_outside_is_refused(tmp_path, name):
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (lambda folder: load_model(ModelArguments(str(folder))), check_checkpoint):
        with pytest.raises(ValueError, match="does not lie in its folder"):
            read(tmp_path / "model")


def test_code_in_a_model_folder_runs_only_with_the_flag(tmp_path, capsys):
    save_llama(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}, "model_type": "own"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(ModelArguments(str(tmp_path / "model")))
    load_tokenizer(ModelArguments(str(tmp_path / "model")), 64)  # which has no code of its own
    assert not (tmp_path / "ran").exists() and "[y/N]" not in capsys.readouterr().out
    model = load_model(ModelArguments(str(tmp_path / "model"), trust_remote_code=True))
    assert type(model).__name__ == "Own" and (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="--trust_remote_code"):
        export_checkpoint(tmp_path / "model", tmp_path / "packed", scheme="MXFP8")
    packed = export_checkpoint(tmp_path / "model", tmp_path / "packed", scheme="MXFP8", trust_remote_code=True)
    with pytest.raises(ValueError, match="--trust_remote_code"):
        load_model(ModelArguments(str(packed)))
    assert type(load_model(ModelArguments(str(packed), trust_remote_code=True))).__name__ == "Own"


def test_metadata_of_sharded_states_is_read_without_running_what_is_pickled_in_it(tmp_path):
    states = {"a": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(1.0), "groups": [{"lr": 0.1}]}
    dcp.save(states, checkpoint_id=str(tmp_path / "optimizer_0"), no_dist=True)
    check_checkpoint(tmp_path)
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match="not the metadata of a sharded checkpoint: it asks for posix.mkdir"):
        check_checkpoint(tmp_path)
    assert not (tmp_path / "sprung").exists()


class AttributeOf:
    """Pickled as an attribute of a class, as early versions of Python 3.11 pickle members of an Enum."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_of_attributes_in_metadata_only_members_of_an_enum_are_read(tmp_path):
    (tmp_path / "optimizer_0").mkdir()
    path = tmp_path / "optimizer_0" / ".metadata"
    path.write_bytes(pickle.dumps(AttributeOf(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")))
    check_checkpoint(tmp_path)
    for owner, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (torch.Size, "numel")):
        path.write_bytes(pickle.dumps(AttributeOf(owner, name)))
        with pytest.raises(ValueError, match=f"not the metadata of a sharded checkpoint: .*{name}"):
            check_checkpoint(tmp_path)
