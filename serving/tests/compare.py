"""Step 2 of scripts/test_serving.sh, in vLLM's environment: vLLM with the plugin against the fake-quantized twins.

python compare.py FOLDER          every case, one process each, and a table
python compare.py FOLDER CASE     one case
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


def main(folder: Path) -> int:
    """Run all cases; returns the exit status."""
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    print(f"without the plugin: {what_vllm_says_without_the_plugin(folder, next(iter(cases)))}", flush=True)
    rows, failed = [], False
    for name, case in cases.items():
        environment = {**os.environ, "MX_QAT_ACTIVATION_RULE": case["rule"]}
        command = [sys.executable, __file__, str(folder), name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} failed:\n{(done.stdout + done.stderr)[-6000:]}")
            failed = True
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        good = row["difference"] < case["tolerance"] < row["another_rule"]
        good &= row["greedy_equal"] == row["greedy"] or case["dtype"] != "float32"
        failed |= not good
        rows.append((name, case, row, "ok" if good else "WRONG"))
        print(f"{name}: {rows[-1][-1]}", flush=True)
    print_table(rows)
    return int(failed)


def print_table(rows: list[tuple[str, dict, dict, str]]) -> None:
    """One line for each case; differences in nats, the largest over all tokens of the prompts."""
    titles = ("case", "dtype", "rule", "difference", "under another rule", "greedy tokens equal", "")
    lines = [titles]
    for name, case, row, verdict in rows:
        greedy = f"{row['greedy_equal']}/{row['greedy']}"
        differences = (f"{row['difference']:.1e}", f"{row['another_rule']:.1e}")
        lines.append((name, case["dtype"], case["rule"], *differences, greedy, verdict))
    for line in lines:
        print("  ".join(cell.ljust(18) for cell in line))


def what_vllm_says_without_the_plugin(folder: Path, name: str) -> str:
    """Why vLLM refuses the case, or that it does not (newer versions may have a kernel)."""
    command = [sys.executable, __file__, str(folder), name]
    done = subprocess.run(command, env={**os.environ, "VLLM_PLUGINS": ""}, capture_output=True, text=True)
    reasons = [line for line in (done.stdout + done.stderr).splitlines() if "Failed to find a kernel" in line]
    return reasons[-1].split("ValueError: ")[-1].split(" Reasons")[0] if reasons else f"exit status {done.returncode}"


def one_case(folder: Path, name: str) -> None:
    """Serve one case and print, as JSON, how far it is from what was expected."""
    from vllm import LLM, SamplingParams

    content = json.loads((folder / "cases.json").read_text())
    case, prompts = content["cases"][name], content["prompts"]
    llm = LLM(case["packed"], dtype=case["dtype"], enforce_eager=True, max_model_len=128, skip_tokenizer_init=True)
    sampling = SamplingParams(
        temperature=0, max_tokens=len(case["greedy"][0]), prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    difference = another = equal = 0.0
    for i, output in enumerate(outputs):
        served = [entry[token].logprob for token, entry in zip(prompts[i][1:], output.prompt_logprobs[1:], strict=True)]
        difference = max(difference, largest_gap(served, case["log_probabilities"][i]))
        another = max(another, largest_gap(served, case["log_probabilities_under_another_rule"][i]))
        pairs = zip(output.outputs[0].token_ids, case["greedy"][i], strict=True)
        equal += sum(mine == theirs for mine, theirs in pairs)
    total = sum(len(tokens) for tokens in case["greedy"])
    print(json.dumps({"difference": difference, "another_rule": another, "greedy_equal": int(equal), "greedy": total}))


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
