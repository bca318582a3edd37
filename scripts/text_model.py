"""Write the language model inside a multimodal model as a causal language model of its own.

python scripts/text_model.py SRC DST      # SRC: such as a folder of Qwen3-VL or Mistral Small 3.2
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qat.checkpoints.text_model import extract_text_model  # noqa: E402
from qat.command_line import OneLineParser  # noqa: E402
from qat.errors import reported_in_one_line  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Extract, compare the logits of both models, write.

    Raises:
        UserError: see `extract_text_model`.
    """
    parser = OneLineParser(description=__doc__)
    parser.add_argument("source", metavar="SRC", help="a multimodal model in safetensors files")
    parser.add_argument("target", metavar="DST", help="the new folder for its language model")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("qat").setLevel(logging.INFO)
    extract_text_model(args.source, args.target)


if __name__ == "__main__":
    with reported_in_one_line():
        main()
