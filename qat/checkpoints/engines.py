"""What inference engines compute for a packed folder, printed: after an export, and as the table of docs/serving.md.

    python -m qat.checkpoints.engines          # the table of docs/serving.md, from engine_facts.py

Engines quantize activations themselves, under a rule of their own or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..layers.fused import fused_groups
from ..schemes.config import QATConfig
from ..schemes.patterns import EXPRESSION
from ..schemes.presets import PRESETS, get_scheme
from ..schemes.spec import Scheme
from .dialects import dialect_of, get_dialect
from .dialects.compressed_tensors import layout_name
from .engine_facts import (
    AS_TRAINED,
    CHOSEN,
    ENGINES,
    MXFP4,
    MXFP8,
    NATIVE_ENGINES,
    NATIVE_SOURCES,
    OPEN,
    SOURCES,
    Engine,
    Fact,
    Kind,
)
from .folder import CheckpointFolder
from .in_transformers import InTransformers, in_transformers
from .input_transforms import APPLIED_BY_VLLM, is_stored

NOT_KNOWN = Fact("not known", "")
_EXPERT = re.compile(r"\bexperts\.\d+\.\w+\.weight_scale$")


def kind_of(scheme: Scheme) -> Kind:
    """The formats of a scheme's weights and inputs: all that its packed folder says."""
    return scheme.weight.format.name, None if scheme.input is None else scheme.input.format.name


def engine_table(
    schemes: Iterable[Scheme],
    export_format: str,
    kv_cache: bool = False,
    split: Sequence[str] = (),
    experts: Iterable[Scheme] = (),
    transformers: InTransformers | None = None,
) -> str:
    """A table for a packed folder, one row for each engine, and how each differs from the training.

    Args:
        schemes: those of the folder's layers, under the rules of the training.
        export_format: a name of `dialects.DIALECTS`.
        kv_cache: whether the folder holds scales of a key/value cache in FP8.
        split: layers that vLLM fuses into one matrix and that differ in scheme, for which it refuses the folder.
        experts: schemes of packed experts.
        transformers: how transformers loads the folder, if that is known.
    """
    found, of_experts = _distinct(schemes), _distinct(experts)
    loading = transformers or InTransformers()
    rows, different = [], {scheme.name: list[str]() for scheme in (*found, *of_experts)}
    for engine in _readers(export_format):
        name = engine.name.replace("`", "")
        if split and name.startswith("vLLM"):
            rows.append((name, "refused: layers that it fuses differ in scheme", ""))
            continue
        is_transformers = name.startswith("transformers")
        if is_transformers and loading.why_not:
            rows.append((name, f"cannot load the folder: {loading.why_not}", ""))
            continue
        cells = [(scheme.name, _fact(engine, scheme, export_format)) for scheme in found]
        for scheme, (_, fact) in zip(found, cells, strict=True):
            if difference := _difference(scheme, fact):
                different[scheme.name].append(f"{name} ({difference})")
        for scheme in of_experts:
            facts = engine.facts if is_transformers and loading.experts_as_linear else engine.experts
            fact = facts.get(kind_of(scheme), NOT_KNOWN)
            cells.append((f"experts in {scheme.name}", fact))
            if difference := _difference(scheme, fact):
                different[scheme.name].append(f"experts in {name} ({difference})")
        if kv_cache:
            cells.append(("key/value cache", engine.kv_cache or NOT_KNOWN))
        text = "; ".join(f"{of}: {fact.text}" if len(cells) > 1 else fact.text for of, fact in cells).replace("`", "")
        known = SOURCES | NATIVE_SOURCES
        sources = "; ".join(dict.fromkeys(known[fact.source] for _, fact in cells if fact.source))
        rows.append((name, text, f"({sources})" if sources else ""))
    named = list(dict.fromkeys(scheme.name for scheme in (*found, *of_experts)))
    lines = [f"What engines compute for {' and '.join(named)} in this folder:"]
    width = max(len(name) for name, *_ in rows)
    lines += [f"  {name.ljust(width)}  {text}  {source}".rstrip() for name, text, source in rows]
    for scheme in _distinct((*found, *of_experts)):
        if engines := different[scheme.name]:
            lines.append(f"{scheme.name} stands for {_trained(scheme)}. Different: {'; '.join(engines)}")
    if split:
        lines.append(f"vLLM fuses {', '.join(split)}; give them one scheme to serve the folder there")
    if options := get_dialect(export_format).serve_options([*found, *of_experts]):
        lines.append(f"What the file cannot hold: vllm serve DIR {' '.join(options)}")
    return "\n".join(lines)


def table_of_folder(folder: str | Path, trust_remote_code: bool = False) -> str:
    """`engine_table` of a packed folder, from its config.json and qat_config.json.

    Raises:
        UserError: it is no packed folder of ours.
    """
    checkpoint, saved = CheckpointFolder.open(folder, "the packed folder"), QATConfig.load(folder)
    config = checkpoint.quantization_config or {}
    dialect = dialect_of(config, folder)
    rules = {} if saved is None else saved.scale_rules
    schemes = [get_scheme(name).with_rules(**rule) for name, rule in rules.items()]
    split = next(_split_groups(checkpoint.names, config), ())
    linear, experts = _schemes_by_kind(schemes, checkpoint.names, config)
    has_cache = config.get("kv_cache_scheme") is not None
    table = engine_table(linear, dialect.name, has_cache, split, experts, in_transformers(folder, trust_remote_code))
    return f"{table}\n{APPLIED_BY_VLLM}" if is_stored(config) else table


