"""Pack a saved mixture of experts with a set of tensors for each expert."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qat.checkpoints.dialects import get_dialect
from qat.checkpoints.dialects.compressed_tensors import packed_tensors
from qat.checkpoints.pack import pack_weight
from qat.layers.sites import quantized_sites
from qat.numerics import ops

PARTS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj",
         "down_proj": "down_proj", "w2": "down_proj"}


def pack(source: Path, target: Path, model) -> None:
    dialect = get_dialect("compressed-tensors")
    tensors = load_file(source / "model.safetensors")
    sites = {site.label: site for site in quantized_sites(model)}
    scales = model.qat_config.calibrated_scales or {}
    packed, schemes, rest = {}, {}, []
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        match = re.fullmatch(r"(.*[.]experts)[.](\d+)[.](\w+)", module)
        label = module
        if match:
            prefix = match[1].replace("block_sparse_moe", "mlp")
            label = f"{prefix}.{PARTS[match[3]]}"
        site = sites.get(label)
        if site is None:
            packed[name] = tensor.bfloat16()
            if tensor.ndim == 2 and "embed" not in name:
                rest.append(module)
            continue
        spec, divisor = site.scheme.weight, None
        if spec.format.tensor_scale is not None:
            if match:
                group = [p for p in PARTS if PARTS[p] == PARTS[match[3]] and f"{match[1]}.{match[2]}.{p}.weight" in tensors]
                together = [tensors[f"{match[1]}.{match[2]}.{p}.weight"] for p in group]
            else:
                names = {id(s.module): s.tensor for s in sites.values()}
                together = [tensors[names[id(m)]] for m in site.module.fused_with]
            divisor = ops.tensor_divisor(together, spec.format.name, torch.bfloat16)
        quantized = pack_weight(tensor, spec, divisor)
        own = packed_tensors(quantized, spec)
        packed |= {n: t.clone() for n, t in zip(dialect.tensor_names(module, spec), own, strict=True)}
        key = f"{label}.input_global_scale"
        if key in scales:
            packed[f"{module}.input_global_scale"] = torch.tensor([scales[key]], dtype=torch.float32)
        schemes[module] = site.scheme
    target.mkdir(parents=True)
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = dialect.config(schemes, rest)
    config["dtype"] = "bfloat16"
    (target / "config.json").write_text(json.dumps(config, indent=2))
    if (source / "generation_config.json").exists():
        shutil.copy(source / "generation_config.json", target)
