"""Step 1 of scripts/test_serving.sh, in this project's environment: checkpoints and expected outputs.

For each case a small Llama or mixture of experts is packed, and its fake-quantized twin computes in FP32 the
log-probability of each token of the prompts, and the greedy continuation. In FP32, because BF16's noise flips FP4
decisions of two correct engines. vLLM refuses FP32 for AutoRound's dialect, so that one is compared with weights
quantized only, where noise stays noise.

Each case has a control: the same twin with one property changed. The engine must be far from it, or the comparison
would notice nothing.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from models import MODELS
from transformers import AutoModelForCausalLM

from qat import prepare_qat
from qat.checkpoints.dialects import get_dialect
from qat.checkpoints.pack import export_checkpoint
from qat.layers.calibration import calibrate_inputs
from qat.layers.restore import prepare_as_saved, set_input_rule
from qat.layers.sites import quantized_sites, quantizers_off

MIXED_EXPERTS = {"torch.nn.Linear": "MXFP8", "*.experts": "MXFP4A16"}
MXFP8_EXPERTS = ("--quantization-config.moe.activation", "mxfp8")
MIXED = {"torch.nn.Linear": "MXFP4", "*.down_proj": "MXFP8"}
UNQUANTIZED_INPUTS, UNQUANTIZED_MODEL = "unquantized inputs", "the unquantized model"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 24, 16


@dataclass(frozen=True)
class Case:
    """One packed model to serve.

    Attributes:
        mapping: a scheme, or schemes by layer.
        rule: of the activations in the engine; "none": the engine does not quantize what the checkpoint does; None:
            the checkpoint does not quantize them.
        control: a rule, UNQUANTIZED_INPUTS or UNQUANTIZED_MODEL.
        stock: served without the plugin, by a kernel of vLLM.
        model: a key of models.MODELS.
        ignore: what stays unquantized, as in `prepare_qat`.
        options: of `vllm serve`, beside those that the dialect names.
        transformed: patterns of layers whose inputs are transformed by Hadamard blocks.
        dtype, tolerance: in which vLLM computes, and how far log-probabilities may be off, in nats.
    """

    mapping: str | dict[str, str]
    rule: str | None
    control: str
    export_format: str = "compressed-tensors"
    stock: bool = False
    model: str = "llama"
    ignore: tuple[str, ...] = ("lm_head",)
    options: tuple[str, ...] = ()
    dtype: str = "float32"
    tolerance: float = 1e-4
    transformed: tuple[str, ...] = ()


CASES = {
    "mxfp4-even": Case("MXFP4", "even", "rceil"),
    "mxfp4-floor": Case("MXFP4", "floor", "rceil"),
    "mxfp4-transformed": Case("MXFP4", "even", "rceil", transformed=("*.down_proj", "*.o_proj")),
    "mxfp4-all-transformed": Case("MXFP4", "even", "rceil", transformed=("*",)),
    "mxfp4-all-transformed-biases": Case("MXFP4", "even", "rceil", model="qwen2", transformed=("*",)),
    "mxfp4a16-all-transformed": Case("MXFP4A16", None, UNQUANTIZED_MODEL, transformed=("*",)),
    "mxfp4-auto-round": Case("MXFP4_RCEIL", "none", "rceil", "auto_round", dtype="bfloat16", tolerance=0.1),
    "mxfp8-floor": Case("MXFP8", "floor", "rceil"),
    "mixed-even": Case(MIXED, "even", "rceil"),
    "mxfp4a16": Case("MXFP4A16", None, UNQUANTIZED_MODEL),
    "mxfp8a16": Case("MXFP8A16", None, UNQUANTIZED_MODEL),
    "mxfp4fp8": Case("MXFP4FP8", "absmax", UNQUANTIZED_INPUTS),
    "mxfp4fp8-g128": Case("MXFP4FP8_G128", "absmax", UNQUANTIZED_INPUTS),
    "mxfp4mxfp8-floor": Case("MXFP4MXFP8", "floor", "rceil"),
    "nvfp4": Case("NVFP4", "absmax", UNQUANTIZED_INPUTS),
    "nvfp4a16": Case("NVFP4A16", None, UNQUANTIZED_MODEL),
    # vLLM's kernel of INT4 for CPUs does not compute in FP32.
    "int4-g32": Case("INT4_G32", None, UNQUANTIZED_MODEL, stock=True, dtype="bfloat16", tolerance=0.1),
    "int4-g128": Case("INT4_G128", None, UNQUANTIZED_MODEL, stock=True, dtype="bfloat16", tolerance=0.1),
    # Mixtures of experts
    "qwen3-moe-mxfp4": Case("MXFP4", "even", "rceil", model="qwen3_moe"),
    "qwen3-moe-mxfp8-floor": Case("MXFP8", "floor", "rceil", model="qwen3_moe"),
    # A sum that differs by 1e-6 can round an activation to the next E4M3 value, which the tokens after it see.
    "qwen3-moe-mxfp4fp8": Case("MXFP4FP8", "absmax", UNQUANTIZED_INPUTS, model="qwen3_moe", tolerance=2e-3),
    "qwen3-moe-mxfp4mxfp8-floor": Case("MXFP4MXFP8", "floor", "rceil", model="qwen3_moe", options=MXFP8_EXPERTS),
    "qwen3-moe-nvfp4": Case("NVFP4", "absmax", UNQUANTIZED_INPUTS, model="qwen3_moe"),
    "qwen3-moe-int4-g32": Case({"*.experts": "INT4_G32"}, None, UNQUANTIZED_MODEL, model="qwen3_moe"),
    "qwen3-moe-fp8": Case({"*.experts": "FP8"}, "absmax", UNQUANTIZED_INPUTS, model="qwen3_moe"),
    "qwen3-moe-experts-only": Case({"*.experts": "MXFP4A16"}, None, UNQUANTIZED_MODEL, model="qwen3_moe"),
    "qwen3-moe-attention-only": Case("MXFP4", "even", "rceil", model="qwen3_moe", ignore=("lm_head", "*.experts")),
    "qwen3-moe-mixed": Case(MIXED_EXPERTS, "even", UNQUANTIZED_INPUTS, model="qwen3_moe"),
    "qwen2-moe-mxfp4": Case("MXFP4", "even", "rceil", model="qwen2_moe", ignore=("lm_head", "*.shared_expert_gate")),
    "mixtral-mxfp4": Case("MXFP4", "even", "rceil", model="mixtral"),
    "mixtral-nvfp4a16": Case("NVFP4A16", None, UNQUANTIZED_MODEL, model="mixtral"),
    "gpt-oss-native": Case({"*.experts": "MXFP4A16"}, None, UNQUANTIZED_MODEL, "mxfp4", model="gpt_oss"),
}


def main(folder: Path, names: list[str]) -> None:
    """Write each case into `folder`, and `cases.json`."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, 512, (PROMPTS, PROMPT_TOKENS), generator=generator)
    cases = {name: make_case(CASES[name], folder / name, prompts) for name in names}
    (folder / "cases.json").write_text(json.dumps({"prompts": prompts.tolist(), "cases": cases}))


