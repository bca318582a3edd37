"""One stage of the way from a causal language model to a low-bit one: fine-tune in BF16, train with quantization,
evaluate.

    python main.py --model_name_or_path M --do_train True ...                        # BF16 fine-tuning
    python main.py --model_name_or_path M --quant_scheme MXFP4 --do_train True ...   # quantization-aware training
    python main.py --model_name_or_path M --quant_scheme MXFP4 --do_eval True ...    # PTQ: round, do not train

The same file runs under `accelerate launch` on one device or many, see accelerate_config/.
"""

from __future__ import annotations

import logging
import sys

from qat import QATConfig, prepare_qat
from training.arguments.data import DataArguments
from training.arguments.distillation import DistillationArguments
from training.arguments.model import ModelArguments
from training.arguments.parse import Arguments, parse_arguments
from training.arguments.quantization import QuantizationArguments
from training.arguments.training import TrainingArguments
from training.backends.writers import Writers
from training.monitoring.report import run_settings, write_report
from training.resume.checkpoints import find_checkpoint
from training.resume.output import prepared_output
from training.resume.safeguards import INTERRUPTED
from training.start.checks import check_start, check_vocabulary, saved_config
from training.start.loading import load_model, load_tokenizer
from training.start.smoothing import smooth_with_data
from training.start.stage import export, set_up, unused_folder
from training.teachers.frozen import make_cached_teacher
from training.teachers.load import load_teacher
from utils import QATTrainer, make_supervised_data_module

logger = logging.getLogger("main")


def main(argv: list[str] | None = None) -> None:
    """Run one stage: parse, seed, and keep the output folder for this run while it lasts."""
    arguments = parse_arguments(argv)
    _, training_args, *_ = arguments
    set_up(training_args)
    if not training_args.do_train:
        training_args.output_dir = unused_folder(training_args.output_dir)
    writers = Writers.of(training_args)
    with prepared_output(training_args.output_dir, writers):
        run(arguments, writers)


def run(arguments: Arguments, writers: Writers) -> None:
    """Load, quantize, read data, train, evaluate, save."""
    model_args, training_args, data_args, quant_args, distill_args = arguments
    check_start(model_args, quant_args, distill_args)
    model = load_model(model_args, training_args.cache_dir)
    tokenizer = load_tokenizer(model_args, training_args.model_max_length, training_args.cache_dir)
    check_vocabulary(model, distill_args)
    teacher = None
    if distill_args.distill_teacher == "self":
        teacher = "self"
    elif distill_args.distill:
        teacher = load_teacher(
            model, distill_args.teacher_model_name_or_path, training_args.cache_dir, model_args.trust_remote_code
        )
    quantize(model, saved_config(model, model_args.model_name_or_path), quant_args)
    checkpoint = None
    if training_args.do_train:
        wanted, qat_config = training_args.resume_from_checkpoint, getattr(model, "qat_config", None)
        checkpoint = find_checkpoint(training_args.output_dir, wanted, qat_config, writers)

    # One process builds the cache and the others wait for its lock, without a barrier that could time out.
    data_module = make_supervised_data_module(
        tokenizer=tokenizer, model=model, batch_size=training_args.per_device_train_batch_size, **vars(data_args)
    )
    if data_args.streaming:  # each process reads for itself: batches of different lengths cannot be dealt out
        training_args.accelerator_config.dispatch_batches = False

    if distill_args.distill_teacher == "cache":
        settings, folder = distill_args.cache_settings, distill_args.distill_cache_dir
        teacher = make_cached_teacher(teacher, training_args, data_module, settings, folder)
    if quant_args.smooth_alpha and checkpoint is None:
        smooth_with_data(model, data_module, quant_args.smooth_alpha, training_args.device)

    trainer = QATTrainer(
        model=model,
        processing_class=tokenizer,
        args=training_args,
        teacher=teacher,
        distill_temperature=distill_args.distill_temperature,
        distill_ce_weight=distill_args.distill_ce_weight,
        exponent_learning_rate=quant_args.exponent_learning_rate,
        log_quantization=quant_args.log_quantization,
        data_settings=vars(data_args),
        learning_settings=vars(distill_args) | vars(quant_args),
        **data_module,
    )

    if training_args.do_train:
        if checkpoint is not None:
            logger.info("Resuming from %s", checkpoint)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.was_interrupted:
            logger.warning("SIGTERM: saved at step %d; the same command goes on from there", trainer.state.global_step)
            sys.exit(INTERRUPTED)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)

    if training_args.do_eval:
        if training_args.do_train:
            trainer.round_masters()
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_train:
        trainer.save_model()
        trainer.save_state()
        logger.info("Saved to %s", training_args.output_dir)
        if training_args.report and trainer.is_world_process_zero():
            settings = run_settings(trainer, model_args, data_args, quant_args, distill_args)
            write_report(training_args.output_dir, trainer.state.log_history, settings, "Training report")
        if trainer.is_world_process_zero() and getattr(model, "qat_config", None) is not None:
            export(model, model_args, training_args, data_args, quant_args)


def quantize(model, saved: QATConfig | None, quant_args: QuantizationArguments) -> None:
    """Prepare `model` for the scheme asked for, else for the one it was trained for or packed in, else not at all."""
    if (layers := quant_args.layers()) is not None:
        rules = quant_args.weight_scale_rule, quant_args.input_scale_rule
        prepare_qat(model, *layers, *rules, **quant_args.training_options())
    elif saved is not None:
        logger.info("The model was trained with %s; so is this run", saved.summary)
        rules = saved.weight_scale_rule, saved.input_scale_rule
        prepare_qat(model, saved.mapping, saved.ignore, *rules, **quant_args.training_options())


__all__ = [
    "DataArguments",
    "DistillationArguments",
    "ModelArguments",
    "QuantizationArguments",
    "TrainingArguments",
    "main",
]

if __name__ == "__main__":
    main()
