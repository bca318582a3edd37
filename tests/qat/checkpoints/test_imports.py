"""Packed folders of other programs: their libraries make them here, and say what the weights are."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qat.checkpoints.packed_folder import check_packed, check_packed_values
from qat.checkpoints.settings import check_settings, declared, has_key_value_scheme
from qat.checkpoints.unpack import load_packed
from qat.errors import UserError
from qat.layers.restore import prepare_as_saved
from qat.layers.sites import find_sites, quantized_sites
from qat.numerics.families import get_format

UP = "model.layers.0.mlp.up_proj"

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
MXFP8 = {**MXFP4, "num_bits": 8}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
         "scale_dtype": torch.float8_e4m3fn}  # fmt: skip
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FP8_TENSOR = {"num_bits": 8, "type": "float", "strategy": "tensor"}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
G128 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}
NVFP4_INPUT = {**NVFP4, "dynamic": "local"}


# ---- Folders as the programs write them ----


def write(folder: Path, packed: dict[str, torch.Tensor], settings: dict, file: str | None = None) -> Path:
    """A Llama of one layer, some tensors of it `packed`, its settings in config.json or in a file beside it."""
    make_llama(layers=1, tie_word_embeddings=False).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    linear = {name.rpartition(".")[0] for name in packed}
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if k.removesuffix(".weight") not in linear}
    save_file(kept | {k: v.contiguous() for k, v in packed.items()}, folder / "model.safetensors", {"format": "pt"})
    if file is not None:
        (folder / file).write_text(json.dumps(settings))
        return folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def linear_weights() -> dict[str, torch.Tensor]:
    """The weights of a Llama of one layer, without its head; each spans many magnitudes up to 1."""
    model = make_llama(layers=1, tie_word_embeddings=False)
    weights = {site.name: site.weight.detach() for site in find_sites(model) if site.name != "lm_head"}
    weights = {name: w * torch.logspace(-2, 1, len(w))[torch.randperm(len(w)), None] for name, w in weights.items()}
    for weight in weights.values():
        weight[0, 0] = 1.0  # the largest of each, so that layers which engines fuse have one divisor
    return weights


def in_dtype(scale: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A scale in `dtype`; None: in BF16, with four bits only, so that all its products are exact in BF16."""
    return (scale.bfloat16().view(torch.int16) & ~0xF).view(torch.bfloat16) if dtype is None else scale.to(dtype)


def compress(weight: torch.Tensor, scheme: QuantizationScheme, layout: str, dtype: torch.dtype | None) -> dict:
    """The tensors that compressed-tensors packs a weight into, under scales that follow from its magnitudes."""
    args, state = scheme.weights, {"weight": weight}
    if args.strategy in ("channel", "tensor"):
        amax = weight.abs().amax(-1, keepdim=True) if args.strategy == "channel" else weight.abs().max().reshape(1)
        state["weight_scale"] = in_dtype(amax / 448, dtype)
    else:
        amax = weight.unflatten(-1, (-1, args.group_size)).abs().amax(-1)
        if args.type == "int":
            state["weight_scale"] = in_dtype(amax / 7.5, dtype)
            if dtype is not None:  # AutoRound writes negative scales
                state["weight_scale"][1::2] *= -1
        elif args.strategy == "tensor_group":
            state["weight_global_scale"] = (2688 / weight.abs().max()).reshape(1)
            state["weight_scale"] = (
                (state["weight_global_scale"] * amax / 6).clamp(2**-9).to(torch.float8_e4m3fn).float()
            )
        else:
            state["weight_scale"] = torch.exp2(amax.log2().floor() - (2 if args.num_bits == 4 else 8))
    return BaseCompressor.get_value_from_registry(layout).compress(state, scheme)


def save_compressed(
    folder: Path, weights: dict, layout: str, inputs: dict | None, dtype: torch.dtype = torch.bfloat16, **more: object
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder in compressed-tensors' format, and what the library decompresses it to."""
    arguments = {"weights": QuantizationArgs(**weights, symmetric=True)}
    if inputs is not None:
        arguments["input_activations"] = QuantizationArgs(**inputs, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], **arguments)
    library = BaseCompressor.get_value_from_registry(layout)
    packed, expected = {}, {}
    for name, weight in linear_weights().items():
        tensors = compress(weight, scheme, layout, dtype)
        expected[name] = library.decompress(dict(tensors), scheme)["weight"].bfloat16()
        if inputs == NVFP4_INPUT:
            tensors["input_global_scale"] = torch.tensor([700.5])
        elif inputs == STATIC:
            tensors["input_scale"] = torch.tensor([0.0078125], dtype=dtype)
        packed |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    group = {**scheme.model_dump(mode="json"), "format": layout}
    settings = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
                "ignore": ["lm_head"], "kv_cache_scheme": None, **more}  # fmt: skip
    return write(folder, packed, settings), expected


