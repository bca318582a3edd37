"""Step 2 of scripts/test_serving.sh, in vLLM's environment: vLLM against the fake-quantized twins.

python compare.py FOLDER          every case, one process each, and a table
python compare.py FOLDER CASE     one case

Cases are served by the plugin's kernels and must be refused without it, or by vLLM's own with no plugin loaded. Which
kernel served is read from vLLM's log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r"\b(?:Using|Selected) (\w+(?:Kernel|Experts)) for ")
REFUSALS = (  # what vLLM 0.32 says where it has no kernel
    "Failed to find a kernel", "Forced NVFP4 kernel", "MoE backend supports the deployment configuration",
    "Unsupported FP8 MoE backend", "torch.float32 is not supported for quantization method",
)  # fmt: skip
STOCK = {"VLLM_PLUGINS": ""}  # no plugin is loaded, though it is installed


def main(folder: Path) -> int:
    """Run all cases; returns the exit status."""
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    rows = [run_case(folder, name, case) for name, case in cases.items()]
    print_table(rows)
    return int(any(row["verdict"] != "ok" for row in rows))


def run_case(folder: Path, name: str, case: dict) -> dict:
    """What was measured, and "ok" or what is wrong."""
    row = {"case": name, **{key: case[key] for key in ("dtype", "rule", "control", "stock")}}
    done = serve(folder, name, STOCK if case["stock"] else {"MX_QAT_ACTIVATION_RULE": case["rule"]})
    if done.returncode:
        print(f"{name} failed:\n{(done.stdout + done.stderr)[-6000:]}", flush=True)
        return row | {"verdict": "FAILED"}
    row |= json.loads(done.stdout.splitlines()[-1])
    kernels = sorted(set(KERNEL.findall(done.stdout + done.stderr)))
    row |= {"kernels": ", ".join(kernels), "stock_vllm": "serves" if case["stock"] else without_plugin(folder, name)}
    wrong = [
        text
        for text, holds in (
            ("difference", row["difference"] < case["tolerance"]),
            ("the control is as near", row["from_control"] > 10 * max(row["difference"], 1e-4)),
            ("greedy tokens", row["margin"] < 2 * case["tolerance"]),
            ("kernel", bool(kernels) and all(kernel.startswith("Exact") != case["stock"] for kernel in kernels)),
        )
        if not holds
    ]
    row["verdict"] = f"WRONG: {', '.join(wrong)}" if wrong else "ok"
    print(f"{name}: {row['verdict']}", flush=True)
    return row


def serve(folder: Path, name: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, str(folder), name]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def without_plugin(folder: Path, name: str) -> str:
    """Whether vLLM alone serves a case of the plugin: newer versions may have a kernel."""
    done = serve(folder, name, STOCK)
    if done.returncode == 0:
        return "serves"
    return "refuses" if any(text in done.stdout + done.stderr for text in REFUSALS) else "fails"


def print_table(rows: list[dict]) -> None:
    """One line for each case, in Markdown; differences in nats, the largest over all tokens of the prompts."""
    titles = (
        "case", "dtype", "rule", "difference", "control", "from the control", "equal greedy tokens",
        "margin where they part", "kernel",
        "vLLM without the plugin", "",
    )  # fmt: skip
    lines = [titles, ("---",) * len(titles)]
    for row in rows:
        cells = [row["case"], row["dtype"], row["rule"]]
        if "difference" in row:
            cells += [f"{row['difference']:.1e}", row["control"], f"{row['from_control']:.1e}"]
            cells += [f"{row['greedy_equal']}/{row['greedy']}", f"{row['margin']:.1e}"]
            cells += [row["kernels"], row["stock_vllm"]]
        else:
            cells += [""] * 7
        lines.append((*cells, row["verdict"]))
    for line in lines:
        print(f"| {' | '.join(line)} |")


def one_case(folder: Path, name: str) -> None:
    """Serve one case and print, as JSON, how far it is from what was expected."""
    from vllm import LLM, SamplingParams

    content = json.loads((folder / "cases.json").read_text())
    case, prompts = content["cases"][name], content["prompts"]
    llm = LLM(
        case["packed"], dtype=case["dtype"], enforce_eager=True, max_model_len=128, skip_tokenizer_init=True,
        **as_arguments(case["options"]),
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=len(case["greedy"][0]), prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    difference = from_control = margin = 0.0
    equal = 0
    for i, output in enumerate(outputs):
        served = [entry[token].logprob for token, entry in zip(prompts[i][1:], output.prompt_logprobs[1:], strict=True)]
        difference = max(difference, largest_gap(served, case["log_probabilities"][i]))
        from_control = max(from_control, largest_gap(served, case["control_log_probabilities"][i]))
        together = equal_tokens(output.outputs[0].token_ids, case["greedy"][i])
        equal += together
        if together < len(case["greedy"][i]):
            margin = max(margin, case["margins"][i][together])
    total = sum(len(tokens) for tokens in case["greedy"])
    row = {"difference": difference, "from_control": from_control, "margin": margin}
    print(json.dumps(row | {"greedy_equal": equal, "greedy": total}))


def as_arguments(options: list[str]) -> dict:
    """Options of `vllm serve` for `LLM`: ["--quantization-config.linear.activation", "mxfp8"] as nested dicts."""
    arguments: dict = {}
    for name, value in zip(options[::2], options[1::2], strict=True):
        *path, last = name.removeprefix("--").replace("-", "_").split(".")
        inner = arguments
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return arguments


def equal_tokens(a: list[int], b: list[int]) -> int:
    """How many tokens of two lists are equal before the first that is not: what follows has another prompt."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))


def largest_gap(a: list[float], b: list[float]) -> float:
    """The largest absolute difference of two lists of one length."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that make_cases.py wrote")
    parser.add_argument("case", nargs="?", help="run only this case and print its result as JSON")
    args = parser.parse_args()
    if args.case is not None:
        one_case(args.folder, args.case)
    else:
        sys.exit(main(args.folder))
