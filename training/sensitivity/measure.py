"""Measure the accuracy that each layer loses by quantization, and propose a mixed mapping within a bits budget.

    python -m training.sensitivity --model_name_or_path M --dataset D --bits_budget 5.0 --output_dir sensitivity
    python main.py --model_name_or_path M --quant_mapping sensitivity/mapping.json --dataset D --do_train True ...

Each unit (a layer, layers that engines fuse into one matrix, or all experts of a layer) is quantized alone, first in
the narrow and then in the wide scheme, and the divergence KL(unquantized || quantized) of the next-token distributions
is measured on `--samples` training samples (rows, when packed), evenly spread: the evaluation set, on which `main.py`
reports, must not choose.
The divergence that a unit saves by the wide scheme decides which get it (`bits_budget.py`). At the end the narrow,
the proposed and the wide model are measured as wholes, since divergences of single layers only about add up.

With --smooth_alpha the model is smoothed first, in FP32, by the samples that `main.py` takes, and with
--input_transform its inputs are transformed: give both programs the same values, or the ranking is that of a model
which is never trained. The model is measured as training computes it: FP32 masters under autocast.

The results are `mapping.json` (for --quant_mapping and `prepare_qat`, with all figures) and `sensitivity.png`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from data.command_line import DataclassParser
from data.sets.packing import check_packing
from data.supervised import make_supervised_data_module
from qat import get_scheme, prepare_qat
from qat.checkpoints.dialects import AUTO, resolved_format
from qat.checkpoints.dialects.compressed_tensors import CompressedTensors
from qat.errors import UserError
from qat.files.model_folder import check_model_folder
from qat.files.paths import check_apart, check_writable
from qat.layers.operands import Operands
from qat.layers.sites import quantized_sites
from qat.schemes.spec import Scheme

from ..arguments.data import DataArguments
from ..arguments.model import ModelArguments
from ..backends.cpu_bfloat16 import is_needed, use_fast_bfloat16
from ..losses.distillation import forward_kl, labelled_rows
from ..start.calibration import calibrate_with_data
from ..start.data_checks import check_fit, local_paths
from ..start.samples import SAMPLES
from ..start.skeleton import check_length, skeleton_of
from ..start.smoothing import smooth_with_data
from ..start.start import Start
from .arguments import SensitivityArguments
from .bits_budget import Unit, average_bits, find_units, propose
from .plot import draw

logger = logging.getLogger(__name__)


class Sensitivity:
    """Measures a prepared model, any of its layers quantized and the others not.

    Args:
        model: prepared by `prepare_qat`, in evaluation mode; its layers' schemes are changed.
        batches: token ids and labels, as the collator makes them.
    """

    def __init__(self, model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> None:
        self.model, self.batches = model, list(batches)
        self.layers: dict[str, list[Operands]] = {}  # experts have two products
        for site in quantized_sites(model):
            self.layers.setdefault(site.name, []).append(site.module)

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
        for name, module in [(name, module) for name, modules in self.layers.items() for module in modules]:
            if name in case:
                module.set_scheme(case[name])
            for quantizer in (module.weight_quantizer, module.input_quantizer):
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
        "input_transform": args.input_transform,
        "scale_rules": {scheme.name: scheme.rules for scheme in (narrow, wide)},
        "units": [
            {"name": u.name, "layers": list(u.layers), "weights": u.weights, "kl": u.kl, "wide": u in chosen}
            for u in sorted(units, key=lambda unit: -unit.kl[narrow.name])
        ],
    }


def main(argv: list[str] | None = None) -> None:
    """Check, load the model and data, measure, and write the results."""
    parser = DataclassParser((ModelArguments, DataArguments, SensitivityArguments), prog="training.sensitivity")
    model_args, data_args, args = parser.parse(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type == "cpu" and is_needed():
        use_fast_bfloat16()
    start, skeleton = check(model_args, data_args, args)
    tokenizer = start.load_tokenizer(args.model_max_length)
    data = make_supervised_data_module(tokenizer=tokenizer, model=skeleton, evaluate=False, **vars(data_args))
    check_fit(data, tokenizer, skeleton, args.model_max_length)
    model = start.load_model().eval()
    if data_args.packing:
        check_packing(model)
    prepare(model, args)
    if args.smooth_alpha:
        smooth_with_data(model, data, args.smooth_alpha, device)
    calibrate(model, data, args, device)
    round_weights(model)
    model.to(device)
    samples = spread_samples(data["train_dataset"], args.samples)
    batches = DataLoader(samples, args.per_device_eval_batch_size, collate_fn=data["data_collator"])
    result = propose_mapping(Sensitivity(model, batches), args) | {"samples": len(samples)}
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mapping.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, folder / "sensitivity.png")
    report(result, args, folder, model.config.model_type)


def check(
    model_args: ModelArguments, data_args: DataArguments, args: SensitivityArguments
) -> tuple[Start, PreTrainedModel]:
    """What is measured, and its model without weights: what cannot be measured or written is refused.

    Raises:
        UserError: a path cannot be read or written; the model is quantized or trained for it already; a pattern matches
            nothing; or a setting has no effect here.
    """
    name = model_args.model_name_or_path
    if data_args.streaming:
        raise UserError("--streaming True: samples are chosen evenly spread over the training set; leave it out")
    check_model_folder(name)
    inputs = [("--dataset", p) for spec in (data_args.dataset, data_args.eval_dataset) for p in local_paths(spec)]
    check_apart("--output_dir", args.output_dir, [("--model_name_or_path", name), *inputs])
    check_writable("--output_dir", args.output_dir)
    if data_args.data_cache_dir is not None:
        check_writable("--data_cache_dir", data_args.data_cache_dir)
    start = Start.read(model_args)
    if start.is_packed or start.qat_config is not None:
        how = "packed" if start.qat_config is None else start.qat_config.summary
        raise UserError(
            f"--model_name_or_path {name!r} is quantized already, or was trained to be ({how}), so it is no reference "
            "to measure against; give the unquantized model that it came from"
        )
    skeleton = skeleton_of(start)
    check_length(args.model_max_length, SensitivityArguments.model_max_length, skeleton.config)
    with contextlib.redirect_stdout(io.StringIO()):  # prepare prints when the model itself is prepared
        prepare(skeleton_of(start), args, args.wide_scheme)
        prepare(skeleton, args)
    return start, skeleton


def prepare(model: PreTrainedModel, args: SensitivityArguments, scheme: str | None = None) -> None:
    """Prepare all layers that are measured, for the narrow scheme or another."""
    mapping = {torch.nn.Linear: scheme or args.narrow_scheme}
    transforms = {} if args.input_transform == "none" else args.input_transform
    prepare_qat(model, mapping, args.ignore, args.weight_scale_rule, args.input_scale_rule, input_transforms=transforms)


def calibrate(model: PreTrainedModel, data: dict, args: SensitivityArguments, device: torch.device) -> None:
    """Calibrate the inputs of a prepared model for each scheme that needs it; it has the narrow scheme afterwards."""
    schemes = [get_scheme(name, args.weight_scale_rule, args.input_scale_rule) for name in args.schemes]
    for scheme in reversed(schemes):
        for site in quantized_sites(model):
            site.module.set_scheme(scheme)
        calibrate_with_data(model, data, SAMPLES, device)


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
    for site in quantized_sites(model):
        for parameter in site.owner.parameters(recurse=False):
            if parameter is not embedding:
                parameter.data = parameter.data.to(torch.bfloat16)


def report(result: dict, args: SensitivityArguments, folder: Path, model_type: str) -> None:
    """The figures that matter, and the command that trains with the mapping, on standard output."""
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
    same += ["input_transform"] * (args.input_transform != "none")
    flags = "".join(f" --{name} {getattr(args, name)}" for name in same)
    if resolved_format(AUTO, model_type) != CompressedTensors.name:  # a native format holds no mapping of linear layers
        flags += f" --export_format {CompressedTensors.name}"
    print(f"\n{folder / 'sensitivity.png'}\nmain.py --quant_mapping {folder / 'mapping.json'}{flags}")


if __name__ == "__main__":
    main()
