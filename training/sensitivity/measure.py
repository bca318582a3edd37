"""Measure the accuracy that each layer loses by quantization, and propose a mixed mapping within a bits budget.

    python -m training.sensitivity --model_name_or_path M --dataset D --bits_budget 5.0 --output_dir sensitivity
    python main.py --model_name_or_path M --quant_mapping sensitivity/mapping.json --dataset D --do_train True ...

Each unit (a layer, or layers that engines fuse into one matrix) is quantized alone, first in the narrow and then in the
wide scheme, and the divergence KL(unquantized || quantized) of the next-token distributions is measured on `--samples`
training samples (rows, when packed), evenly spread: the evaluation set, on which `main.py` reports, must not choose.
The divergence that a unit saves by the wide scheme decides which get it (`bits_budget.py`). At the end the narrow,
the proposed and the wide model are measured as wholes, since divergences of single layers only about add up.

With --smooth_alpha the model is smoothed first, in FP32, by the samples that `main.py` takes: give both the same value,
or the ranking is that of a model which is never trained. The model is measured as training computes it: FP32 masters
under autocast.

The results are `mapping.json` (for --quant_mapping and `prepare_qat`, with all figures) and `sensitivity.png`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from data.supervised import make_supervised_data_module
from qat import SCHEMES, get_scheme, is_quantlinear, prepare_qat
from qat.errors import UserError
from qat.schemes.presets import input_rules, weight_rules
from qat.schemes.spec import Scheme

from ..arguments.data import DataArguments
from ..arguments.model import ModelArguments
from ..arguments.quantization import check_smooth_alpha
from ..backends.cpu_bfloat16 import is_needed, use_fast_bfloat16
from ..losses.distillation import forward_kl, labelled_rows
from ..start.loading import load_tokenizer
from ..start.smoothing import smooth_with_data
from ..start.start import load_model
from .bits_budget import Unit, average_bits, find_units, nominal_bits, propose
from .plot import draw

logger = logging.getLogger(__name__)
UNITS = ("projection", "block")


@dataclass
class SensitivityArguments:
    """What is measured, and the bits budget."""

    output_dir: str = field(default="sensitivity", metadata={"help": "Folder for mapping.json and sensitivity.png."})
    bits_budget: float = field(default=5.0, metadata={"help": "Bits per quantized weight on average, scales included."})
    narrow_scheme: str = field(default="MXFP4", metadata={"help": f"For most layers: one of {', '.join(SCHEMES)}."})
    wide_scheme: str = field(default="MXFP8", metadata={"help": "For the layers that gain most by it."})
    weight_scale_rule: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(weight_rules())}; default: the schemes' own."}
    )
    input_scale_rule: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(input_rules())}; default: the schemes' own."}
    )
    smooth_alpha: float = field(
        default=0.0, metadata={"help": "Smooth the model first, as main.py does with the same value. 0: off."}
    )
    units: str = field(
        default="projection",
        metadata={
            "help": "What gets one scheme: projection (layers, those that engines fuse together), or block (all layers "
            "of a numbered block; fewer measurements).",
            "choices": list(UNITS),
        },
    )
    ignore: list[str] = field(
        default_factory=lambda: ["lm_head"], metadata={"help": "Layers to leave unquantized, names or globs."}
    )
    samples: int = field(
        default=64,
        metadata={
            "help": "Training samples to measure on, evenly spread (rows with --packing); all if there are fewer."
        },
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Samples computed at once."})
    model_max_length: int = field(default=512, metadata={"help": "Samples are cut at this many tokens."})

    def __post_init__(self) -> None:
        check_smooth_alpha(self.smooth_alpha)
        if self.samples < 1:
            raise UserError(f"--samples {self.samples}: at least 1 training sample is needed to measure on")
        schemes = [get_scheme(name, self.weight_scale_rule, self.input_scale_rule) for name in self.schemes]
        self.narrow_scheme, self.wide_scheme = (scheme.name for scheme in schemes)
        low, high = map(nominal_bits, schemes)
        if not low < high:
            raise UserError(f"--wide_scheme {self.wide_scheme} is not wider than --narrow_scheme {self.narrow_scheme}")
        if not low <= self.bits_budget <= high:
            raise UserError(
                f"--bits_budget {self.bits_budget} must lie between the {low} bits a weight of {schemes[0].name} and "
                f"the {high} of {schemes[1].name}"
            )

    @property
    def schemes(self) -> tuple[str, str]:
        """The narrow one and the wide one."""
        return self.narrow_scheme, self.wide_scheme


class Sensitivity:
    """Measures a prepared model, any of its layers quantized and the others not.

    Args:
        model: prepared by `prepare_qat`, in evaluation mode; its layers' schemes are changed.
        batches: token ids and labels, as the collator makes them.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        self.model, self.batches = model, list(batches)
        self.layers = {name: module for name, module in model.named_modules() if is_quantlinear(module)}

    def measure_units(self, units: list[Unit], schemes: tuple[Scheme, ...]) -> None:
        """Fill in the divergence of each unit under each scheme."""
        cases = [(unit, scheme) for scheme in schemes for unit in units]
        kl = self.measure([dict.fromkeys(unit.layers, scheme) for unit, scheme in cases])
        for (unit, scheme), value in zip(cases, kl, strict=True):
            unit.kl[scheme.name] = value

    @torch.no_grad()
    def measure(self, cases: list[dict[str, Scheme]]) -> list[float]:
        """Divergence per token from the unquantized model, in nats, for each choice of quantized layers."""
        total, tokens = torch.zeros(len(cases), dtype=torch.float64), 0
        with tqdm(total=len(self.batches) * (len(cases) + 1), desc="Sensitivity", unit="pass", leave=False) as progress:
            for batch in self.batches:
                reference = self._rows(batch, {})
                tokens += len(reference)
                progress.update()
                for i, case in enumerate(cases):
                    total[i] += forward_kl(self._rows(batch, case), reference).double().sum().cpu()
                    progress.update()
        return (total / max(tokens, 1)).tolist()

    def _rows(self, batch: dict[str, torch.Tensor], case: dict[str, Scheme]) -> torch.Tensor:
        for name, layer in self.layers.items():
            if name in case:
                layer.set_scheme(case[name])
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                quantizer.enable() if name in case else quantizer.disable()
        batch = {key: value.to(self.model.device) for key, value in batch.items()}
        labels = batch.pop("labels")
        with torch.autocast(self.model.device.type, torch.bfloat16):
            return labelled_rows(self.model(**batch, use_cache=False).logits, labels)


