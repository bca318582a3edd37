"""Run the program: python -m training.sensitivity --model_name_or_path M --dataset D --bits_budget 5.0."""

from qat.errors import reported_in_one_line

from .measure import main

if __name__ == "__main__":
    with reported_in_one_line():
        main()
