"""Sensitivity: what single layers cost, and a mapping for a budget that training and export accept."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch
from helpers import make_llama, make_tokenizer, save_llama, write_conversations
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import main
from data.supervised import make_supervised_data_module
from qat import QATConfig, get_scheme, is_quantlinear, prepare_qat
from qat.checkpoints.pack import export_checkpoint
from qat.checkpoints.verify import verify
from qat.layers.experts import compute_in_autocast_dtype
from qat.layers.sites import quantized_sites
from qat.schemes.mapping_file import load_mapping
from training.arguments.quantization import QuantizationArguments
from training.sensitivity import measure as sensitivity
from training.sensitivity.bits_budget import Unit, average_bits, find_units, propose
from training.sensitivity.measure import Sensitivity, SensitivityArguments, propose_mapping, round_weights
from training.start.smoothing import smooth_with_data

NARROW, WIDE = get_scheme("MXFP4"), get_scheme("MXFP8")


def sharp_llama() -> nn.Module:
    """A tiny Llama with logits large enough for rounding to matter."""
    model = make_llama().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(60).reshape(3, 20)
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def test_layers_that_engines_fuse_are_one_unit():
    model = prepare_qat(make_llama(layers=1), {nn.Linear: "MXFP4"})
    units = find_units(model)
    assert [unit.name.removeprefix("model.layers.0.") for unit in units] == [
        "self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert units[0].layers == tuple(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
    assert [unit.weights for unit in units] == [64 * 128, 64 * 64, 2 * 64 * 96, 64 * 96]
    (block,) = find_units(model, by_block=True)
    assert block.name == "model.layers.0" and len(block.layers) == 7


def outlier_llama() -> nn.Module:
    """Its MLPs read two channels that stick out, whose weights make up for it."""
    model = sharp_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[[3, 40]] *= 64
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, [3, 40]] /= 64
    return model


def divergence(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Of `model` under autocast from the unquantized, unsmoothed outlier_llama, nats a token."""
    kl = []
    for inputs in map(dict, batches):
        labels = inputs.pop("labels")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rows = [m(**inputs).logits[:, :-1][labels[:, 1:] != -100].double() for m in (outlier_llama(), model)]
        reference, quantized = (row.log_softmax(-1) for row in rows)
        kl.append((reference.exp() * (reference - quantized)).sum(-1))
    return torch.cat(kl).mean().item()


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """A folder with a model that smoothing helps and samples, and the mappings proposed for it by alpha."""
    folder = tmp_path_factory.mktemp("outliers")
    outlier_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_conversations(folder / "data.jsonl")
    flags = ["--model_name_or_path", str(folder / "model"), "--dataset", str(folder / "data.jsonl"), "--eval_size", "6"]
    flags += ["--weight_scale_rule", "search", "--bits_budget", "6", "--samples", "8"]
    transforms = {"0": "hadamard", "0.7": "none"}
    for alpha, name in transforms.items():
        own = ["--smooth_alpha", alpha, "--input_transform", name, "--output_dir", str(folder / alpha)]
        sensitivity.main([*flags, *own])
    return folder, {alpha: json.loads((folder / alpha / "mapping.json").read_text()) for alpha in transforms}