def first_step(layer: torch.nn.Linear) -> torch.Tensor:
    """The weight that a prepared layer multiplies the identity by."""
    return layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).detach().T


def change_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def change_settings(folder: Path, **change: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))


# ---- compressed-tensors ----

LIBRARY = {
    "INT4_G32": (INT4, "pack-quantized", None, torch.bfloat16),
    "INT4_G32 in FP16": (INT4, "pack-quantized", None, torch.float16),
    "INT4_G32 in FP32": (INT4, "pack-quantized", None, torch.float32),
    "NVFP4": (NVFP4, "nvfp4-pack-quantized", NVFP4_INPUT, None),
    "NVFP4A16": (NVFP4, "nvfp4-pack-quantized", None, None),
    "MXFP4": (MXFP4, "mxfp4-pack-quantized", {**MXFP4, "dynamic": True}, None),
    "MXFP4A16": (MXFP4, "mxfp4-pack-quantized", None, None),
    "MXFP4FP8": (MXFP4, "mxfp4-pack-quantized", TOKEN, None),
    "MXFP4FP8_G128": (MXFP4, "mxfp4-pack-quantized", G128, None),
    "MXFP8": (MXFP8, "mxfp8-quantized", {**MXFP8, "dynamic": True}, None),
    "MXFP8A16": (MXFP8, "mxfp8-quantized", None, None),
    "FP8": (FP8, "float-quantized", TOKEN, torch.bfloat16),
    "FP8 in FP32": (FP8, "float-quantized", TOKEN, torch.float32),
    "FP8 of tensors": (FP8_TENSOR, "float-quantized", {**FP8_TENSOR, "dynamic": True}, torch.float32),
    "FP8 of static inputs": (FP8, "float-quantized", STATIC, torch.float32),
}


@pytest.mark.parametrize("case", LIBRARY)
def test_weights_equal_what_compressed_tensors_decompresses_and_the_scheme_is_found(tmp_path, case):
    weights, layout, inputs, dtype = LIBRARY[case]
    folder, expected = save_compressed(tmp_path, weights, layout, inputs, dtype)
    check_packed_values(folder)
    model, config = load_packed(folder)
    for name, values in expected.items():
        assert torch.equal(model.get_submodule(name).weight, values), name
    assert config.mapping == {"torch.nn.Linear": case.split()[0]}
    assert config.ignore == ("lm_head",)


@pytest.mark.parametrize(
    ("case", "rule"), [("INT4_G32", "search"), ("MXFP4A16", "floor"), ("FP8", "absmax"), ("NVFP4A16", "absmax")]
)
def test_the_first_step_computes_the_packed_values_where_a_rule_gives_them_back(tmp_path, caplog, case, rule):
    """INT4's absmax does not: the largest magnitude of a packed block is 7 or 8 steps of its scale, and not 7.5."""
    folder, expected = save_compressed(tmp_path, *LIBRARY[case][:3], None)
    model, config = load_packed(folder)
    assert config.scale_rules[case]["weight"] == rule
    assert ("rounded under search, which keeps them" in caplog.text) == (case == "INT4_G32")
    for site in quantized_sites(prepare_as_saved(model, config)):
        assert torch.equal(first_step(site.module), expected[site.name]), site.name


@pytest.mark.parametrize("case", ["FP8", "FP8 of tensors"])
def test_what_no_rule_keeps_is_logged_with_layers_elements_and_size(tmp_path, caplog, case):
    model, config = load_packed(save_compressed(tmp_path, *LIBRARY[case])[0])
    packed = {site.name: site.weight.detach().clone() for site in find_sites(model) if site.name not in config.ignore}
    rounded = {s.name: first_step(s.module) for s in quantized_sites(prepare_as_saved(model, config))}
    moved = [int((rounded[name] != packed[name]).sum()) for name in packed]
    change = sum((rounded[name] - packed[name]).float().square().sum() for name in packed)
    size = sum(weight.float().square().sum() for weight in packed.values())
    layers = f"{sum(moved)} of 30720 packed elements in {sum(count > 0 for count in moved)} of 7 layers"
    assert layers in caplog.text and f"by {100 * float(change / size) ** 0.5:.3g} % of the weights'" in caplog.text
    assert "no other rule halves that" in caplog.text
    assert ("the inputs of 7 layers have one FP8 scale for the whole tensor" in caplog.text) == ("tensors" in case)