def _distinct(schemes: Iterable[Scheme]) -> list[Scheme]:
    return list({(scheme.name, scheme.input and scheme.input.rule): scheme for scheme in schemes}.values())


def _schemes_by_kind(
    schemes: list[Scheme], tensors: Iterable[str], config: Mapping
) -> tuple[list[Scheme], list[Scheme]]:
    """Those of the schemes that linear layers are packed in, and those of experts, which expressions name."""
    if not any(_EXPERT.search(name) for name in tensors):
        return schemes, []
    named: dict[bool, set[str]] = {True: set(), False: set()}  # formats, by whether an expression names the layers
    for group in config.get("config_groups", {}).values():
        for target in group["targets"]:
            named[target.startswith(EXPRESSION)].add(group["format"])
    experts = named[True] or named[False]
    layouts = [(scheme, layout_name(scheme.weight.format)) for scheme in schemes]
    return [s for s, layout in layouts if layout in named[False]], [s for s, layout in layouts if layout in experts]


def _split_groups(tensors: Iterable[str], config: Mapping) -> Iterator[list[str]]:
    """Layers that engines fuse and that are in different groups of the configuration, or partly unquantized."""
    groups = enumerate(config.get("config_groups", {}).values())
    named = {target: number for number, group in groups for target in group["targets"]}
    parts = {tuple(name.rsplit(".", 1)) for name in tensors if "." in name}
    layers = {layer for layer, part in parts if part in ("weight", "weight_packed")}
    of = {layer: named.get(layer, -1) if (layer, "weight_scale") in parts else None for layer in layers}
    return (group for group in fused_groups(sorted(layers)) if len({of[layer] for layer in group}) > 1)


def markdown() -> str:
    """The table of docs/serving.md: schemes by engines, and where each fact is from."""
    marks = {source: str(i) for i, source in enumerate(SOURCES, 1)}
    kinds: dict[Kind, list[str]] = {}
    for scheme in PRESETS.values():
        kinds.setdefault(kind_of(scheme), []).append(f"`{scheme.name}`")
    rows = [["scheme", *(engine.name for engine in ENGINES)], ["---"] * (1 + len(ENGINES))]
    for kind, names in kinds.items():
        facts = (engine.facts.get(kind, NOT_KNOWN) for engine in ENGINES)
        rows.append([", ".join(names), *(_cell(fact, marks) for fact in facts)])
    for kind in dict.fromkeys(kind for engine in ENGINES for kind in engine.experts):
        facts = (engine.experts.get(kind, NOT_KNOWN) for engine in ENGINES)
        rows.append([f"experts in {', '.join(kinds[kind])}", *(_cell(fact, marks) for fact in facts)])
    caches = (engine.kv_cache or NOT_KNOWN for engine in ENGINES)
    rows.append(["key/value cache in FP8", *(_cell(fact, marks) for fact in caches)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{table}\n\n" + "\n".join(f"* [{marks[source]}] {text}" for source, text in SOURCES.items())


def _readers(export_format: str) -> Iterable[Engine]:
    if get_dialect(export_format).packs_fused:
        return NATIVE_ENGINES
    return (engine for engine in ENGINES if engine.dialect in (None, export_format))


def _fact(engine: Engine, scheme: Scheme, export_format: str) -> Fact:
    """What is known about the scheme; of AutoRound's format, engines were examined with MX formats alone."""
    kind = kind_of(scheme)
    if export_format == "auto_round" and engine.dialect is None and kind not in (MXFP4, MXFP8):
        return NOT_KNOWN
    return engine.facts.get(kind, NOT_KNOWN)


def _trained(scheme: Scheme) -> str:
    spec = scheme.input
    return f"activations in {spec.format.name} under {spec.rule.upper()}" if spec else "unquantized activations"


def _difference(scheme: Scheme, fact: Fact) -> str | None:
    """How the engine's activations differ from those of the training; None: they do not, or it is not known."""
    if fact is NOT_KNOWN or not fact.serves or fact.inputs == OPEN:
        return None
    trained = None if scheme.input is None else scheme.input.format.name
    if fact.inputs is None:
        return None if trained is None else "not quantized"
    if fact.inputs != trained:
        return f"{fact.inputs} under {fact.rule.upper()}" if fact.rule else fact.inputs
    if fact.rule in (None, AS_TRAINED, CHOSEN) or scheme.input is None or fact.rule == scheme.input.rule:
        return None
    return fact.rule.upper()


def _cell(fact: Fact, marks: dict[str, str]) -> str:
    return f"{fact.text} [{marks[fact.source]}]" if fact.source else fact.text


if __name__ == "__main__":
    print(markdown())
