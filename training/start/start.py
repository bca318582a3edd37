"""Start: what a stage starts from, read once: an unquantized model, one that was trained for a scheme, or a packed one.

The model is loaded as FP32 master weights, remembering the dtypes it came in. At QAT's learning rates Adam's updates
are smaller than half a BF16 step and would vanish, so weights are trained in FP32 and computed with in BF16 (autocast)
on every backend; what is saved goes back to the original dtypes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from qat import QATConfig, prepare_qat
from qat.checkpoints.folder import CheckpointFolder
from qat.checkpoints.input_transforms import check_no_transforms
from qat.checkpoints.load import TEACHER_ARGUMENT, check_loadable
from qat.checkpoints.model_config import check_readable, find_folder
from qat.checkpoints.native_mxfp4 import is_native
from qat.checkpoints.packed_folder import check_packed
from qat.checkpoints.unpack import load_packed
from qat.errors import UserError
from qat.files.model_folder import check_file_name, check_model_folder
from qat.layers.experts import compute_in_autocast_dtype
from qat.layers.learned import check_baked, holds_rounded_values, learns
from qat.layers.restore import prepare_as_saved
from qat.schemes.config import QAT_CONFIG_NAME

from ..arguments.distillation import DistillationArguments
from ..arguments.model import ModelArguments
from ..arguments.quantization import QuantizationArguments
from ..backends.fingerprint import fingerprint
from ..backends.masters import to_master_dtype
from ..backends.saved_dtypes import SavedDtypes
from ..backends.weightless import first_process_loads, take_dtypes, waits_for_weights
from .loading import load_tokenizer, load_unquantized, without_weights

logger = logging.getLogger(__name__)
_ARGUMENT = "--model_name_or_path"


@dataclass
class Start:
    """The model that a stage starts from, by folder or hub id.

    Attributes:
        model_args: which model.
        cache_dir: of downloads.
        is_packed: whether its weights are quantized values, packed for engines.
        qat_config: what it was trained for or packed in; None for an unquantized model. That of a folder that others
            packed is known once it is loaded.
        dtypes: known once it is loaded.
        fingerprint: of its weights, once it is loaded; None in a process that has none.
        keeps_values: whether the stage computes with the values of a packed model as they are, as engines do: it
            evaluates them, and names no scheme to round them in.
        is_native: whether its experts are stored in MXFP4, gpt-oss's native format. Published so, without
            qat_config.json, it is an unquantized model all the same: there is no other one to start from.
        is_frozen: whether adapters are trained in place of its weights, which keep their dtypes then.
        master_dtype: of the weights in memory; torch.bfloat16 is for runs without FP32 masters.
        device: of the weights in memory. A GPU converts them in milliseconds, and BF16 takes half the time of FP32 to
            get there.
    """

    model_args: ModelArguments
    cache_dir: str | None = None
    is_packed: bool = False
    qat_config: QATConfig | None = None
    dtypes: SavedDtypes = field(default_factory=SavedDtypes)
    fingerprint: str | None = None
    keeps_values: bool = False
    is_native: bool = False
    is_frozen: bool = False
    master_dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")

    @classmethod
    def read(cls, model_args: ModelArguments, cache_dir: str | None = None) -> Start:
        """Find out what the model is; reads no weights.

        Raises:
            UserError: there is no such folder or model, it is an adapter, its files are damaged or pickled or lie
                outside of the folder, it is quantized by a method that is not read, or is a checkpoint to resume from
                whose learned exponents are not in its weights yet.
        """
        name = model_args.model_name_or_path
        if model_args.gguf_file is not None:
            check_model_folder(name, _ARGUMENT)
            check_file_name(name, _ARGUMENT, model_args.gguf_file, "--gguf_file")
            return cls(model_args, cache_dir, False, QATConfig.load(name))
        folder = find_folder(name, _ARGUMENT, cache_dir)
        is_packed = check_readable(folder, f"{_ARGUMENT} {name!r}")
        if not Path(name).is_dir():
            return cls(model_args, cache_dir, False, saved_config(name, cache_dir), is_native=is_native(folder))
        qat_config = QATConfig.load(folder)
        names = CheckpointFolder.open(name, _ARGUMENT).names
        if is_packed:
            check_packed(name, _ARGUMENT, model_args.trust_remote_code, allows_transforms=True)
        elif learns(qat_config):
            check_baked(names, name)
        native = is_native(folder)
        is_packed = is_packed and not (native and qat_config is None)
        return cls(model_args, cache_dir, is_packed, qat_config, is_native=native)

    # ---- May this stage start here? ----

    def check(self, quant_args: QuantizationArguments, distill_args: DistillationArguments, trains: bool) -> None:
        """Refuse what would learn from, or smooth, a model that is quantized already; set `keeps_values`.

        Raises:
            UserError: the teacher cannot be loaded, or would be such a model; smoothing would undo the rounding of a
                packed one; its weights would be rounded again, and are those for transformed inputs; or a setting of
                quantization has no effect, because nothing is quantized.
        """
        folder = self.model_args.model_name_or_path
        if trains and self.qat_config is not None and self.qat_config.rounded:
            logger.warning("%s holds values that --ptq True rounded; better train the model that it began from", folder)
        self.keeps_values = self.is_packed and not trains and not quant_args.names_schemes
        if self.is_packed and not self.keeps_values:
            check_no_transforms(CheckpointFolder.open(folder, _ARGUMENT))
        if (teacher := distill_args.teacher_model_name_or_path) is not None:
            check_loadable(teacher, TEACHER_ARGUMENT, self.model_args.trust_remote_code, self.cache_dir)
        if self.is_packed or self.qat_config is not None:
            self._check_teacher(distill_args)
        elif not quant_args.names_schemes:
            quant_args.check_unused()
        if quant_args.weight_init != "none" and distill_args.distill and distill_args.distill_teacher == "self":
            raise UserError(
                f"--weight_init {quant_args.weight_init} changes the weights, and with --distill_teacher self they are "
                "the teacher's, too; choose --distill_teacher copy or cache, or --weight_init none"
            )
        is_packed = self.is_packed or self.is_native
        if is_packed or self.is_rounded:
            how = "packed" if is_packed else "saved"
            for name, off in (("smooth_alpha", 0), ("weight_init", "none")):
                if name == "weight_init" and self.is_native:  # GPTQ leaves experts alone, which alone are packed there
                    continue
                if (value := getattr(quant_args, name)) != off:
                    raise UserError(
                        f"--{name} {value} would undo the rounding that --model_name_or_path {folder!r} was {how} "
                        f"with; give --{name} {off}, or start from the unquantized model"
                    )

    @property
    def is_rounded(self) -> bool:
        """Whether the weights were saved as values of their scheme, though the folder is not packed."""
        return holds_rounded_values(self.qat_config)

    def _check_teacher(self, distill_args: DistillationArguments) -> None:
        """A copy of weights that were trained for a scheme is not the model that they came from. The student with its
        quantizers off is not that model either if its weights are quantized values: packed, or with learned
        exponents or scales."""
        if not distill_args.distill or distill_args.teacher_model_name_or_path is not None:
            return
        folder = self.model_args.model_name_or_path
        remedy = "name the unquantized model that it came from with --teacher_model_name_or_path"
        if distill_args.distill_teacher == "self":
            if self.is_packed or self.is_rounded or learns(self.qat_config):
                raise UserError(
                    f"--distill_teacher self: the weights of --model_name_or_path {folder!r} are quantized values, "
                    f"with its quantizers off, too; leave --distill_teacher out and {remedy}"
                )
            return
        how = "packed" if self.qat_config is None else self.qat_config.summary
        raise UserError(
            f"--distill True: the teacher would be a copy of --model_name_or_path {folder!r}, which is quantized "
            f"already or was trained to be ({how}); {remedy}"
        )

    # ---- The model ----

    def load_model(self) -> PreTrainedModel:
        """The causal language model, unquantized, in `master_dtype`; frozen weights in their own dtypes.

        Under FSDP with `fsdp_cpu_ram_efficient_loading` only the first process has weights, see weightless.py.
        """
        if waits_for_weights():
            model = without_weights(self.model_args, self.cache_dir)
            to_master_dtype(model, self.master_dtype)
        else:
            model = self._load_with_weights()
            tensors = model.state_dict(keep_vars=True)
            by_name = {name: t.dtype for name, t in tensors.items() if t.is_floating_point()}
            self.dtypes = SavedDtypes(model.dtype, by_name, getattr(model.config, "use_cache", None))
            if not self.is_frozen:
                to_master_dtype(model, self.master_dtype)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()  # memory of the weights as they were read: of another size, so of no use
            self.fingerprint = fingerprint(model)
        if first_process_loads():
            self._share()
            if self.is_frozen and waits_for_weights():
                take_dtypes(model, self.dtypes.by_name)
        compute_in_autocast_dtype(model)
        model.config.use_cache = False  # a cache of keys and values is of no use in training
        _repair_generation_config(model)
        return model

    def _load_with_weights(self) -> PreTrainedModel:
        if not self.is_packed:
            return load_unquantized(self.model_args, self.cache_dir, self.device)
        model, self.qat_config = load_packed(
            self.model_args.model_name_or_path, _ARGUMENT, self.model_args.trust_remote_code, not self.keeps_values
        )
        return model.to(self.device)

    def _share(self) -> None:
        """Give all processes what the first one learned while it read the weights. All of them must call it."""
        learned = [self.qat_config, self.dtypes]
        broadcast_object_list(learned)
        self.qat_config, self.dtypes = learned

    def load_tokenizer(self, model_max_length: int) -> PreTrainedTokenizerBase:
        """The model's tokenizer, cutting at `model_max_length`, with a padding token."""
        return load_tokenizer(self.model_args, model_max_length, self.cache_dir)

    def quantize(self, model: PreTrainedModel, quant_args: QuantizationArguments) -> None:
        """Prepare the model for the scheme asked for, else for the one it was trained for or packed in, else not."""
        if (layers := quant_args.layers_of(model.config.model_type)) is not None:
            rules = quant_args.weight_scale_rule, quant_args.input_scale_rule
            prepare_qat(
                model, *layers, *rules, **quant_args.learned, kv_cache_scheme=quant_args.kv_cache_scheme,
                input_transforms=quant_args.input_transforms,
            )  # fmt: skip
        elif self.qat_config is not None:
            logger.info("The model was saved for %s; so is this run", self.qat_config.summary)
            prepare_as_saved(model, self.qat_config, **quant_args.learned, keeps_values=self.keeps_values)
            if self.keeps_values:
                logger.info("The evaluation computes with the packed weights as they are, without rounding them again")