def test_scales_of_inputs_become_calibrated_scales_as_engines_take_them(tmp_path, caplog):
    folder, _ = save_compressed(tmp_path, *LIBRARY["NVFP4"])
    change_tensors(folder, {f"{UP}.input_global_scale": torch.tensor([900.25])})
    model, config = load_packed(folder)
    assert config.calibrated_scales[f"{UP}.input_global_scale"] == 900.25
    assert config.calibrated_scales["model.layers.0.mlp.gate_proj.input_global_scale"] == 900.25  # fused with it
    assert config.calibrated_scales["model.layers.0.mlp.down_proj.input_global_scale"] == 700.5
    assert "layers that engines fuse have several scales for one input; all of them take 900.25" in caplog.text
    prepare_as_saved(model, config)
    assert float(model.get_submodule(UP).input_quantizer.divisor) == 900.25
    assert model(torch.arange(64)[None]).logits.isfinite().all()


def test_groups_by_name_and_by_expression_give_their_layers_their_schemes(tmp_path):
    folder, _ = save_compressed(tmp_path, *LIBRARY["MXFP4A16"])
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    token = {**groups["group_0"], "input_activations": {**TOKEN, "symmetric": True}}
    groups |= {"named": {**token, "targets": ["model.layers.0.mlp.down_proj"]},
               "expression": {**token, "targets": ["re:.*self_attn.*"]}}  # fmt: skip
    change_settings(folder, config_groups=groups, format="mixed-precision")
    mapping = load_packed(folder)[1].mapping
    assert mapping.pop("torch.nn.Linear") == "MXFP4FP8"
    assert mapping == {"model.layers.0.mlp.gate_proj": "MXFP4A16", UP: "MXFP4A16"}


def test_scales_of_a_key_value_cache_are_known_tensors(tmp_path, caplog):
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    folder, _ = save_compressed(tmp_path, *LIBRARY["MXFP4A16"], kv_cache_scheme=scheme)
    names = {f"model.layers.0.self_attn.{part}": torch.tensor([0.5]) for part in ("k_scale", "v_scale")}
    change_tensors(folder, names)
    assert check_packed(folder).key_value_scales == {name: name for name in names}
    config = load_packed(folder)[1]
    assert config.kv_cache_scheme == "FP8" and config.calibrated_scales == dict.fromkeys(names, 0.5)
    change_settings(folder, kv_cache_scheme=None)
    assert load_packed(folder)[1].kv_cache_scheme is None and "has 2 scales of a key/value cache" in caplog.text
    change_settings(folder, kv_cache_scheme={**scheme, "num_bits": 4})
    with pytest.raises(ValueError, match="has the key/value cache in .*num_bits.*4"):
        check_packed(folder)


# ---- AutoRound ----


W4A16 = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "data_type": "int",
         "group_size": 32, "sym": True, "block_name_to_quantize": "model.layers.0"}  # fmt: skip
AUTO_NVFP4 = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "bits": 4,
              "data_type": "nv_fp", "group_size": 16, "sym": True, "act_bits": 4, "act_dynamic": True, "act_sym": True,
              "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16,
              "block_name_to_quantize": "model.layers.0"}  # fmt: skip


def save_w4a16(folder: Path) -> Path:
    """AutoRound's own layers pack it, as its export does by default; a scale of each second row is negative."""
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    packed = {}
    for name, weight in linear_weights().items():
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data = weight
        layer = QuantLinear(4, 32, *reversed(weight.shape), bias=False)
        scale = weight.unflatten(-1, (-1, 32)).abs().amax(-1) / 8
        scale[::2] *= -1
        layer.pack(linear, scale, 8, None, device="cpu")
        packed |= {f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()}
    return write(folder, packed, W4A16)


