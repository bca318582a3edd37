"""Pack a checkpoint for inference engines, and prove that the packed one is the same model.

python scripts/export.py SRC DST                          # a QAT folder: its own scheme
python scripts/export.py SRC DST --quant_scheme MXFP4     # any BF16 checkpoint: round to nearest (RTN)
python scripts/export.py --verify DST [--source SRC]      # compare again, later
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qat import SCHEMES  # noqa: E402
from qat.checkpoints.dialects import EXPORT_FORMATS  # noqa: E402
from qat.checkpoints.model_card import CardFacts  # noqa: E402
from qat.checkpoints.pack import export_checkpoint  # noqa: E402
from qat.checkpoints.verify import VerificationError, verify  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Export and verify, or only verify; returns the exit status."""
    args = parse(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("qat").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was half written is removed
    try:
        if args.verify is None:
            export_checkpoint(
                args.source_folder, args.target, args.format, args.quant_scheme, args.ignore, args.overwrite,
                CardFacts(args.base_model, args.dataset),
            )  # fmt: skip
        if args.verify is not None or not args.no_verify:
            verify(args.verify or args.target, args.source or args.source_folder, with_logits=not args.weights_only)
    except (ValueError, OSError, VerificationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends the program with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source_folder", metavar="SRC", nargs="?", help="a checkpoint in BF16, from QAT or plain")
    parser.add_argument("target", metavar="DST", nargs="?", help="the new folder for the packed checkpoint")
    parser.add_argument("--format", default=EXPORT_FORMATS[0], choices=EXPORT_FORMATS)
    parser.add_argument("--quant_scheme", type=str.upper, choices=SCHEMES, help="default: as SRC was trained")
    parser.add_argument("--ignore", nargs="*", default=["lm_head"], help="layers to leave in BF16, with --quant_scheme")
    parser.add_argument("--overwrite", action="store_true", help="replace a packed checkpoint in DST")
    parser.add_argument("--base_model", help="for the model card: the model that training began from")
    parser.add_argument("--dataset", help="for the model card: what it was trained on")
    parser.add_argument("--verify", metavar="DIR", help="only compare the packed checkpoint in DIR with its source")
    parser.add_argument("--source", metavar="SRC", help="with --verify: the source, where it is not recorded in DIR")
    parser.add_argument("--weights_only", action="store_true", help="verify weights, load no model for logits")
    parser.add_argument("--no_verify", action="store_true", help="export without verifying")
    args = parser.parse_args(argv)
    if (args.verify is None) == (args.target is None):
        parser.error("give SRC and DST to export, or --verify DIR")
    return args


if __name__ == "__main__":
    with reported_in_one_line():
        sys.exit(main())
