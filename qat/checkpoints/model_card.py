"""The model card of a packed checkpoint: where it comes from, how it was rounded, how good it is, how to serve it.

The head of the file is metadata that the Hub reads; what the training run measured is there too, as a `model-index`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from ..files.json_file import read_object
from ..files.model_folder import ADAPTER_FOLDER, ADAPTER_NAME
from ..layers.share import describe_left, describe_sites, layers_by_scheme, left_unquantized, percent, quantized_share
from ..layers.sites import EXPERTS, Site, quantized_sites
from ..layers.transformed import is_transformed
from ..numerics import mx
from ..numerics.formats import Format
from ..schemes.config import QATConfig
from ..schemes.presets import get_kv_cache_scheme
from ..schemes.spec import Scheme
from .dialects import Dialect
from .input_transforms import APPLIED_BY_VLLM, NOT_APPLIED
from .loadable import runs_as_linear

CARD_NAME = "README.md"
_RESULTS_NAME = "all_results.json"  # Trainer's
_TRAIN_LOSS = ("train_loss", "loss in training")
# By their names in Trainer's file: what the Hub calls a metric, and its name for readers.
_METRICS = {
    "eval_loss": ("loss", "loss in evaluation, nats a token"),
    "eval_perplexity": ("perplexity", "perplexity in evaluation"),
    "eval_kl": ("kl_divergence", "KL divergence from the teacher in evaluation, nats a token"),
}

_TEMPLATE = """---
{front_matter}
---

# {title}

{transforms}{share} of the linear weights are quantized: {layers}.
Packed as {export_format}: {packed_mib:.1f} MiB, {ratio:.2f} of the {source_mib:.1f} MiB that they were exported from.

| | |
|---|---|
| base model | {base_model} |
{adapters}| schemes | {mapping} |
| left unquantized | {left} |
| scale rule of the weights | {weight_rules} (the scales are in the file) |
| scale rule of the activations in training | {input_rules} |
| scale rule of the activations in transformers | {engine_rules} |
| key/value cache | {cache} |
| training data | {dataset} |

{formats}{results}
`qat_config.json` holds the quantization as it was trained; `verification.json`, where present, tells how these files
were compared with the fake-quantized model.

## Serve

```
{serve}
```

## Load

{load}
"""
_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}", dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```"""


@dataclass(frozen=True)
class CardFacts:
    """What the files of a checkpoint do not tell.

    Attributes:
        base_model: the model that training began from.
        dataset: what it was trained on.
        eval_dataset: what it was evaluated on; None for held-out samples of `dataset`.
        generic: text from elsewhere on which a teacher's distributions were learned.
    """

    base_model: str | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    generic: str | None = None

    @property
    def training(self) -> str:
        """What it was trained on, in words."""
        others = f"; in the divergence from the teacher also {self.generic}" if self.generic else ""
        return f"{self.dataset or 'not recorded'}{others}"

    @property
    def evaluation(self) -> str:
        """What the model was evaluated on, in words."""
        if self.eval_dataset is not None:
            return self.eval_dataset
        return "not recorded" if self.dataset is None else f"{self.dataset}, held-out samples"


def write_card(
    folder: Path,
    path: str,
    source: Path,
    facts: CardFacts,
    qat_config: QATConfig,
    model: nn.Module,
    dialect: Dialect,
    source_bytes: int,
    packed_bytes: int,
    why_not_loadable: str | None = None,
) -> None:
    """Write `README.md` into `folder`.

    Args:
        path: where the folder will be served from.
        model: prepared.
        why_not_loadable: why transformers cannot load the folder, if that is known.
    """
    sites = quantized_sites(model)
    layers = {site.label: site.scheme for site in sites}
    base_model = facts.base_model or str(source)
    schemes = {scheme.name: scheme for scheme in sorted(layers.values(), key=lambda scheme: scheme.name)}
    counts = layers_by_scheme(sites)
    title = f"{Path(base_model).name} {' + '.join(schemes)}"
    tags = [dialect.name.replace("_", "-"), *schemes]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    if facts.base_model and not Path(facts.base_model).exists():
        data.base_model = facts.base_model  # a hub id; a local path is no link
    measured = _measured(source)
    saved = QATConfig.load(source)
    is_of_this_model = saved is not None and saved.same_training(qat_config)
    if is_of_this_model and (results := _eval_results(measured, facts)):
        data.model_name, data.eval_results = title, results
    text = _TEMPLATE.format(
        front_matter=data.to_yaml().strip(),
        title=title,
        transforms=_transforms(sites),
        share=percent(quantized_share(model)),
        layers=describe_sites(sites),
        export_format=dialect.name,
        packed_mib=packed_bytes / 2**20,
        source_mib=source_bytes / 2**20,
        ratio=packed_bytes / source_bytes,
        base_model=base_model,
        adapters=_adapters(source),
        mapping=", ".join(f"{key}: {scheme}" for key, scheme in qat_config.mapping.items()),
        left="; ".join(describe_left(model, left_unquantized(model, qat_config))) or "nothing",
        weight_rules=_rules(scheme.rules["weight"] for scheme in layers.values()),
        input_rules=_rules(scheme.rules["input"] for scheme in layers.values()),
        engine_rules="not loaded there, see below" if why_not_loadable else _engine_rules(sites, dialect),
        cache=_describe_cache(qat_config.kv_cache_scheme),
        dataset=facts.training,
        formats="".join(f"* {describe_scheme(s)}, in {counts[name]}.\n" for name, s in schemes.items()),
        results=_results_section(measured, facts, is_of_this_model),
        serve=serve_command(path, dialect, layers.values()),
        load=_LOAD.format(path=path)
        if why_not_loadable is None
        else f"transformers cannot load these files: {why_not_loadable}.",
    )
    ModelCard(text).save(folder / CARD_NAME)


