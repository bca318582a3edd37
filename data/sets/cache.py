"""Where the caches of data are, and what identifies a cached set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets


def default_root() -> Path:
    """Beside the caches of `datasets` (HF_DATASETS_CACHE, HF_HOME)."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "supervised"


def fingerprint(parts: dict) -> str:
    """32 hexadecimal digits that change with any value in `parts` (JSON values) and with the code of this package."""
    code = hashlib.blake2b()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    text = json.dumps({**parts, "code": code.hexdigest()}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