def test_the_smoothed_or_transformed_model_is_measured_against_the_unsmoothed_unquantized_one(outliers):
    folder, results = outliers
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 512
    data = make_supervised_data_module(str(folder / "data.jsonl"), tokenizer, eval_size=6)
    training = data["train_dataset"]
    batches = [data["data_collator"]([training[len(training) * i // 8] for i in range(8)])]
    for alpha, result in results.items():
        assert result["smooth_alpha"] == float(alpha) and result["samples"] == 8
        assert result["input_transform"] == ("none" if float(alpha) else "hadamard")
        transforms = {} if float(alpha) else "hadamard"
        model = prepare_qat(
            outlier_llama(), {nn.Linear: "MXFP4"}, weight_scale_rule="search", input_transforms=transforms
        )
        if float(alpha):
            smooth_with_data(model, data, float(alpha), torch.device("cpu"))
        assert result["kl"]["MXFP4"] == pytest.approx(divergence(model, batches), rel=0.03)
        measured = Sensitivity(model, batches)  # with every weight in FP32
        all_narrow = dict.fromkeys(measured.layers, get_scheme("MXFP4", "search"))
        assert result["kl"]["MXFP4"] == pytest.approx(measured.measure([all_narrow])[0], rel=1e-6)
    plain = Sensitivity(prepare_qat(outlier_llama(), {nn.Linear: "MXFP4"}, weight_scale_rule="search"), batches)
    (without,) = plain.measure([dict.fromkeys(plain.layers, get_scheme("MXFP4", "search"))])
    assert results["0.7"]["kl"]["MXFP4"] < 0.8 * without != results["0"]["kl"]["MXFP4"]


def test_weights_kept_in_bfloat16_are_measured_as_training_computes_with_masters():
    case = dict.fromkeys((f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")), NARROW)
    kl = []
    for ignore in (("lm_head",), ()):  # without it, lm_head is quantized and shares the embedding's weight
        model, rounded = (prepare_qat(outlier_llama(), {nn.Linear: "MXFP4"}, ignore) for _ in range(2))
        round_weights(rounded)
        kl += [Sensitivity(m, [batch()]).measure([case])[0] for m in (model, rounded)]
        assert {m.weight.dtype for n, m in rounded.named_modules() if is_quantlinear(m) and n != "lm_head"} == {
            torch.bfloat16
        }
        assert rounded.model.embed_tokens.weight.dtype == rounded.model.norm.weight.dtype == torch.float32
    assert kl[0] == kl[1] and kl[2] == kl[3] and min(kl) > 0


def test_a_mapping_measured_under_other_settings_is_warned_of(outliers, caplog, tmp_path):
    def warnings(path, **settings):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "training"):
            QuantizationArguments(quant_mapping=str(path), **settings).layers()
        return caplog.messages

    path = outliers[0] / "0.7/mapping.json"
    assert warnings(path, smooth_alpha=0.7, weight_scale_rule="search") == []
    (message,) = warnings(path, smooth_alpha=0.5, weight_scale_rule="search")
    assert "measured with --smooth_alpha 0.7, and this run has --smooth_alpha 0.5" in message
    messages = warnings(path, smooth_alpha=0.7)  # one for each scheme
    assert len(messages) == 2 and all(
        "{'weight': 'search'" in m and "run has {'weight': 'floor'" in m for m in messages
    ), messages
    (message,) = warnings(path, smooth_alpha=0.7, weight_scale_rule="search", input_transform="hadamard")
    assert "measured with --input_transform none, and this run has --input_transform hadamard" in message
    hand_made = tmp_path / "mapping.json"
    hand_made.write_text('{"mapping": {"torch.nn.Linear": "MXFP4"}}')
    assert warnings(hand_made, smooth_alpha=0.7, weight_scale_rule="search") == []
    hand_made.write_text('{"mapping": {"torch.nn.Linear": "MXFP4"}, "smooth_alpha": "auto"}')
    assert warnings(hand_made, smooth_alpha="auto") == []
    assert "measured with --smooth_alpha auto, and this run" in warnings(hand_made, smooth_alpha=0.7)[0]
    hand_made.write_text('{"mapping": {"torch.nn.Linear": "MXFP4"}, "smooth_alpha": "much"}')
    with pytest.raises(ValueError, match="records {'smooth_alpha': 'much'}; expected"):
        QuantizationArguments(quant_mapping=str(hand_made))


def test_a_single_layers_divergence_is_that_of_a_model_with_only_this_layer_quantized():
    model = prepare_qat(sharp_llama(), {nn.Linear: "MXFP4"})
    (kl,) = Sensitivity(model, [batch(), batch()]).measure([{"model.layers.1.mlp.down_proj": WIDE}])
    alone = prepare_qat(sharp_llama(), {"model.layers.1.mlp.down_proj": "MXFP8"})
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rows = [m(**inputs).logits[:, :-1][labels[:, 1:] != -100].double() for m in (sharp_llama(), alone)]
    reference, quantized = (row.log_softmax(-1) for row in rows)
    expected = (reference.exp() * (reference - quantized)).sum(-1).mean().item()
    assert kl == pytest.approx(expected, rel=1e-3) and kl > 0


def test_the_greedy_choice_keeps_the_budget_and_is_the_best_for_equal_sizes():
    kl = [(0.5, 0.1), (0.3, 0.2), (0.9, 0.1), (0.1, 0.2), (0.6, 0.3)]
    units = [Unit(f"u{i}", (f"u{i}",), 64, {"MXFP4": a, "MXFP8": b}) for i, (a, b) in enumerate(kl)]
    for budget in (4.25, 5.0, 6.0, 7.9, 8.25):
        chosen = propose(units, NARROW, WIDE, budget)
        assert average_bits(units, chosen, NARROW, WIDE) <= budget
        savings = [
            sum(u.kl["MXFP4"] - u.kl["MXFP8"] for u in some)
            for count in range(6)
            for some in itertools.combinations(units, count)
            if average_bits(units, some, NARROW, WIDE) <= budget
        ]
        assert sum(u.kl["MXFP4"] - u.kl["MXFP8"] for u in chosen) == pytest.approx(max(savings))
    assert units[3] not in propose(units, NARROW, WIDE, 8.25)  # the wide scheme does not help it


def test_a_unit_too_large_for_the_budget_gives_way_to_smaller_ones():
    units = [Unit("large", ("large",), 900, {"MXFP4": 9.0, "MXFP8": 0.0}), Unit("small", ("small",), 100,
             {"MXFP4": 0.5, "MXFP8": 0.0})]  # fmt: skip
    assert [unit.name for unit in propose(units, NARROW, WIDE, 5.0)] == ["small"]


def make_mixtral(mapping: dict) -> nn.Module:
    """Its experts are large enough for their rounding to matter."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = compute_in_autocast_dtype(AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return prepare_qat(model, mapping)


def test_the_experts_of_a_layer_are_one_unit_with_all_their_bits():
    model = make_mixtral({nn.Linear: "MXFP4"})
    result = propose_mapping(Sensitivity(model, [batch()]), SensitivityArguments(bits_budget=6.0))
    sizes = {unit["name"]: unit["weights"] for unit in result["units"]}
    experts = [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert {name: size for name, size in sizes.items() if "experts" in name} == dict.fromkeys(experts, 2 * 3 * 64 * 64)
    assert all(unit["layers"] == [unit["name"]] for unit in result["units"] if "experts" in unit["name"])
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    assert sum(sizes.values()) == attention + 2 * sizes[experts[0]]
    wide = sum(unit["weights"] for unit in result["units"] if unit["wide"])
    assert result["bits_per_weight"] == pytest.approx(4.25 + 4 * wide / sum(sizes.values())) and wide > 0
    assert result["bits_per_weight"] <= 6.0 and result["kl"]["MXFP8"] < result["kl"]["mixed"] < result["kl"]["MXFP4"]
    trained = make_mixtral(result["mapping"])  # what was proposed is accepted and is what was chosen
    assert {site.name for site in quantized_sites(trained) if site.scheme.name == "MXFP8"} == {
        layer for unit in result["units"] if unit["wide"] for layer in unit["layers"]
    }


def test_the_divergence_of_experts_is_that_of_a_model_with_only_these_experts_quantized():
    name = "model.layers.1.mlp.experts"
    rounded = make_mixtral({nn.Linear: "MXFP4"})
    round_weights(rounded)
    assert rounded.get_submodule(name).down_proj.dtype == torch.bfloat16
    (kl,) = Sensitivity(rounded, [batch()]).measure([{name: WIDE}])
    (expected,) = Sensitivity(make_mixtral({name: "MXFP8"}), [batch()]).measure([{name: WIDE}])
    assert kl == expected > 0


def test_layers_outside_of_numbered_blocks_are_measured_and_drawn(tmp_path):
    class Flat(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(260, 64), nn.Linear(64, 64), nn.Linear(64, 260)

        def forward(self, input_ids, attention_mask, use_cache):
            return type("Output", (), {"logits": self.head(self.body(self.embed(input_ids)))})

    torch.manual_seed(0)
    model = prepare_qat(Flat(), {nn.Linear: "MXFP4"}).eval()
    result = propose_mapping(Sensitivity(model, [batch()]), SensitivityArguments(units="block"))
    assert [unit["name"] for unit in result["units"]] in (["head", "body"], ["body", "head"])
    sensitivity.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_proposed_mapping_trains_exports_and_is_verified(tmp_path, capsys, caplog):
    save_llama(tmp_path / "model")
    write_conversations(tmp_path / "data.jsonl")
    model = ["--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl")]
    sensitivity.main([*model, "--eval_size", "6", "--output_dir", str(tmp_path / "out"), "--bits_budget", "5.5"])
    assert "bits a weight (budget 5.5)" in capsys.readouterr().out and (tmp_path / "out/sensitivity.png").is_file()
    mapping, ignore = load_mapping(tmp_path / "out/mapping.json")
    assert set(mapping.values()) == {"MXFP4", "MXFP8"} and ignore == ("lm_head",)
    flags = ["--quant_mapping", str(tmp_path / "out/mapping.json"), "--weight_scale_rule", "search"]
    flags += ["--do_train", "True", "--max_steps", "2", "--eval_size", "6", "--report_to", "none", "--report", "False"]
    main.main([*model, *flags, "--output_dir", str(tmp_path / "qat"), "--export_format", "none"])
    assert QATConfig.load(tmp_path / "qat").mapping == mapping
    assert "measured with the scale rules {'weight': 'floor', 'input': 'floor'} of MXFP4" in caplog.text
    export_checkpoint(tmp_path / "qat", tmp_path / "packed")
    assert verify(tmp_path / "packed", tmp_path / "qat", with_logits=False)["verified"]
    groups = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {4, 8}


@pytest.mark.parametrize(
    "flags,expected", [((), range(14)), (("--samples", "3"), (0, 4, 9)), (("--packing", "True"), None)]
)
def test_training_samples_at_even_distances_choose_and_evaluation_samples_do_not(
    tmp_path, monkeypatch, flags, expected
):
    save_llama(tmp_path / "model", layers=1)
    write_conversations(tmp_path / "data.jsonl", 20)
    modules, seen = [], []

    def make(**kwargs):
        modules.append(make_supervised_data_module(**kwargs))
        return modules[-1]

    def propose(measured, args):
        seen.extend(row[row != 1].tolist() for batch in measured.batches for row in batch["input_ids"])
        raise KeyboardInterrupt  # before anything is measured

    monkeypatch.setattr(sensitivity, "make_supervised_data_module", make)
    monkeypatch.setattr(sensitivity, "propose_mapping", propose)
    arguments = ["--model_name_or_path", str(tmp_path / "model"), "--dataset", str(tmp_path / "data.jsonl")]
    arguments += ["--eval_size", "6", "--model_max_length", "128", "--data_cache_dir", str(tmp_path / "cache")]
    with pytest.raises(KeyboardInterrupt):
        sensitivity.main([*arguments, *flags])
    training = modules[0]["train_dataset"]
    rows = [[i for i in training[n]["input_ids"] if i != 1] for n in range(len(training))]  # 1 pads
    assert seen == [rows[n] for n in expected or range(len(rows))] and len(seen) > 0


@pytest.mark.parametrize(
    "content,message",
    [
        ("[1, 2]", "holds no mapping"),
        ("{}", "holds no mapping"),
        ('{"mapping": {"*.up_proj": 4}}', "holds no mapping"),
        ('{"*.up_proj": "MXFP5"}', "scheme 'MXFP5' is unknown; choose one of MXFP4"),
        ('{"mapping": {"*.up_proj": "MXFP4"}, "ignore": "lm_head"}', "not a list of patterns"),
        ("{", "cannot be read"),
    ],
)
def test_mapping_files_that_say_nothing_usable_are_named(tmp_path, content, message):
    path = tmp_path / "mapping.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_mapping(path)


def test_a_bare_mapping_is_a_mapping_file_too(tmp_path):
    path = tmp_path / "mapping.json"
    path.write_text('{"torch.nn.Linear": "mxfp4", "*.down_proj": "MXFP8"}')
    assert load_mapping(path) == ({"torch.nn.Linear": "MXFP4", "*.down_proj": "MXFP8"}, ("lm_head",))


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--bits_budget", "4"), "--bits_budget 4.0 must lie between the 4.25"),
        (("--narrow_scheme", "MXFP8"), "--wide_scheme MXFP8 is not wider"),
        (("--wide_scheme", "MXFP9"), "'MXFP9' is unknown"),
        (("--units", "neuron"), "--units 'neuron' is unknown; choose one of projection, block"),
        (("--samples", "0"), "--samples 0: at least 1 training sample"),
        (("--smooth_alpha", "1.5"), "--smooth_alpha 1.5 is out of range; choose 0 (off) to 1"),
    ],
)
def test_wrong_arguments_are_named_before_a_model_is_loaded(capsys, flags, message):
    with pytest.raises(SystemExit):
        sensitivity.main(["--model_name_or_path", "no/such/model", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "flag"), [("gpt_oss", " --export_format compressed-tensors\n"), ("llama", ".json\n")]
)
def test_the_command_it_prints_has_a_format_that_holds_the_mapping(tmp_path, capsys, model_type, flag):
    result = {"units": [], "samples": 1, "bits_per_weight": 5.0, "kl": {}}
    sensitivity.report(result, SensitivityArguments(), tmp_path, model_type)
    assert capsys.readouterr().out.endswith(flag)
