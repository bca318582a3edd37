"""Write problems of reasoning-gym as JSON Lines; `fetch.py` runs this where that package is installed.

    python reasoning.py GENERATOR COUNT SEED FILE

Problem i of a generator is a function of SEED + i alone, so ranges of seeds that do not overlap give other problems.
"""

import json
import sys


def main() -> None:
    """Write {"generator", "question", "answer"} of each problem."""
    import reasoning_gym

    generator, count, seed, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    problems = reasoning_gym.create_dataset(generator, size=count, seed=seed)
    with open(path, "w", encoding="utf-8") as file:
        for problem in problems:
            row = {"generator": generator, "question": problem["question"], "answer": problem["answer"]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
