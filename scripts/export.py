"""Pack a checkpoint for inference engines, and prove that the packed one is the same model.

python scripts/export.py SRC DST                          # a QAT folder: its own scheme
python scripts/export.py SRC DST --quant_scheme MXFP4     # any BF16 checkpoint: round to nearest (RTN)
python scripts/export.py SRC DST --quant_scheme NVFP4 --dataset chats.jsonl   # the same, inputs calibrated on the data
python scripts/export.py --verify DST [--source SRC]      # compare again, later
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qat import SCHEMES, QATConfig, get_scheme  # noqa: E402
from qat.checkpoints.device import named_device  # noqa: E402
from qat.checkpoints.dialects import EXPORT_FORMATS  # noqa: E402
from qat.checkpoints.engines import table_of_folder  # noqa: E402
from qat.checkpoints.folder import CheckpointFolder  # noqa: E402
from qat.checkpoints.model_card import CardFacts  # noqa: E402
from qat.checkpoints.pack import export_checkpoint  # noqa: E402
from qat.checkpoints.verify import VerificationError, verify  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402
from qat.errors import RunFault, UserError, report, reported_in_one_line  # noqa: E402
from qat.files.atomic import check_target  # noqa: E402
from qat.files.model_folder import check_model_folder  # noqa: E402
from qat.schemes.mapping_file import DEFAULT_IGNORE, with_patterns  # noqa: E402
from qat.schemes.patterns import HELP as PATTERNS  # noqa: E402
from qat.schemes.presets import KV_CACHE_SCHEMES, get_kv_cache_scheme, scheme_name  # noqa: E402

SAMPLES = 32  # to calibrate on, as main.py does


def main(argv: list[str] | None = None) -> int:
    """Export and verify, or only verify; returns the exit status, 1 where the proof fails.

    Raises:
        UserError: what was given cannot be exported, or the disk is full.
    """
    args = parse(argv)
    check_folders(args)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("qat").setLevel(logging.INFO)
    try:
        if args.verify is None:
            scales = calibrated(args)
            dataset = args.dataset if scales is None else None  # the model was not trained on what calibrates it
            export_checkpoint(
                args.source_folder, args.target, args.format, args.quant_scheme, args.ignore, args.overwrite,
                CardFacts(args.base_model, dataset), args.trust_remote_code, scales, args.kv_cache_scheme,
                args.device,
            )  # fmt: skip
        if args.verify is not None or not args.no_verify:
            verify(
                args.verify or args.target, args.source or args.source_folder, with_logits=not args.weights_only,
                trust_remote_code=args.trust_remote_code, device=args.device,
            )  # fmt: skip
        if args.verify is None:
            print(table_of_folder(args.target, args.trust_remote_code))
    except VerificationError as error:
        report(error)
        return 1
    except RunFault:
        raise
    except OSError as error:
        raise UserError(f"DST {args.target or args.verify!r}: {error}") from error
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with one line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source_folder", metavar="SRC", nargs="?", help="a checkpoint in BF16, from QAT or plain")
    parser.add_argument("target", metavar="DST", nargs="?", help="the new folder for the packed checkpoint")
    parser.add_argument("--format", default=EXPORT_FORMATS[0], choices=EXPORT_FORMATS)
    parser.add_argument(
        "--quant_scheme", metavar="SCHEME", help=f"one of {', '.join(SCHEMES)}; default: as SRC was trained"
    )
    parser.add_argument(
        "--ignore", nargs="*", metavar="PATTERN",
        help=f"layers to leave in BF16 beside {', '.join(DEFAULT_IGNORE)}, with --quant_scheme: {PATTERNS}",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a packed checkpoint in DST")
    parser.add_argument("--base_model", help="for the model card: the model that training began from")
    parser.add_argument(
        "--kv_cache_scheme", metavar="SCHEME",
        help=f"of the key/value cache, with --quant_scheme: {', '.join(KV_CACHE_SCHEMES)}; default: none",
    )  # fmt: skip
    parser.add_argument(
        "--dataset",
        help="what SRC was trained on, for the model card; with --kv_cache_scheme, or a --quant_scheme whose inputs "
        "have calibrated scales (NVFP4): a dataset of main.py, to calibrate on",
    )
    parser.add_argument(
        "--calibration_samples", type=int, help=f"samples of --dataset to calibrate on (default {SAMPLES})"
    )
    parser.add_argument("--verify", metavar="DIR", help="only compare the packed checkpoint in DIR with its source")
    parser.add_argument("--source", metavar="SRC", help="with --verify: the source, where it is not recorded in DIR")
    parser.add_argument("--weights_only", action="store_true", help="verify weights, load no model for logits")
    parser.add_argument("--no_verify", action="store_true", help="export without verifying")
    parser.add_argument(
        "--device",
        help="that packs and proves: cpu, cuda or cuda:N; default: a GPU with enough free memory, else the CPU",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with SRC")
    args = parser.parse_args(argv)
    try:
        _check_together(args)
    except UserError as error:
        parser.error(str(error))
    args.ignore = list(with_patterns(DEFAULT_IGNORE, args.ignore))
    return args


def _check_together(args: argparse.Namespace) -> None:
    """Raise a UserError for an unknown scheme and for arguments without effect."""
    if args.quant_scheme is not None:
        args.quant_scheme = scheme_name(args.quant_scheme, "--quant_scheme")
    if args.kv_cache_scheme is not None:
        args.kv_cache_scheme, _ = get_kv_cache_scheme(args.kv_cache_scheme, "--kv_cache_scheme")
        if args.quant_scheme is None and args.verify is None:
            raise UserError(
                f"--kv_cache_scheme {args.kv_cache_scheme} has no effect without --quant_scheme: the cache is "
                "quantized as SRC was trained; give --quant_scheme too, or leave it out"
            )
    if args.calibration_samples is not None and args.calibration_samples < 1:
        raise UserError(f"--calibration_samples {args.calibration_samples} must be at least 1, such as {SAMPLES}")
    if (args.verify is None) == (args.target is None):
        raise UserError("give SRC and DST to export, or --verify DIR")
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    if args.format != EXPORT_FORMATS[0] and args.verify is not None:
        raise UserError(f"--format {args.format} has no effect with --verify, which only compares; leave it out")
    for name in ("quant_scheme", "kv_cache_scheme", "ignore", "overwrite", "base_model", "dataset",
                 "calibration_samples", "no_verify"):  # fmt: skip
        if args.verify is not None and name in given:
            raise UserError(f"--{name} has no effect with --verify, which only compares; leave it out")
    if args.source is not None and args.verify is None:
        raise UserError(f"--source {args.source} has no effect without --verify; the source is the first word: SRC DST")
    if args.device is not None:
        named_device(args.device)
    if args.no_verify and args.weights_only:
        raise UserError("--weights_only has no effect with --no_verify; give one of the two")
    if args.ignore is not None and args.quant_scheme is None and args.verify is None:
        raise UserError(
            f"--ignore {' '.join(args.ignore)} has no effect without --quant_scheme: the layers that SRC was trained "
            "without stay in BF16; give --quant_scheme too, or leave --ignore out"
        )


def calibrated(args: argparse.Namespace) -> dict[str, float] | None:
    """The calibrated scales of SRC for what is quantized, from --dataset; None where it has them or needs none.

    Raises:
        UserError: they are needed, and there is no --dataset; or --calibration_samples has no effect.
    """
    source, scheme, cache = CheckpointFolder.open(args.source_folder, "SRC"), args.quant_scheme, args.kv_cache_scheme
    saved = QATConfig.load(source.path)
    if scheme is None or not (cache or get_scheme(scheme).has_calibrated_scales):
        if args.calibration_samples is not None:
            raise UserError(
                f"--calibration_samples {args.calibration_samples} has no effect: nothing is calibrated without "
                "--kv_cache_scheme or a --quant_scheme whose inputs have calibrated scales (NVFP4); leave it out"
            )
        return None
    if args.dataset is None:
        if saved is not None and saved.calibrated_scales and saved.kv_cache_scheme == cache:
            return None
        raise UserError(
            f"--quant_scheme {scheme}{f' --kv_cache_scheme {cache}' if cache else ''} quantizes under calibrated "
            "scales, which SRC does not have; give --dataset, such as chats.jsonl, to calibrate on"
        )
    from training.start.calibration import scales_of_checkpoint

    return scales_of_checkpoint(
        source.path, scheme, args.ignore, args.dataset, args.calibration_samples or SAMPLES, args.trust_remote_code,
        cache,
    )  # fmt: skip


def check_folders(args: argparse.Namespace) -> None:
    """Refuse folders that cannot be read or written.

    Raises:
        UserError: as described.
    """
    for name, folder in (("SRC", args.source_folder), ("--verify", args.verify), ("--source", args.source)):
        if folder is not None:
            check_model_folder(folder, name)
    if args.target is not None:
        if not args.target.strip():
            raise UserError("DST is empty; give the new folder for the packed checkpoint")
        check_target(Path(args.target), args.overwrite)


if __name__ == "__main__":
    with reported_in_one_line():
        sys.exit(main())
