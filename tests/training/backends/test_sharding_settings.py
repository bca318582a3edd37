"""The FSDP settings of accelerate_config/ and what the trainer makes of them, without processes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from helpers import ROOT, make_llama
from torch.distributed.fsdp import StateDictType

from qat import prepare_qat
from qat.layers.names import original_name
from training.adapters.checkpoints import AdapterTrainer
from training.backends.sharding import full_state_dict, initialize_state, round_parameters, set_precision
from training.trainer import QATTrainer

CONFIGS = ROOT / "accelerate_config"


def make_plugin(name: str, monkeypatch, **kwargs) -> FullyShardedDataParallelPlugin:
    """The plugin that `accelerate launch` makes of a configuration file."""
    settings = yaml.safe_load((CONFIGS / name).read_text())["fsdp_config"]
    for key, value in settings.items():
        monkeypatch.setenv(key.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    monkeypatch.setenv("FSDP_SYNC_MODULE_STATES", "false")  # looks for a GPU
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    return FullyShardedDataParallelPlugin(**kwargs)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml") if "fsdp" in path.read_text()))
def test_settings_are_known_to_accelerate_and_wrap_the_models_own_decoder_layers(name, monkeypatch):
    plugin = make_plugin(name, monkeypatch)
    model = prepare_qat(make_llama())
    plugin.set_auto_wrap_policy(model)
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    plugin.set_mixed_precision("bf16")
    set_precision(plugin)
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype is None and policy.reduce_dtype is torch.float32
    assert getattr(policy, "output_dtype", None) is None and getattr(policy, "buffer_dtype", None) is None
    set_precision(plugin, "bfloat16")
    assert plugin.mixed_precision_policy.param_dtype is torch.bfloat16
    assert plugin.mixed_precision_policy.reduce_dtype is torch.float32


def test_fsdp1_with_flat_parameters_is_refused(monkeypatch):
    plugin = make_plugin("fsdp1.yaml", monkeypatch, use_orig_params=False)
    with pytest.raises(ValueError, match="set fsdp_use_orig_params: true"):
        set_precision(plugin)


@pytest.mark.parametrize("name,kind", [("fsdp1.yaml", "SHARDED"), ("fsdp2.yaml", "SHARDED"), ("fsdp1.yaml", "LOCAL")])
def test_the_state_dict_type_is_back_after_saving_failed(name, kind, monkeypatch, tmp_path):
    plugin = make_plugin(name, monkeypatch, state_dict_type=f"{kind}_STATE_DICT")
    config = plugin.state_dict_config
    seen = []

    def fail(self, *_):
        seen.append(plugin.state_dict_type)
        raise OSError("disk full")

    monkeypatch.setattr(AdapterTrainer, "save_model", fail)
    trainer = object.__new__(QATTrainer)
    trainer.is_fsdp_enabled, trainer._keep_masters = True, False
    trainer.model = make_llama()
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), unwrap_model=lambda model: model)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_model(str(tmp_path))
    assert seen == [StateDictType.FULL_STATE_DICT]
    assert plugin.state_dict_type is StateDictType[f"{kind}_STATE_DICT"] and plugin.state_dict_config is config


def test_full_state_dicts_have_settings_of_their_own(monkeypatch):
    plugin = make_plugin("fsdp1.yaml", monkeypatch)
    with full_state_dict(plugin):
        assert type(plugin.state_dict_config).__name__ == "FullStateDictConfig"
    assert type(plugin.state_dict_config).__name__ == "ShardedStateDictConfig"


def test_a_new_optimizer_gets_its_state_and_changes_nothing():
    model = make_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    initialize_state(optimizer)
    assert len(optimizer.state) == len(before) and optimizer.param_groups[0]["lr"] == 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
        assert not optimizer.state[parameter]["exp_avg"].any()


def test_masters_are_rounded_to_the_dtype_of_their_own_name():
    model = make_llama()
    before = model.model.norm.weight.data.fill_(1.001).clone()
    round_parameters(model, {"model.embed_tokens.weight": torch.bfloat16})
    embedding = model.model.embed_tokens.weight
    assert torch.equal(embedding, embedding.bfloat16().float()) and torch.equal(model.model.norm.weight, before)
    assert original_name("_fsdp_wrapped_module.model.layers.0._checkpoint_wrapped_module.x") == "model.layers.0.x"
