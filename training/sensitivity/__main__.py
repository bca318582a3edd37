"""Run the program: python -m training.sensitivity --model_name_or_path M --dataset D --bits_budget 5.0."""

from .measure import main

if __name__ == "__main__":
    main()
