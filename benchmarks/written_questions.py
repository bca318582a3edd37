"""Questions that the teacher writes itself: arithmetic in everyday stories, and beginnings of Python functions.

A user trains on questions like those that the model will be asked. Tasks of a benchmark must not be trained on, so the
teacher is asked for questions of their kind, by subjects that are listed here, and samples them. None is kept that
shares a run of words with a problem that is evaluated.
"""

from __future__ import annotations

import ast
import re
from itertools import product

_SUBJECTS = (
    "a bakery", "a school trip", "a vegetable garden", "a bicycle ride", "a train journey", "a swimming club",
    "a chess tournament", "a library", "a pet shop", "a fish tank", "a farm with cows", "an orchard", "a toy factory",
    "a cinema", "a concert", "a football team", "a birthday party", "a road trip by car", "a flight", "a hotel",
    "a restaurant bill", "a coffee shop", "a sewing workshop", "a carpenter", "painting a house", "laying tiles",
    "a phone plan", "a savings account", "pocket money", "a charity run", "a book that is read in some days",
    "homework hours", "a cake recipe", "lemonade", "a marathon training", "a hiking tour", "a camping weekend",
    "a box of crayons", "stamps that are collected", "marbles", "trading cards", "a video game", "a photo album",
    "a post office", "a laundry", "a parking garage", "an electricity bill", "a water tank", "a factory shift",
    "a salesman's commission", "ages in a family", "grades of tests", "a zoo", "a museum", "a beehive", "a flower shop",
    "a shoe shop", "firewood", "a ferry", "a bus with stops", "a dance class", "an office that orders paper",
    "a news vendor", "a computer that is paid in rates",
)  # fmt: skip
_EXAMPLES = (
    "Nora bakes 5 trays of 12 rolls. She keeps 8 rolls for her family and sells the rest for $0.50 each. How many "
    "dollars does she earn?",
    "A bus starts with 34 passengers. At the first stop 9 get off and 5 get on, at the second stop half of the "
    "passengers get off. How many passengers are on the bus now?",
    "Omar reads 20 pages on Monday and 50% more on Tuesday. On Wednesday he reads twice as many as on Monday. How "
    "many pages has he read in the three days?",
    "A tank holds 240 liters of water. A pump fills 15 liters a minute and a leak loses 3 liters a minute. How many "
    "minutes does it take to fill the empty tank?",
    "Tickets for a play cost $12 for adults and $7 for children. A family of 2 adults and 3 children pays with a "
    "$50 bill. How much change do they get?",
    "Lena is 4 years older than Paul. In 6 years Paul will be 20 years old. How old is Lena today?",
    "A shop had 90 shirts. It sold a third of them in the morning and a quarter of the remaining ones in the "
    "afternoon. How many shirts are left?",
    "Ravi earns $16 an hour for 40 hours a week, and one and a half times as much for each further hour. How much "
    "does he earn in a week of 46 hours?",
    "Three friends collect shells. Ada has 18, Bo has 6 fewer than Ada, and Cy has twice as many as Bo. How many "
    "shells do they have altogether?",
    "A cyclist rides 3 hours at 18 miles per hour and then 2 hours at 12 miles per hour. What is her average speed "
    "in miles per hour, to the nearest whole number?",
    "A recipe for 4 people takes 300 grams of flour and 2 eggs. Eggs cost $0.40 each and 100 grams of flour cost "
    "$0.20. How much do eggs and flour for 10 people cost?",
    "Mia saves $25 a month for a bicycle of $420. Her aunt gives her $70, and the shop takes 10% off the price. "
    "After how many months can she buy it?",
)
_PROBLEM = (
    "Here is a math word problem:\n\n{example}\n\nWrite another one about {subject}. It tells another story with other "
    "numbers, and something else has to be computed. Write the problem alone, without a solution."
)
_DATA = (
    "a list of integers", "a list of floats", "a list of strings", "a string", "two strings", "two lists",
    "a list of lists", "a dictionary of counts", "a dictionary of lists", "a tuple of numbers", "a matrix",
    "an integer", "two integers", "a date as a string", "a sentence", "a list of pairs", "a set of integers",
    "a binary string", "a path of a file as a string", "a list of dictionaries",
)  # fmt: skip
_DEEDS = (
    "counts something", "sorts it by an unusual rule", "removes some elements", "finds the largest of something",
    "checks a condition", "groups elements", "encodes it", "decodes it", "compares neighbours",
    "computes a sum of some", "splits it into parts", "merges what it is given", "searches for a pattern",
    "rotates or shifts it", "converts it into another form", "finds what is missing", "replaces some elements",
    "computes a sequence from it", "handles the empty case in a special way",
    "finds all divisors, digits or positions of something",
)  # fmt: skip
_FUNCTION = (
    "Write the beginning of a Python function: its imports, its signature with type hints, and a docstring. It takes "
    "{data} and {deed}. The docstring says precisely what it does and has two examples with >>>. Do not write the body."
)
MAX_NEW_TOKENS = 256
VERSION = 2  # of `question_of`: another one takes other questions from the same texts
_SAMPLES = {"number": 6, "code": 4}  # of each request
_SHORTEST, _LONGEST = 40, 1200  # characters of a question
_REFUSAL = re.compile(r"(?i)as an ai\b|i cannot|i'm sorry|write another one")  # the last: the request again
_ANNOUNCES = re.compile(r"(?i)\A(?:sure|certainly|of course)\b|\b(?:problems?|question|example|here|one)\b\D*:\Z")
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def requests(times: int = 1) -> list[dict]:
    """{"request", "kind"}: what the teacher is asked, for questions of the kinds "number" and "code".

    Args:
        times: each request is in the list this often for each sample of _SAMPLES.
    """
    problems = [_PROBLEM.format(subject=subject, example=text) for subject, text in product(_SUBJECTS, _EXAMPLES)]
    functions = [_FUNCTION.format(data=data, deed=deed) for data, deed in product(_DATA, _DEEDS)]
    texts = [("number", text) for text in problems * (times * _SAMPLES["number"])]
    texts += [("code", text) for text in functions * (times * _SAMPLES["code"])]
    return [{"request": text, "kind": kind} for kind, text in texts]