def make_case(case: Case, folder: Path, prompts: torch.Tensor) -> dict:
    """Pack a model into `folder`, and what vLLM is to give for the prompts."""
    source, packed = folder / "source", folder / "packed"
    mapping = {"torch.nn.Linear": case.mapping} if isinstance(case.mapping, str) else case.mapping
    transforms = dict.fromkeys(case.transformed, "hadamard")
    prepared = prepare_qat(MODELS[case.model](), mapping, ignore=case.ignore, input_transforms=transforms)
    calibrate_inputs(prepared, [{"input_ids": prompts}])
    prepared.save_pretrained(source)
    prepared.qat_config.save(source)
    export_checkpoint(source, packed, case.export_format)
    twin = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    prepare_as_saved(twin, prepared.qat_config)
    set_engine_rule(twin.eval(), case.rule)
    options = get_dialect(case.export_format).serve_options(site.scheme for site in quantized_sites(prepared))
    expected = {
        "options": [*options, *case.options], "packed": str(packed), "rule": case.rule or "", "stock": case.stock,
        "dtype": case.dtype, "tolerance": case.tolerance, "control": case.control, **expect(twin, prompts),
    }  # fmt: skip
    return expected | {"control_log_probabilities": under_control(twin, case.control, prompts).tolist()}


def under_control(twin, control: str, prompts: torch.Tensor) -> torch.Tensor:
    """Log-probabilities as in `log_probabilities`, with the twin changed as the control says."""
    if control == UNQUANTIZED_MODEL:
        with quantizers_off(twin):
            return log_probabilities(twin, prompts)
    set_engine_rule(twin, "none" if control == UNQUANTIZED_INPUTS else control)
    return log_probabilities(twin, prompts)


def set_engine_rule(model, rule: str | None) -> None:
    """Quantize inputs under `rule`, or not at all ("none"); None: as they are."""
    if rule is None:
        return
    for site in quantized_sites(model):
        if rule == "none":
            site.module.input_quantizer.disable()
        else:
            site.module.input_quantizer.enable()
    if rule != "none":
        set_input_rule(model, rule)


def expect(model, prompts: torch.Tensor) -> dict:
    """Log-probabilities of the prompts' tokens [prompts, time - 1], and NEW_TOKENS greedy tokens.

    The margin of a greedy token is the distance of its logit to that of the second best: noise above half of it may
    choose another one.
    """
    tokens, margins = prompts, []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            best = model(tokens, use_cache=False).logits[:, -1].topk(2)
            tokens = torch.cat((tokens, best.indices[:, :1]), dim=1)
            margins.append(best.values[:, 0] - best.values[:, 1])
    return {
        "log_probabilities": log_probabilities(model, prompts).tolist(),
        "greedy": tokens[:, prompts.shape[1] :].tolist(),
        "margins": torch.stack(margins, dim=1).tolist(),
    }


@torch.no_grad()
def log_probabilities(model, prompts: torch.Tensor) -> torch.Tensor:
    """Of each token but the first [prompts, time - 1]."""
    logits = model(prompts, use_cache=False).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, prompts[:, 1:, None]).squeeze(-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the cases and cases.json are written")
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"only these; default: {' '.join(CASES)}")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no case is called {sorted(unknown)[0]!r}; choose among {', '.join(CASES)}")
    main(args.folder, args.cases)
