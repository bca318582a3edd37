"""Samples of the common form from the parts of a split, and the schema of each part.

All rows of a set have one schema, with one exception: columns without values count as absent, so the rows of a table
that has the columns of several schemas are each read by the columns that they fill.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from qat.errors import UserError

from ..bad_samples import BadSample, BadSamplePolicy
from ..conversations.schemas import Schema, filled_schemas, mixed_schemas, recognise, unknown_schema
from ..conversations.turns import unread
from ..sources.row import Row
from ..sources.source import Part

_LOOKED_AT = 32  # rows at the beginning of a part, of which most decide its schema
_SEARCHED = 10_000  # lines among which they are looked for

SurveyedPart = tuple["Part | Begun", "Schema | None"]


@dataclass
class Survey:
    """The parts of a split that hold samples, each with its schema, and what there is to tell about them."""

    parts: list[SurveyedPart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Begun:
    """A part whose rows can be read once, after its first ones were looked at; a hub's stream is not begun again."""

    def __init__(self, part: Part) -> None:
        self.name, self.may_be_metadata, self.is_one_object = part.name, part.may_be_metadata, part.is_one_object
        self._rows, self._looked_at = part.rows(), []

    def first_rows(self, count: int) -> list[Row]:
        """The first rows, up to the `count`-th that is no BadSample."""
        good = 0
        while good < count and len(self._looked_at) < _SEARCHED and (row := next(self._rows, None)) is not None:
            self._looked_at.append(row)
            good += isinstance(row[1], dict)
        return self._looked_at

    def rows(self) -> Iterator[Row]:
        """All rows, once."""
        return itertools.chain(self._looked_at, self._rows)


def survey(parts: Sequence[Part | Begun]) -> Survey:
    """Look at the first rows of every part of a split.

    Raises:
        UserError: a part of an unknown schema, of a preference set, or of another schema than the part before it.
    """
    found, passed_over = Survey(), []
    schemas: dict[str, None] = {}
    chosen: dict[str, str] = {}
    first: tuple[Schema, Part | Begun] | None = None
    for part in parts:
        rows = _first_rows(part)
        if part.may_be_metadata and not any(recognise(row) for _, row in rows) and part.is_one_object():
            passed_over.append(part.name)
            continue
        schema = _schema_of(rows)
        found.parts.append((part, schema))
        for _, row in rows:
            filled = filled_schemas(row)
            if filled:
                schemas.setdefault(filled[0].name)
            other = next((o for o in filled[1:] if not o.required <= filled[0].required | filled[0].optional), None)
            if other is not None:
                chosen.setdefault(filled[0].name, other.name)
        if schema is not None and first is not None:
            _check_alike(first, (schema, part), rows)
        first = first or (schema and (schema, part))
    found.notes += [f"passed over {name}: one object, and no sample" for name in passed_over]
    if schemas:
        several = "; each row is read by the columns that it fills" if len(schemas) > 1 else ""
        found.notes.append(f"schema {' and '.join(schemas)}{several}")
    found.notes += [f"rows fill the columns of {a} and of {b}; the former is read" for a, b in chosen.items()]
    return found


def _first_rows(part: Part | Begun) -> list[tuple[str, dict]]:
    rows = part.first_rows(_LOOKED_AT) if isinstance(part, Begun) else itertools.islice(part.rows(), _SEARCHED)
    return list(itertools.islice(((place, row) for place, row in rows if isinstance(row, dict)), _LOOKED_AT))


def _schema_of(rows: list[tuple[str, dict]]) -> Schema | None:
    """The schema that most of the rows have; None if there are no rows."""
    counts = Counter(schema for _, row in rows if (schema := recognise(row)) is not None)
    if not counts and rows:
        raise unknown_schema(rows[0][1], rows[0][0])
    for place, row in rows:
        if isinstance(row.get("label"), bool) and isinstance(row.get("completion"), str):
            raise UserError(
                f"{place}: a column `label` says which completions are wanted; fine-tuning learns all answers: keep "
                "the wanted rows and leave the column out"
            )
    return counts.most_common(1)[0][0] if counts else None


def _check_alike(first: tuple, other: tuple, rows: list[tuple[str, dict]]) -> None:
    (schema, part), (other_schema, other_part) = first, other
    has_columns_of_both = any(schema.required <= row.keys() for _, row in rows if recognise(row) is other_schema)
    if other_schema is schema or has_columns_of_both:
        return
    raise UserError(
        f"two schemas in one set: {part.name} has {schema.name}, {other_part.name} has {other_schema.name}; give the "
        "files separately, with a comma between them, or move what is no data out of the folder"
    )


def read_samples(parts: Iterable[SurveyedPart], policy: BadSamplePolicy) -> Iterator[tuple[str, str]]:
    """(place, JSON text) of each good row; bad ones are handled by `policy`."""
    for part, expected in parts:
        for place, row in part.rows():
            try:
                if isinstance(row, BadSample):
                    raise row
                expected = expected or recognise(row)
                if expected is None:
                    raise unknown_schema(row, place)
                schema = _schema_for(row, expected)
                text = json.dumps(schema.sample_of(row), ensure_ascii=False)
            except BadSample as error:
                policy.handle(error.at(place))
                continue
            policy.note_unread(unread(row, schema.required | schema.optional))
            yield place, text


def _schema_for(row: dict, expected: Schema) -> Schema:
    """The schema of the columns that `row` fills, if the set may have it."""
    filled = filled_schemas(row)
    if not expected.required <= row.keys():
        raise mixed_schemas(row, expected)
    return filled[0] if filled else expected
