"""One family, one process: make its tiny model, train it by the recipe, pack it, and look at the packed folder.

What main.py proves in processes of its own is proven in forks here, which start in an instant; everything else is what
a user runs. The folder is then loaded once more, as a user loads it, and compared with the fake-quantized model.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from helpers import ROOT, write_conversations
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .entries import BESIDE, FAILED, NOT_BUILT, PROVEN, REFUSED, WEIGHTS_PROVEN

RECIPE = (
    "--quant_scheme", "MXFP4", "--smooth_alpha", "0.7", "--weight_scale_rule", "search", "--input_scale_rule", "even",
    "--distill", "True", "--do_train", "True", "--do_eval", "True", "--max_steps", "3", "--eval_size", "8",
    "--model_max_length", "128", "--per_device_train_batch_size", "4", "--report", "False", "--report_to", "none",
    "--disable_tqdm", "True",
)  # fmt: skip
RESULT = "result.json"
_TOKENS = 48


@dataclass
class Result:
    """What became of an entry.

    Attributes:
        stage: the last one begun: model, run, proof, load, logits, generate.
        message: one line about what ended it, or why its logits are not proven.
        share: of the elements of all weights with two or more dimensions, embeddings and head aside, the quantized.
        smoothed: what the log says of smoothing.
    """

    entry: str
    outcome: str = FAILED
    stage: str = "model"
    message: str = ""
    share: float | None = None
    smoothed: str = ""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write it into the entry's folder."""
        (folder / RESULT).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Result:
        """What `save` wrote."""
        return cls(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def attempt(entry: str, folder: str, flags: tuple[str, ...] = ()) -> None:
    """Body of an entry's process: fills `folder` with model, data, log, output and result."""
    path = Path(folder)
    _log_to(path / "log.txt")
    os.chdir(ROOT)
    result = Result(entry)
    result.save(path)
    from qat.errors import UserError

    try:
        _attempt(result, path, flags)
    except (UserError, SystemExit) as error:
        result.outcome, result.message = REFUSED, _line(error)
    except BaseException as error:
        traceback.print_exc()
        result.outcome = NOT_BUILT if result.stage == "model" else FAILED
        result.message = f"{type(error).__name__}: {_line(error)}"
    _read_log(result, path)
    result.save(path)


def _attempt(result: Result, path: Path, flags: tuple[str, ...]) -> None:
    from main import main
    from qat.checkpoints import verify_logits

    from .models import save_tiny

    verify_logits._Process = _Fork
    save_tiny(result.entry, path / "model")
    if result.entry in BESIDE:
        _extract_text_model(path / "model")
    _begin(result, path, "run")
    write_conversations(path / "data.jsonl", 72)
    main(
        [
            "--model_name_or_path", str(path / "model"), "--dataset", str(path / "data.jsonl"),
            "--data_cache_dir", str(path / "cache"), "--output_dir", str(path / "out"), *RECIPE, *flags,
        ]
    )  # fmt: skip
    _begin(result, path, "proof")
    (packed,) = {file.parent for file in (path / "out").glob("*/verification.json")}
    verdict = json.loads((packed / "verification.json").read_text())
    assert verdict["verified"] and not verdict["weights"]["elements_that_differ"], verdict
    _begin(result, path, "load")
    trained = AutoModelForCausalLM.from_pretrained(path / "out", dtype=torch.bfloat16).eval()
    result.share = verdict["weights"]["elements_compared"] / _linear_elements(trained)
    if not (verdict["logits"] or {}).get("bit_equal"):
        result.outcome, result.message = WEIGHTS_PROVEN, _line(_reason(verdict))
        return
    _compare(result, path, packed, trained, verdict["logits"])
    result.outcome = PROVEN


def _extract_text_model(folder: Path) -> None:
    """Follow the remedy that main.py names for a multimodal model: `python scripts/text_model.py SRC DST`."""
    from qat.checkpoints.text_model import extract_text_model

    whole = folder.rename(folder.with_name("multimodal"))
    extract_text_model(whole, folder)


def _compare(result: Result, path: Path, packed: Path, trained: nn.Module, proof: dict) -> None:
    """Load the packed folder as a user does, compare its logits with the fake-quantized model's, generate."""
    from qat import QATConfig
    from qat.layers.restore import prepare_as_saved

    model, info = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"], f"missing when loaded: {sorted(info['missing_keys'])[:3]}"
    _begin(result, path, "logits")
    text = "What is 3 plus 4? It is 7. What is the sum of 20 and 30? It is 50."
    ids = torch.tensor([AutoTokenizer.from_pretrained(packed)(text)["input_ids"][:_TOKENS]])
    prepare_as_saved(trained, QATConfig.load(packed))
    trained.config._is_quantized = True  # Jamba computes dt_proj in another order then
    _compute_as_engine(trained, proof)
    with torch.no_grad():
        found, expected = (m.eval()(ids, use_cache=False).logits for m in (model, trained))
    assert expected.isfinite().all() and expected.std() > 0, "logits are constant or not finite"
    assert torch.equal(found, expected), f"logits differ by {(found - expected).abs().max()}"
    _begin(result, path, "generate")
    generated = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape[1] >= ids.shape[1] + 4 or generated.shape[1] == 4


def _compute_as_engine(model: nn.Module, proof: dict) -> None:
    """Quantize the inputs of each site by the rule that the verdict says transformers has for it, or not at all."""
    from qat.layers.restore import set_scale_rules
    from qat.layers.sites import quantized_sites

    rules = proof["engine_activation_rules"]
    of_experts = proof.get("engine_activation_rules_of_experts") or dict.fromkeys(rules)
    set_scale_rules(model, {scheme: {"input": rule} for scheme, rule in rules.items() if rule})
    for site in quantized_sites(model):
        if (of_experts if site.kind == "experts" else rules)[site.scheme.name] is None:
            site.module.input_quantizer.disable()


def _linear_elements(model: nn.Module) -> int:
    """Elements of all weights with two or more dimensions, without embeddings, the output head, and towers."""
    left = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    left |= {id(head.weight)} if head is not None else set()
    text = model.get_decoder() if hasattr(model.config, "vision_config") else model
    return sum(p.numel() for p in text.parameters() if p.dim() >= 2 and id(p) not in left)


def _reason(verdict: dict) -> str:
    logits = verdict["logits"] or {}
    return verdict.get("why_no_logits") or logits.get("why_not_bit_equal") or "no logits were compared"


def _begin(result: Result, path: Path, stage: str) -> None:
    result.stage = stage
    result.save(path)


def _line(error: object) -> str:
    return " ".join(str(error).split())


def _read_log(result: Result, path: Path) -> None:
    text = (path / "log.txt").read_text(errors="replace")
    if found := re.search(r"[Ss]moothed (\d+(?: of \d+)?) activations?.*", text):
        result.smoothed = found[1]
    result.warnings = sorted(set(re.findall(r"(?:WARNING|warning)\W+(.{,300})", text)))[:20]


def _log_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))


class _Fork:
    """A process for logits, by a fork that has imported everything; it has ended when `begin` returns."""

    def __init__(self, processes: ExitStack) -> None:
        self.folder = Path(processes.enter_context(tempfile.TemporaryDirectory()))
        self.errors = self.folder / "errors.txt"

    def begin(self, arguments: list[str]) -> None:
        given = ("qat.checkpoints.verify_logits", arguments, self.errors)
        self.process = multiprocessing.get_context("fork").Process(target=_run_module, args=given)
        self.process.start()
        self.process.join()

    def status(self) -> int:
        return self.process.exitcode or 0


def _run_module(module: str, arguments: list[str], log: Path) -> None:
    _log_to(log)
    import_module(module).main(arguments)