def save_auto_nvfp4(folder: Path) -> Path:
    """The same in NVFP4, with a scale for inputs."""
    from auto_round.data_type.nvfp import ref_nvfp4_quant
    from auto_round.export.export_to_autoround.qlinear_fp import QuantLinear

    packed = {}
    for name, weight in linear_weights().items():
        linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
        linear.weight.data = weight
        divisor = 2688 / weight.abs().max()
        _, scale = ref_nvfp4_quant(weight.reshape(-1, 16), divisor)
        layer = QuantLinear(4, 16, *reversed(weight.shape), False, data_type="nv_fp", act_bits=4)
        layer.pack(
            linear, scale.reshape(len(weight), -1), global_scale=divisor, input_global_scale=torch.tensor(700.5),
            device="cpu",
        )  # fmt: skip
        packed |= {f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()}
    return write(folder, packed, AUTO_NVFP4)


def test_int4_of_auto_round_is_read_as_transformers_reads_it(tmp_path, caplog):
    """Its layer multiplies only: by the identity it gives its weight. With a negative scale a block may reach 8 steps
    above zero, which no rule of ours has."""
    folder = save_w4a16(tmp_path)
    check_packed_values(folder)
    read, (model, config) = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), load_packed(folder)
    assert config.mapping == {"torch.nn.Linear": "INT4_G32"} and config.calibrated_scales == {}
    for name, weight in linear_weights().items():
        layer, mine = read.get_submodule(name), model.get_submodule(name).weight
        assert torch.equal(mine, layer(torch.eye(weight.shape[1], dtype=read.dtype)).T.bfloat16()), name
        assert (mine.float() - weight).square().mean() < 0.02 * weight.square().mean()
    assert "change when rounded again in int4_g32 under absmax, the rule of the folder, by" in caplog.text


def test_nvfp4_of_auto_round_is_read_as_transformers_reads_it(tmp_path):
    folder = save_auto_nvfp4(tmp_path)
    check_packed_values(folder)
    read, (model, config) = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), load_packed(folder)
    assert config.mapping == {"torch.nn.Linear": "NVFP4"} and set(config.calibrated_scales.values()) == {700.5}
    for name, weight in linear_weights().items():
        mine = model.get_submodule(name).weight
        assert torch.equal(mine, read.get_submodule(name).dequant_weight_online().bfloat16()), name
        assert (mine.float() - weight).square().mean() < 0.02 * weight.square().mean()


def test_a_zero_point_of_auto_round_other_than_the_middle_is_refused(tmp_path):
    folder = save_w4a16(tmp_path)
    change_tensors(folder, {f"{UP}.qzeros": torch.full((2, 12), 0x66666666).int()})
    with pytest.raises(ValueError, match=r"up_proj.qzeros has zero points other than 8 \(asymmetric quantization\)"):
        load_packed(folder)
    change_settings(folder, sym=False)
    with pytest.raises(ValueError, match=r"with zero points \(sym false\)"):
        check_packed(folder)