def saved_config(name_or_path: str, cache_dir: str | None = None) -> QATConfig | None:
    """The qat_config.json of a local folder or a hub id; None where there is none.

    Where the hub cannot be asked and its cache does not say, that is None, too, with a warning.

    Raises:
        UserError: it is damaged.
    """
    if Path(name_or_path).is_dir():
        return QATConfig.load(name_or_path)
    path = cached_file(
        name_or_path, QAT_CONFIG_NAME, cache_dir=cache_dir, _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if path is not None:
        return QATConfig.load(Path(path).parent)
    if try_to_load_from_cache(name_or_path, QAT_CONFIG_NAME, cache_dir=cache_dir) is None:
        logger.warning(
            "Whether %s was trained to be quantized is not known: its %s is not in the cache, and the hub could not be "
            "asked; it is taken for a model that was not", name_or_path, QAT_CONFIG_NAME,
        )  # fmt: skip
    return None


def load_model(model_args: ModelArguments, cache_dir: str | None = None) -> PreTrainedModel:
    """The model alone, for programs that save nothing."""
    return Start.read(model_args, cache_dir).load_model()


def _repair_generation_config(model: PreTrainedModel) -> None:
    """Some published models set sampling parameters without do_sample; transformers then refuses to save them."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        logger.warning("generation config: set do_sample=True, since it would not be saved otherwise (%s)", error)
        model.generation_config.do_sample = True