def _transforms(sites: Iterable[Site]) -> str:
    """A warning, first of all, where engines must transform inputs; else ""."""
    if not (count := sum(map(is_transformed, sites))):
        return ""
    return (
        f"**{count} layers transform their inputs** (`transform_config` in `config.json`), and an engine that passes "
        f"over it computes nonsense. {APPLIED_BY_VLLM}. Of transformers: {NOT_APPLIED}.\n\n"
    )


def _adapters(source: Path) -> str:
    """A row of the table for a model that adapters were merged into, else ""."""
    path = source / ADAPTER_FOLDER / ADAPTER_NAME
    if not path.is_file():
        return ""
    config = read_object(path)
    targets = config.get("target_modules")
    names = ", ".join(map(str, targets)) if isinstance(targets, list) else targets
    return f"| trained | LoRA of rank {config.get('r')}, alpha {config.get('lora_alpha')}, merged: {names} |\n"


def serve_command(path: str, dialect: Dialect, schemes: Iterable[Scheme]) -> str:
    """The command that serves a packed folder, with the options that its files cannot hold."""
    return " ".join(["vllm serve", path, *dialect.serve_options(schemes)])


def _engine_rules(sites: Iterable[Site], dialect: Dialect) -> str:
    """The rules of transformers, for experts on their own where it leaves their inputs as they are."""
    linear: list[Site] = []
    experts: list[Site] = []
    for site in sites:
        as_linear = site.kind != EXPERTS.name or runs_as_linear(site.owner, dialect.quant_method)
        (linear if as_linear else experts).append(site)
    rules = _rules(dialect.input_rule(site.scheme) for site in linear)
    if all(site.scheme.input is None for site in experts):
        return rules or _rules([None])
    return f"{rules}; experts NOT QUANTIZED" if rules else _rules([None])


def describe_scheme(scheme: Scheme) -> str:
    """A scheme in words: "MXFP4: weights in mxfp4 (...), activations in the same format"."""
    parts = [f"weights in {_describe_format(scheme.weight.format, 'output channel')}"]
    if scheme.input is None:
        parts.append("activations not quantized")
    elif scheme.input.format == scheme.weight.format:
        parts.append("activations in the same format")
    else:
        parts.append(f"activations in {_describe_format(scheme.input.format, 'token')}")
    return f"{scheme.name}: {', '.join(parts)}"


def _describe_format(fmt: Format, row: str) -> str:
    standard = "an OCP Microscaling format" if fmt.name in mx.FORMATS else "not an OCP Microscaling format"
    sharing = f"each {row} has" if fmt.block is None else f"{fmt.block} values share"
    scales = f"{sharing} a scale in {fmt.scale.name.upper()}"
    if fmt.tensor_scale is not None:
        scales += f", and the tensor has one in {fmt.tensor_scale.name.upper()}"
    return f"{fmt.name} ({standard}; values in {fmt.element.name.upper()}, {fmt.element.bits} bits; {scales})"


def _describe_cache(scheme: str | None) -> str:
    """How keys and values are quantized, in words."""
    if scheme is None:
        return "not quantized"
    name, spec = get_kv_cache_scheme(scheme)
    return (
        f"{name}: values in {spec.format.element.name.upper()}; the keys of a layer have one scale in "
        f"{spec.format.scale.name.upper()}, its values another (in the file)"
    )


def _rules(names: Iterable[str | None]) -> str:
    """For example "EVEN", or "FLOOR, NOT QUANTIZED" where schemes differ."""
    return ", ".join(sorted({(name or "not quantized").upper() for name in names}))


# ---- What was measured ----


def _measured(source: Path) -> dict[str, float]:
    """What Trainer measured on the model in `source`."""
    path = source / _RESULTS_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _eval_results(measured: dict[str, float], facts: CardFacts) -> list[EvalResult]:
    """The finite metrics as the Hub takes them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="custom",  # which data set of the Hub it is, if it is one, is not known
            dataset_name=facts.evaluation,
            metric_type=kind,
            metric_name=name,
            metric_value=measured[key],
        )
        for key, (kind, name) in _METRICS.items()
        if key in measured and math.isfinite(measured[key])
    ]


def _results_section(measured: dict[str, float], facts: CardFacts, is_of_this_model: bool) -> str:
    names = dict([_TRAIN_LOSS]) | {key: name for key, (_, name) in _METRICS.items()}
    rows = [f"| {name} | {measured[key]:.4f} |" for key, name in names.items() if key in measured]
    if not rows:
        return ""
    of_what = (
        "Measured on the fake-quantized model before it was packed: the weights of these files, and activations under\n"
        "the same rule."
        if is_of_this_model
        else "**Not of these files**: measured on the checkpoint that they were exported from, which had another\n"
        "quantization or none."
    )
    table = "\n".join(["| | |", "|---|---|", *rows])
    return f"\n## Results\n\n{of_what} Evaluation data: {facts.evaluation}.\n\n{table}\n"