def propose_mapping(sensitivity: Sensitivity, args: SensitivityArguments) -> dict:
    """Measure all units, choose, measure the whole models; what `mapping.json` holds."""
    rules = args.weight_scale_rule, args.input_scale_rule
    narrow, wide = (get_scheme(name, *rules) for name in args.schemes)
    units = find_units(sensitivity.model, by_block=args.units == "block")
    sensitivity.measure_units(units, (narrow, wide))
    chosen = propose(units, narrow, wide, args.bits_budget)
    widened = dict.fromkeys((layer for unit in chosen for layer in unit.layers), wide.name)
    all_narrow, all_wide = (dict.fromkeys(sensitivity.layers, scheme) for scheme in (narrow, wide))
    whole = sensitivity.measure([all_narrow, all_narrow | dict.fromkeys(widened, wide), all_wide])
    # In the model's order, without narrow layers that the first key covers; all wide needs no first key.
    mapping = {"torch.nn.Linear": narrow.name} if len(widened) < len(sensitivity.layers) else {}
    mapping |= {name: wide.name for name in sensitivity.layers if name in widened}
    return {
        "mapping": mapping,
        "ignore": args.ignore,
        "bits_per_weight": average_bits(units, chosen, narrow, wide),
        "bits_budget": args.bits_budget,
        "kl": dict(zip((narrow.name, "mixed", wide.name), whole, strict=True)),
        "smooth_alpha": args.smooth_alpha,
        "scale_rules": {scheme.name: scheme.rules for scheme in (narrow, wide)},
        "units": [
            {"name": u.name, "layers": list(u.layers), "weights": u.weights, "kl": u.kl, "wide": u in chosen}
            for u in sorted(units, key=lambda unit: -unit.kl[narrow.name])
        ],
    }


def main(argv: list[str] | None = None) -> None:
    """Load the model and data, measure, and write the results."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SensitivityArguments))
    try:
        model_args, data_args, args = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type == "cpu" and is_needed():
        use_fast_bfloat16()
    model = load_model(model_args).eval()
    tokenizer = load_tokenizer(model_args, args.model_max_length)
    options = {**vars(data_args), "streaming": False}
    data = make_supervised_data_module(tokenizer=tokenizer, model=model, evaluate=False, **options)
    mapping = {torch.nn.Linear: args.narrow_scheme}
    prepare_qat(model, mapping, args.ignore, args.weight_scale_rule, args.input_scale_rule)
    if args.smooth_alpha:
        smooth_with_data(model, data, args.smooth_alpha, device)
    round_weights(model)
    model.to(device)
    samples = spread_samples(data["train_dataset"], args.samples)
    batches = DataLoader(samples, args.per_device_eval_batch_size, collate_fn=data["data_collator"])
    result = propose_mapping(Sensitivity(model, batches), args) | {"samples": len(samples)}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mapping.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, folder / "sensitivity.png")
    report(result, args, folder)


def spread_samples(dataset, count: int) -> list[dict]:
    """At most `count` samples at even distances: the first rows, when packed, are those of the longest samples."""
    count = min(count, len(dataset))
    return [dataset[i * len(dataset) // count] for i in range(count)]


def round_weights(model: PreTrainedModel) -> None:
    """Keep the weights of quantized layers in BF16: half the memory, and the numbers that autocast makes of FP32 ones.

    Everything else stays FP32, as in training: norms, whose weights autocast does not round, buffers, and the
    embedding, whose dtype is that of the residual stream.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if is_quantlinear(module) and module.weight is not embedding:
            module.to(torch.bfloat16)


def report(result: dict, args: SensitivityArguments, folder: Path) -> None:
    """The figures that matter, on standard output."""
    narrow, wide = args.schemes
    print(
        f"\nKL to the unquantized model when only one unit is quantized, nats a token (of {len(result['units'])}), "
        f"on {result['samples']} training samples"
    )
    for unit in result["units"][:10]:
        mark = f"  -> {wide}" if unit["wide"] else ""
        print(f"  {unit['name']:<50} {narrow} {unit['kl'][narrow]:.5f}   {wide} {unit['kl'][wide]:.5f}{mark}")
    widened = sum(unit["wide"] for unit in result["units"])
    print(f"\n{widened} units in {wide}: {result['bits_per_weight']:.3f} bits a weight (budget {args.bits_budget})")
    for name, kl in result["kl"].items():
        print(f"  KL of the whole model, {name:<12} {kl:.5f}")
    same = [name for name in ("smooth_alpha", "weight_scale_rule", "input_scale_rule") if getattr(args, name)]
    flags = "".join(f" --{name} {getattr(args, name)}" for name in same)
    print(f"\n{folder / 'sensitivity.png'}\nmain.py --quant_mapping {folder / 'mapping.json'}{flags}")


if __name__ == "__main__":
    main()