def test_an_order_of_columns_is_refused_unless_it_is_their_own(tmp_path):
    folder = save_w4a16(tmp_path)
    values = load_packed(folder)[0].get_submodule(UP).weight
    change_tensors(folder, {f"{UP}.g_idx": torch.arange(64).int() // 32})
    assert torch.equal(load_packed(folder)[0].get_submodule(UP).weight, values)
    change_tensors(folder, {f"{UP}.g_idx": torch.arange(64).int() % 2})
    with pytest.raises(ValueError, match=r"up_proj.g_idx has another order of its columns \(act-order\)"):
        load_packed(folder)


def test_exceptions_of_auto_round_by_name_and_by_expression_give_their_layers_their_schemes(tmp_path):
    folder, _ = save_compressed(tmp_path, *LIBRARY["MXFP4"])
    plain = {"act_bits": 16, "act_data_type": None}
    change_settings(
        folder, quant_method="auto-round", format=None, bits=4, data_type="mx_fp", group_size=32, act_bits=4,
        act_data_type="mx_fp_rceil", act_group_size=32,
        extra_config={UP: plain, r".*self_attn\.[qkv]_proj.*": {"act_bits": 8, "act_data_type": "mx_fp"}},
    )  # fmt: skip
    mapping = load_packed(folder)[1].mapping
    attention = {f"model.layers.0.self_attn.{part}_proj": "MXFP4MXFP8" for part in "qkv"}
    others = {f"model.layers.0.{part}_proj": "MXFP4_RCEIL" for part in ("self_attn.o", "mlp.gate", "mlp.down")}
    common = mapping.pop("torch.nn.Linear")
    assert dict.fromkeys((*attention, *others, UP), common) | mapping == attention | others | {UP: "MXFP4A16"}


# ---- Model-Optimizer ----


def modelopt_nvfp4(name: str, rows: int, columns: int, multiplier: float) -> dict[str, torch.Tensor]:
    """Codes 1.5 and -6 in turn, block scales of 448 and 0.875 in turn."""
    scales = torch.tensor([448.0, 0.875]).repeat(rows, columns // 32)
    return {
        f"{name}.weight": torch.full((rows, columns // 2), 0xF3, dtype=torch.uint8),
        f"{name}.weight_scale": scales.to(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.tensor(multiplier),
        f"{name}.input_scale": torch.tensor(2.0**-10),
    }


@pytest.mark.parametrize("file", [None, "hf_quant_config.json"])
def test_nvfp4_of_model_optimizer_is_multiplied_and_not_divided_by_a_reciprocal(tmp_path, file):
    """1.5 * 448 * (15 * 2^-26) = 157.5 * 2^-20, a tie that goes to 158 in BF16; over the reciprocal it would be 157."""
    packed = {}
    for name, weight in linear_weights().items():
        packed |= modelopt_nvfp4(name, *weight.shape, 15 * 2.0**-26)
    packed |= {f"model.layers.0.self_attn.{part}_proj.{part}_scale": torch.tensor(0.25) for part in "kv"}
    settings = {"quant_algo": "NVFP4", "group_size": 16}
    if file is None:
        cache = {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}}
        folder = write(tmp_path, packed, {**settings, **cache, "producer": {"name": "modelopt"}})
    else:
        inner = {**settings, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        folder = write(tmp_path, packed, {"producer": {"name": "modelopt"}, "quantization": inner}, file)
    model, config = load_packed(folder)
    values = torch.tensor([158 * 2.0**-20, -630 * 2.0**-20, 2.0**-29 * 157.5, -(2.0**-29) * 630]).bfloat16()
    first = model.get_submodule(UP).weight[0]
    assert first[[0, 1, 16, 17]].tolist() == values.tolist()
    assert torch.equal(first, values[[0, 1] * 8 + [2, 3] * 8].repeat(2))
    assert config.mapping == {"torch.nn.Linear": "NVFP4"}
    inputs = {name: value for name, value in config.calibrated_scales.items() if name.endswith("input_global_scale")}
    assert set(inputs.values()) == {1024.0} and len(inputs) == 7
    assert config.kv_cache_scheme == "FP8" and len(config.calibrated_scales) == 9
    assert check_packed(folder).key_value_scales == {
        f"model.layers.0.self_attn.{part}_scale": f"model.layers.0.self_attn.{part}_proj.{part}_scale" for part in "kv"
    }


@pytest.mark.parametrize("shape", [(), (96,), (96, 1)], ids=["tensor", "rows", "column"])
def test_fp8_of_model_optimizer_keeps_its_values_and_says_that_inputs_are_rounded_per_token(tmp_path, caplog, shape):
    packed = {}
    for name, weight in linear_weights().items():
        scale = torch.full((len(weight), *shape[1:]) if shape else (), 3 * 2.0**-9)
        codes = torch.full(weight.shape, 0x7E, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 448
        packed |= {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(0.01)}
    model, config = load_packed(write(tmp_path, packed, {"quant_method": "modelopt", "quant_algo": "FP8"}))
    assert torch.equal(model.get_submodule(UP).weight, torch.full((96, 64), 448 * 3 * 2.0**-9).bfloat16())
    assert config.mapping == {"torch.nn.Linear": "FP8"} and config.calibrated_scales == {}
    assert "the inputs of 7 layers have one FP8 scale for the whole tensor" in caplog.text


def test_mixed_precision_of_model_optimizer_names_the_algorithm_of_each_layer(tmp_path):
    packed, layers = {}, {}
    for name, weight in linear_weights().items():
        packed |= modelopt_nvfp4(name, *weight.shape, 2.0**-20)
        layers[name] = {"quant_algo": "W4A16_NVFP4" if name.endswith("down_proj") else "NVFP4"}
    settings = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    folder = write(tmp_path, packed, settings)
    assert load_packed(folder)[1].mapping == {
        "torch.nn.Linear": "NVFP4", "model.layers.0.mlp.down_proj": "NVFP4A16",
    }  # fmt: skip


# ---- What is refused, by name, before weights are read ----

ONE, NAN = torch.ones(1), torch.tensor([torch.nan])
BROKEN = [
    ("NVFP4", {f"{UP}.weight_global_scale": None}, "up_proj.weight_global_scale is missing"),
    ("NVFP4", {f"{UP}.weight_global_scale": torch.ones(2)}, "weight_global_scale has the shape .2,.*one number"),
    ("NVFP4", {f"{UP}.weight_global_scale": ONE.half()}, "weight_global_scale is stored in F16.*F32"),
    ("NVFP4", {f"{UP}.input_global_scale": None}, "the inputs of .*up_proj are quantized in nvfp4, and .* is missing"),
    ("NVFP4", {f"{UP}.weight_scale": torch.ones(96, 2).to(torch.float8_e4m3fn)}, r"must be \(96, 4\) in nvfp4"),
    ("INT4_G32", {f"{UP}.weight_shape": None}, "up_proj.weight_shape is missing"),
    ("INT4_G32", {f"{UP}.weight_shape": torch.ones(3).long()}, r"weight_shape has the shape \(3,\)"),
    ("INT4_G32", {f"{UP}.weight_zero_point": ONE}, r"weight_zero_point: zero points \(asymmetric quantization\)"),
    ("INT4_G32", {f"{UP}.weight_g_idx": ONE}, r"weight_g_idx: another order of its columns \(act-order\)"),
    ("INT4_G32", {f"{UP}.weight_scale": torch.ones(96, 1)}, r"a scale for 64 values|each row \(per channel\)"),
    ("INT4_G32", {f"{UP}.weight_packed": torch.ones(96, 4).int()}, r"must be \(96, 1\) in int4_g32"),
    ("FP8", {f"{UP}.weight_scale": None, f"{UP}.weight_scale_inv": ONE}, "a scale for each square block"),
    ("FP8", {"model.layers.0.self_attn.k_scale": torch.ones(4)}, "only one scale for all keys or values"),
    ("FP8", {"lm_head.weight_scale": ONE}, "lm_head has weight in BF16 .*no layout of"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "message"), BROKEN)
def test_tensors_that_are_missing_or_wrong_are_refused_from_headers_alone(tmp_path, case, change, message):
    folder, _ = save_compressed(tmp_path, *LIBRARY[case])
    change_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        check_packed(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "NVFP4",
            {f"{UP}.weight_global_scale": torch.tensor([torch.nan])},
            "weight_global_scale is nan, not a positive",
        ),
        ("NVFP4", {f"{UP}.input_global_scale": torch.zeros(1)}, "input_global_scale is 0.0, not a positive number"),
        (
            "NVFP4",
            {f"{UP}.weight_scale": torch.full((96, 4), torch.nan).to(torch.float8_e4m3fn)},
            "scales that are NaN",
        ),
        ("INT4_G32", {f"{UP}.weight_scale": torch.full((96, 2), torch.nan)}, "weight_scale holds scales that are NaN"),
        ("INT4_G32", {f"{UP}.weight_shape": torch.tensor([96, 65])}, r"\[96, 65\], and the codes are of .*\[96, 64\]"),
        ("FP8", {f"{UP}.weight": NAN.expand(96, 64).to(torch.float8_e4m3fn)}, "up_proj.weight holds NaN"),
    ],
)
def test_values_that_are_broken_are_refused(tmp_path, case, change, message):
    folder, _ = save_compressed(tmp_path, *LIBRARY[case])
    change_tensors(folder, change)
    check_packed(folder)
    for read in (check_packed_values, load_packed):
        with pytest.raises(ValueError, match=message):
            read(folder)


def group(**change: object) -> dict:
    """Settings of one group that differ from MXFP4's with inputs in MXFP4."""
    mxfp4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    found = {"weights": mxfp4, "input_activations": {**mxfp4, "dynamic": True}, "targets": ["Linear"], **change}
    return {"config_groups": {"group_0": found}}


METHODS = ("gptq", "awq", "bitsandbytes", "quark", "hqq", "fbgemm_fp8", "fp8", "mxfp4", "torchao")
INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
SETTINGS = [
    *(({"quant_method": method}, f"is quantized by {method}, which is not read; give the BF16") for method in METHODS),
    ({"format": "naive-quantized"}, "by compressed-tensors in its format 'naive-quantized'"),
    ({"format": "int-quantized"}, "in its format 'int-quantized'"),
    ({"transform_config": {"config_groups": {"u": {}}}}, "with a transform_config, which changes what its layers"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config"),
    (group(input_activations=INT8), "up_proj has inputs in .*'type': 'int'|has inputs in .*which no scheme has"),
    (group(input_activations={**INT4, "symmetric": False}), "has inputs in .*which no scheme has"),
    (group(weights={**INT4, "symmetric": True}), "weights of type 'int'; mxfp4, as its tensors are, has 'float'"),
    (group(targets=["re:.*nothing"]), "no target of its config_groups matches it"),
    ({"config_groups": {}}, "no target of its config_groups matches it"),
    ({"config_groups": []}, "config_groups of its quantization settings is .*, no object; copy or pack it again"),
    ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "by modelopt as quant_algo 'W4A8_AWQ'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo 'NVFP4', and its tensors are in mxfp4"),
    ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "packing_format 'auto_round:auto_awq'"),
    ({"quant_method": "auto-round", "data_type": "mx_int", "bits": 4}, "weights in AutoRound's mx_int"),
    ({"quant_method": "auto-round", "bits": 8}, "weights of bits 8, and in mxfp4 it is 4"),
    ({"quant_method": "auto-round", "data_type": "mx_fp", "act_bits": 8, "act_data_type": "int", "act_group_size": -1},
     "inputs in AutoRound's int of 8 bits in groups of -1"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), SETTINGS)
def test_settings_that_are_not_read_are_refused_by_name(tmp_path, change, message):
    folder, _ = save_compressed(tmp_path, *LIBRARY["MXFP4"])
    change_settings(folder, **change)
    with pytest.raises(ValueError, match=message) as error:
        load_packed(folder)
    assert "\n" not in str(error.value)
    assert "BF16 checkpoint that it was made of" in str(error.value) or "pack it again" in str(error.value)


WRONG = (5, "x", [], ["x"], {"x": 5}, {"x": {}})
KEYS = ("config_groups", "format", "kv_cache_scheme", "transform_config", "sparsity_config", "extra_config", "act_bits",
        "act_group_size", "data_type", "packing_format", "quant_algo", "quantized_layers")  # fmt: skip
NAMES = [{"quant_method": "compressed-tensors"}, {"quant_method": "auto-round", "format": None},
         {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}]  # fmt: skip


@pytest.mark.parametrize("method", NAMES, ids=lambda method: method["quant_method"])
def test_settings_of_wrong_types_end_in_one_line_or_in_a_scheme(tmp_path, method):
    """`declared` alone: it knows no folder."""
    fmt, refused = get_format("mxfp4"), 0
    mxfp4 = group()["config_groups"]["group_0"]
    tries = [{key: value} for key in KEYS for value in WRONG]
    tries += [group(**{key: value}) for key in mxfp4 for value in WRONG]
    tries += [group(**{key: {**mxfp4[key], inner: value}})
              for key in ("weights", "input_activations") for inner in mxfp4[key] for value in WRONG]  # fmt: skip
    for change in tries:
        settings = {**group(), **method, **change}
        try:
            check_settings(settings, tmp_path)
            has_key_value_scheme(settings, tmp_path)
            declared(settings, {UP: fmt}, tmp_path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 30


@pytest.mark.parametrize("method", ["compressed-tensors", "auto-round"])
def test_settings_that_name_each_of_many_layers_are_read_in_seconds(tmp_path, method):
    """A mixture of experts has 45,000 matrices; what compares each with each takes minutes."""
    fmt = get_format("mxfp4")
    layers = {f"model.layers.{i}.mlp.experts.{j}.up_proj": fmt for i in range(60) for j in range(200)}
    names = [*layers, *(f"model.layers.{i}.mlp.gate" for i in range(600))]
    exceptions = {name: {"bits": 16} for name in names[-600:]}
    started = time.process_time()
    settings = {**group(targets=names), "quant_method": method, "extra_config": exceptions}
    found = declared(settings, layers, tmp_path)
    assert time.process_time() - started < 8
    assert found.keys() == layers.keys()