def question_of(kind: str, text: str) -> str | None:
    """The question in what the teacher wrote; None where there is none.

    Args:
        kind: "number" or "code", see `requests`.
        text: the teacher's answer to a request.
    """
    question = _problem(text) if kind == "number" else _beginning(text)
    return question if question is not None and _SHORTEST <= len(question) <= _LONGEST else None


def _problem(text: str) -> str | None:
    """The paragraphs up to the first that asks, without a title or an announcement; it has two numbers."""
    paragraphs = [part.strip(" *#") for part in re.split(r"\n\s*\n", text.strip())]
    paragraphs = [part for part in paragraphs if not re.fullmatch(r"[^.?!]*", part)]
    asking = next((number for number, part in enumerate(paragraphs) if part.endswith("?")), None)
    if asking is None:
        return None
    begins = max((number + 1 for number, part in enumerate(paragraphs[:asking]) if _ANNOUNCES.search(part)), default=0)
    asked = "\n".join(paragraphs[begins : asking + 1])
    if _REFUSAL.search(asked):
        return None
    question = re.sub(r"(?i)^(?:(?:math |word )*problem|question|q)\W*:\W*", "", asked)
    return question if len(re.findall(r"\d+", question)) > 1 else None


def _beginning(text: str) -> str | None:
    """The lines of a Python program up to the end of the docstring of its only function."""
    found = _BLOCK.search(text)
    source = (found.group(1) if found else text).strip("\n")
    for more in ("", "\n    pass"):
        try:
            tree = ast.parse(source + more)
        except (SyntaxError, ValueError):
            continue
        *imports, function = tree.body or [None]
        if not isinstance(function, ast.FunctionDef):
            return None
        if not all(isinstance(node, ast.Import | ast.ImportFrom) for node in imports):
            return None
        has_docstring = ast.get_docstring(function) is not None
        return "\n".join(source.splitlines()[: function.body[0].end_lineno]) if has_docstring else None
    return None
