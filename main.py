"""One stage of the way from a causal language model to a low-bit one: fine-tune in BF16, train with quantization,
evaluate.

    python main.py --config recipes/bf16.yaml --model_name_or_path M --dataset D       # BF16 fine-tuning
    python main.py --config recipes/mxfp4.yaml --model_name_or_path M --dataset D      # quantization-aware training
    python main.py --model_name_or_path M --quant_scheme MXFP4 --do_eval True          # what rounding alone costs
    python main.py --model_name_or_path M --quant_scheme MXFP4 --ptq True --dataset D  # round, do not train, and pack

The same file runs under `accelerate launch` on one device or many, see accelerate_config/.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc

gc.disable()  # imports make a million objects and no garbage, and each collection would look at all of them

import dataclasses
import logging
import sys

import torch

from data.sets.packed_attention import attend_within_samples
from data.sets.packing import check_packing
from qat.checkpoints.engines import table_of_folder
from qat.errors import reported_in_one_line
from qat.layers.fp8_matmul import log_fp8_matmul, use_fp8_matmul
from training.adapters.begin import Adapters
from training.arguments.parse import Arguments, parse_arguments
from training.backends.sharding import cores_of_waiting_processes
from training.checks import check_data, check_model, check_paths
from training.estimate.program import short_form
from training.monitoring.report import report_run
from training.resume.output import OutputFolder, release
from training.start.calibration import ScaleRefresh, calibrate_with_data
from training.start.end_tokens import stop_where_answers_end
from training.start.loading import device_of_weights
from training.start.set_up import set_up
from training.start.start import Start
from training.start.weights import change_of_weights
from training.teachers.choose import cached_where_asked, choose_teacher
from training.teachers.generic import GenericText
from utils import QATTrainer, make_supervised_data_module

gc.enable()
gc.freeze()  # what was imported stays to the end: neither collections nor the program's exit look at it again

logger = logging.getLogger("main")


def main(argv: list[str] | None = None) -> None:
    """Run one stage: parse, seed, and keep the output folder for this run while it lasts."""
    arguments = parse_arguments(argv)
    set_up(arguments.training)
    check_paths(arguments)
    output = OutputFolder.of(arguments.training)
    with output.held():
        run(arguments, output)


def run(arguments: Arguments, output: OutputFolder) -> None:
    """Check, read data, load, quantize, train, evaluate, save."""
    model_args, args, data_args, quant_args, distill_args, lora_args = arguments
    start = Start.read(model_args, args.cache_dir)
    start.is_frozen = lora_args.is_on
    start.check(quant_args, distill_args, args.do_train)
    start.master_dtype = getattr(torch, args.master_dtype)
    start.device = device_of_weights(args, packs_base=lora_args.base_in_scheme)
    skeleton = check_model(arguments, start, output)
    tokenizer = start.load_tokenizer(args.model_max_length)
    data = make_supervised_data_module(tokenizer=tokenizer, model=skeleton, **arguments.data_options)
    generic = GenericText.read(distill_args, args, data_args, tokenizer)
    check_data(arguments, data, tokenizer, skeleton, generic.samples)
    if args.process_index == 0:
        logger.info(short_form(arguments, skeleton))
    with cores_of_waiting_processes():
        model = start.load_model()
        if data_args.packing:
            check_packing(model)
            attend_within_samples(model, args.torch_compile)
    teacher = choose_teacher(model, distill_args, args.cache_dir, model_args.trust_remote_code)
    generic.sample(model if teacher == "self" else teacher)
    training_data = generic.mixed_into(data)
    if data_args.packing:
        attend_within_samples(teacher, args.torch_compile)
    start.quantize(model, quant_args)
    log_fp8_matmul(model, use_fp8_matmul(model, quant_args.fp8_matmul, args.device), quant_args.fp8_matmul, args.device)
    stop_where_answers_end(model, tokenizer, data)
    checkpoint = output.find_checkpoint(args, getattr(model, "qat_config", None), lora_args.is_on)
    teacher = cached_where_asked(teacher, distill_args, args, training_data)
    change = change_of_weights(model, data, training_data, quant_args, args.device, rounds=args.ptq)
    at_start = None
    if lora_args.is_on:
        at_start = Adapters(lora_args, start).begin(model, tokenizer, output, checkpoint, change, args.seed)
    elif change is not None and checkpoint is None:
        change()
    calibrate_with_data(model, data, quant_args.calibration_samples, args.device, checkpoint)
    if data_args.streaming and not args.do_train:
        training_data["train_dataset"] = None  # without a number of steps, Trainer refuses one that has no length
    trainer = QATTrainer(
        model=model, processing_class=tokenizer, args=args, teacher=teacher, saved_dtypes=start.dtypes,
        start_fingerprint=start.fingerprint, adapters_fingerprint=at_start, **arguments.trainer_options,
        **training_data,
    )  # fmt: skip
    if quant_args.input_scale_refresh:
        refresh = ScaleRefresh(trainer, data, quant_args.calibration_samples, quant_args.input_scale_refresh)
        trainer.add_callback(refresh)
    if args.saves and checkpoint is None:
        output.forget_last_model(trainer.qat_config if quant_args.export_format != "none" else None)
    if args.do_train:
        train(trainer, checkpoint)
    if args.do_eval:
        evaluate(trainer, rounded=args.saves)
    if args.saves:
        save(trainer, arguments, output)


def train(trainer: QATTrainer, checkpoint: str | None) -> None:
    """Train to the end, or to SIGTERM or Ctrl-C: then the program ends with the status that says so."""
    if checkpoint is not None:
        logger.info("Resuming from %s", checkpoint)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.was_interrupted:
        sys.exit(trainer.exit_status)
    if trainer.qat_config is not None:
        trainer.qat_config = dataclasses.replace(trainer.qat_config, rounded=False)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)


def evaluate(trainer: QATTrainer, rounded: bool) -> None:
    """Loss and perplexity of the evaluation set; `rounded`: of the weights as they are going to be saved."""
    if rounded:
        trainer.round_masters()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def save(trainer: QATTrainer, arguments: Arguments, output: OutputFolder) -> None:
    """The model in its original dtype, the report, and for a QAT run the packed model with its proof."""
    packs = trainer.qat_config is not None and arguments.quantization.export_format != "none"
    if packs and trainer.is_world_process_zero():
        output.withdraw_proof(trainer.qat_config)
    trainer.save_state()  # first: a folder with a model and without it is taken for another program's
    trainer.save_model()
    logger.info("Saved to %s", output.path)
    if not trainer.is_world_process_zero():
        return
    if arguments.training.report:
        report_run(output.path, trainer, arguments)
    if packs:
        release(trainer)
        packed = output.pack(
            trainer.qat_config, arguments.quantization.export_format, arguments.facts, arguments.model.trust_remote_code
        )
        logger.info("Serve it: vllm serve %s\n%s", packed, table_of_folder(packed, arguments.model.trust_remote_code))


if __name__ == "__main__":
    with reported_in_one_line():
        main()
