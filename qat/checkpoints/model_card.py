"""The model card of a packed checkpoint: where it comes from, how it was rounded, how good it is, how to serve it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from ..schemes.config import QATConfig
from ..schemes.spec import Scheme
from .dialects import Dialect

_METRICS = ("train_loss", "eval_loss", "eval_perplexity")  # of Trainer's all_results.json
_RESULTS_NAME = "all_results.json"

_TEMPLATE = """---
{front_matter}
---

# {title}

{scheme} weights and activations, packed as {export_format}: {packed_mib:.1f} MiB,
{ratio:.2f} of the {source_mib:.1f} MiB it was exported from.

| | |
|---|---|
| base model | {base_model} |
| schemes | {mapping} |
| left unquantized | {ignored} |
| scale rule of the weights | {weight_rules} (the scales are in the file) |
| scale rule of the activations in training | {input_rules} |
| the same in transformers, for this format | {engine_rules} |
| training data | {dataset} |
{metrics}
`qat_config.json` holds the quantization as it was trained; `verification.json`, where present, tells how these files
were compared with the fake-quantized model.

## Serve

```
vllm serve {path}
```

## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}", dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```
"""


@dataclass(frozen=True)
class CardFacts:
    """What the files of a checkpoint do not tell: the model that training began from, and the data it saw."""

    base_model: str | None = None
    dataset: str | None = None


def write_card(
    folder: Path,
    path: str,
    source: Path,
    facts: CardFacts,
    qat_config: QATConfig,
    layers: dict[str, Scheme],
    dialect: Dialect,
    source_bytes: int,
    packed_bytes: int,
) -> None:
    """Write `README.md` into `folder`; `path` is where the folder will be served from."""
    base_model = facts.base_model or str(source)
    schemes = sorted({scheme.name for scheme in layers.values()})
    tags = [dialect.name.replace("_", "-"), *schemes]
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
    if facts.base_model and not Path(facts.base_model).exists():
        data.base_model = facts.base_model  # a hub id; a local path is no link
    text = _TEMPLATE.format(
        front_matter=data.to_yaml().strip(),
        title=f"{Path(base_model).name} {' + '.join(schemes)}",
        scheme=" and ".join(schemes),
        export_format=dialect.name,
        packed_mib=packed_bytes / 2**20,
        source_mib=source_bytes / 2**20,
        ratio=packed_bytes / source_bytes,
        base_model=base_model,
        mapping=", ".join(f"{key}: {scheme}" for key, scheme in qat_config.mapping.items()),
        ignored=", ".join(qat_config.ignore) or "nothing",
        weight_rules=_rules(scheme.rules["weight"] for scheme in layers.values()),
        input_rules=_rules(scheme.rules["input"] for scheme in layers.values()),
        engine_rules=_rules(dialect.input_rule(scheme) for scheme in layers.values()),
        dataset=facts.dataset or "not recorded",
        metrics=_metrics(source),
        path=path,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _rules(names: Iterable[str | None]) -> str:
    return ", ".join(sorted({(name or "not quantized").upper() for name in names}))


def _metrics(source: Path) -> str:
    """Table rows of what Trainer measured on the fake-quantized model in `source`."""
    path = source / _RESULTS_NAME
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return "".join(f"| {key} | {results[key]:.4f} |\n" for key in _METRICS if key in results)
