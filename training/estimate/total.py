"""The estimate: the rows of memory at the peak of a step, for one process."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from qat.layers.lora import adapters
from qat.layers.sites import quantized_sites

from ..optimizers.muon import hidden_matrices
from . import optimizers
from .dry_run import BACKWARD, DryRun, NotOnFakeTensors, dry_run
from .fake_model import layers_of, parameters_of, with_adapters
from .live_bytes import Moment
from .plan import COPY, DDP, Plan
from .rough import rough_run

MUON = "muon"
OPTIMIZER = "optimizer's step"
PARAMETERS, GATHERED, STATES, TEACHER, BUCKETS, WORKSPACES, GRADIENTS, WORK = (
    "parameters", "gathered layers", "optimizer states", "teacher", "buckets of DDP", "cuBLAS workspaces", "gradients",
    "activations and temporaries",
)  # fmt: skip
_WORKSPACES = 2 * 32 << 20  # cuBLAS, on Hopper: of the thread that runs the forward pass, and of the backward pass's
_LAYERS_AT_ONCE = 2  # that FSDP has gathered: the one that computes, and the next one
_GRADIENTS_AT_ONCE = 2  # of layers, whole: of the one that computes, and of the one that is being reduced


@dataclass
class Estimate:
    """Memory of one process, in bytes.

    Attributes:
        rows: what exists at the peak; the total is their sum.
        when: the phase of the step in which the peak is.
        kept: for the backward pass, when the loss begins.
        rougher: why the estimate is rougher than usual; empty where it is not.
    """

    rows: dict[str, int]
    when: str
    kept: int
    rougher: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.rows.values())


class Estimator:
    """Estimates runs of one model; steps that differ in closed forms only are computed once.

    Args:
        student: prepared for its schemes, parameters on the meta device.
        teacher: another model, likewise; None: a copy of the student teaches, where one is asked for.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None = None) -> None:
        self.student = student
        self.teacher = teacher or student
        self._adapted: dict[tuple[int, str], PreTrainedModel] = {}
        self._runs: dict[tuple, tuple[DryRun, str | None]] = {}

    def estimate(self, plan: Plan) -> Estimate:
        """The memory of a run."""
        run, problem = self._run(plan)
        always = {name: size for name, size in self._always(plan).items() if size}
        moments = {phase: self._rows(plan, run, phase, moment) for phase, moment in run.peaks.items()}
        if plan.trains:
            moments[OPTIMIZER] = self._rows_of_step(plan)
        when = max(moments, key=lambda phase: sum(moments[phase].values()))
        kept = run.kept - _offloaded(self.student, plan)
        return Estimate({**always, **moments[when]}, when, kept, self._rougher(plan, problem))

    # ---- What exists during the whole step ----

    def _always(self, plan: Plan) -> dict[str, int]:
        parts, on_device = plan.backend.parts, not plan.backend.offloads
        rows = {PARAMETERS: self._parameter_bytes(plan) // parts * on_device}
        if plan.backend.shards:
            rows[GATHERED] = self._gathered(plan)
        if plan.trains:
            trained = self._trained(plan)
            rows[STATES] = self._state_bytes(plan) // parts * on_device
            rows[BUCKETS] = sum(_size(*each) for each in trained) if plan.backend.name == DDP else 0
        if plan.teacher == COPY:
            head = 2 * self.teacher.get_output_embeddings().weight.numel() if plan.backend.shards else 0
            rows[TEACHER] = 2 * sum(p.numel() for p in self.teacher.parameters()) // parts + head
        rows[WORKSPACES] = _WORKSPACES if plan.device == "cuda" else 0
        return rows

    def student_of(self, plan: Plan) -> PreTrainedModel:
        """The student, with adapters where the plan has some."""
        if not plan.lora_r or adapters(self.student):  # those of a run that is about to start are there already
            return self.student
        key = plan.lora_r, plan.lora_target
        if key not in self._adapted:
            self._adapted[key] = with_adapters(self.student, *key)
        return self._adapted[key]

    def _trained(self, plan: Plan) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of what is trained."""
        dtype = torch.float32 if plan.lora_r else plan.master_dtype
        return [(tuple(p.shape), dtype) for p in self.student_of(plan).parameters() if p.requires_grad]

    def _state_bytes(self, plan: Plan) -> int:
        """States of the optimizer; Muon has AdamW update what is no hidden matrix."""
        model = self.student_of(plan)
        hidden = hidden_matrices(model) if plan.optimizer == MUON else set()
        names: dict[str, list[tuple[int, ...]]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                own = "adamw_torch" if plan.optimizer == MUON and name not in hidden else plan.optimizer
                names.setdefault(own, []).append(tuple(p.shape))
        dtype = plan.moment_dtype if _has_bfloat16_masters(plan) else torch.float32
        return sum(
            optimizers.state_bytes(name, plan.optimizer_args, shapes, dtype, plan.device)
            for name, shapes in names.items()
        )

    def _parameter_bytes(self, plan: Plan) -> int:
        """Masters; with adapters FP32 factors, and what is frozen in BF16 or as packed codes."""
        model = self.student_of(plan)
        if not plan.lora_r:
            return sum(_size(tuple(p.shape), plan.master_dtype) for p in model.parameters())
        packed = _packed_bytes(model) if plan.base_in_scheme else {}
        return sum(4 * p.numel() if p.requires_grad else packed.get(id(p), 2 * p.numel()) for p in model.parameters())

    def _gathered(self, plan: Plan) -> int:
        """Layers that FSDP has gathered, and what is in no layer, which stays so."""
        each, rest = self._units(plan)
        whole = sum(each) if plan.backend.keeps_gathered else _LAYERS_AT_ONCE * max(each, default=0)
        dtype = torch.bfloat16 if plan.lora_r else plan.gather_dtype
        return (whole + rest) * dtype.itemsize

    def _units(self, plan: Plan, trained: bool = False) -> tuple[list[int], int]:
        """Elements of each decoder layer, and of all other parameters."""
        model = self.student_of(plan)
        layers = layers_of(model)
        counted = [p for p in model.parameters() if p.requires_grad or not trained]
        inside = {id(p) for p in parameters_of(layers)}
        chosen = {id(p) for p in counted}
        each = [sum(p.numel() for p in layer.parameters() if id(p) in chosen) for layer in layers]
        return each, sum(p.numel() for p in counted if id(p) not in inside)

    # ---- What exists at a time ----

    def _rows(self, plan: Plan, run: DryRun, phase: str, moment: Moment) -> dict[str, int]:
        gathers_narrow = plan.backend.shards and not plan.lora_r
        wider = plan.master_dtype.itemsize / plan.gather_dtype.itemsize if gathers_narrow else 1
        gradients = 0 if plan.backend.offloads else int(moment.gradients * wider) // plan.backend.parts
        work = moment.work - _offloaded(self.student, plan)
        if plan.backend.shards and phase == BACKWARD:
            work += _GRADIENTS_AT_ONCE * max(self._units(plan, trained=True)[0], default=0) * 4
        return {GRADIENTS: gradients, WORK: max(0, work)}

    def _rows_of_step(self, plan: Plan) -> dict[str, int]:
        if plan.backend.offloads:
            return {GRADIENTS: 0, WORK: 0}
        trained, parts = self._trained(plan), plan.backend.parts
        gradients = 0 if plan.in_backward else sum(_size(*each) for each in trained) // parts
        elements = [torch.Size(shape).numel() // parts for shape, _ in trained]
        if plan.in_backward:
            elements = [max(elements)]
        if _has_bfloat16_masters(plan):  # StochasticAdamW computes some elements at a time
            return {GRADIENTS: gradients, WORK: 0}
        return {GRADIENTS: gradients, WORK: optimizers.temporary_bytes(plan.optimizer, elements, plan.device)}

    # ---- The step ----

    def _run(self, plan: Plan) -> tuple[DryRun, str | None]:
        key = (
            plan.batch, plan.length, plan.trains, plan.compute_dtype, plan.accumulates, plan.masked, plan.packed,
            plan.master_dtype, plan.in_backward, plan.checkpoints, plan.checkpointing, plan.teacher,
            plan.teacher_tokens, plan.ce_weight, plan.lora_r, plan.lora_target, plan.gather_dtype, plan.smooths_labels,
            plan.device, plan.backend.parts, plan.backend.name,
        )  # fmt: skip
        if key not in self._runs:
            self._runs[key] = self._computed(plan)
        return self._runs[key]

    def _computed(self, plan: Plan) -> tuple[DryRun, str | None]:
        teacher = self.teacher if plan.teacher == COPY else None
        try:
            return dry_run(self.student_of(plan), teacher, plan), None
        except NotOnFakeTensors as error:
            return rough_run(self.student, plan), f"the model's code does not run without values ({error})"

    def _rougher(self, plan: Plan, problem: str | None) -> list[str]:
        reasons = [problem] if problem else []
        if not optimizers.is_known(plan.optimizer):
            reasons.append(f"the states of --optim {plan.optimizer} are taken to be AdamW's")
        if plan.compiled:
            reasons.append("compiled code may keep other tensors")
        if plan.backend.shards and not layers_of(self.student):
            reasons.append("the model does not name the layers that FSDP gathers one by one")
        return reasons


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _has_bfloat16_masters(plan: Plan) -> bool:
    return plan.master_dtype == torch.bfloat16 and not plan.lora_r


def _packed_bytes(model: PreTrainedModel) -> dict[int, int]:
    """Bytes of the weights that `pack_base` keeps as codes of their schemes, by their ids: all that are not shared."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        id(site.weight): int(site.weight.numel() * site.scheme.weight.format.bits_per_value(site.shape[1]) / 8)
        for site in quantized_sites(model)
        if uses[id(site.weight)] == 1
    }


def _offloaded(student: PreTrainedModel, plan: Plan) -> int:
    """Inputs of decoder layers that activation checkpointing keeps in the main memory."""
    options = dict(plan.checkpointing or ())
    if not options.get("offload") or not plan.trains:
        return 0
    itemsize = 2 if plan.lora_r or plan.master_dtype == torch.bfloat16 else 4
    layers = -(-len(layers_of(student)) // int(str(options.get("every_n_layers", 1))))
    return max(0, layers - 1) * plan.batch * plan.length * student.config.get_text_config().hidden_size * itemsize
