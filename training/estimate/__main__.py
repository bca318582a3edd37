"""Run the program: python -m training.estimate with the arguments of main.py."""

from qat.errors import reported_in_one_line

from .program import main

if __name__ == "__main__":
    with reported_in_one_line():
        main()
