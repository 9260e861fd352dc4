"""What to make of a file of labelled sentences: which sets, how it is read, and what its words are numbered by."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpc.prepare.options import Part, check_set
from hpc.prepare.texts import refuse_repeated
from hpc.prepare.vocabulary import Vocabulary, fields_of, lower_of, named
from hpc.shards import DataError

HELD = 0.1  # of the sentences, for validation, where nothing is said


class Given(NamedTuple):
    """What is taken from another data set: its words, with their numbers, and its classes."""

    words: Vocabulary
    classes: list[str]


@dataclass(frozen=True)
class Plan:
    """What to make of a file of sentences.

    file              lines "label sentence"
    folds             parts to cut the file into for cross-validation; 0: none
    validation, test  a fraction of the file (0: none) or a file of its own; with folds, `validation` is a fraction of
                      each fold's training part and `test` is not given. None: a tenth, and nothing
    into              write everything into this one set, and hold nothing out
    vocabulary_from   a data set of sentences whose words (their case, too) and classes are kept
    encoding          of all files; "auto": UTF-8, or latin-1 for a file that is not
    min_count         words that the training part has less often are unknown
    lower             put words into lower case
    vectors           a file of word vectors: words that have one are known
    seed              decides the order and what is held out
    shards            pairs of shards that the largest set has

    Raises ValueError for what contradicts itself.
    """

    file: Path
    folds: int = 0
    validation: Part | None = None
    test: Part | None = None
    into: str | None = None
    vocabulary_from: Path | None = None
    encoding: str = "auto"
    min_count: int = 1
    lower: bool = False
    vectors: Path | None = None
    seed: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        for name, part in (("validation", self.validation), ("test", self.test)):
            if not isinstance(part, Path | None) and not 0 <= part < 1:
                raise ValueError(f"--{name} {part:g}: expected a fraction from 0 to below 1, or a file (./{part:g})")
        if self.folds and (self.folds < 2 or isinstance(self.validation, Path) or self.test):
            raise ValueError(
                f"--folds {self.folds}: expected at least 2, no --test, and a fraction for --validation: every fold's "
                "test set is a part of FILE"
            )
        if self.into is not None:
            check_set(self.into)
            if self.folds or self.validation is not None or self.test is not None:
                raise ValueError(
                    "--set writes one set and holds nothing out; leave out --set, or --folds, --validation and --test"
                )
        if self.vocabulary_from is not None and (self.min_count != 1 or self.vectors is not None):
            raise ValueError("--vocabulary-from brings its own words; leave out --min-count and --vectors")
        for option, value in (("--min-count", self.min_count), ("--shards", self.shards)):
            if value < 1:
                raise ValueError(f"{option} {value}: expected at least 1")

    @property
    def parts(self) -> tuple[Part, Part]:
        """What is held out for validation and for the test."""
        judged = HELD if self.validation is None and self.into is None else self.validation
        return judged or 0.0, self.test or 0.0

    def files(self) -> list[Path]:
        """All files of sentences, the first to train on. Raises DataError for one that is not there or given twice."""
        for option, part in (("FILE", self.file), ("--validation", self.validation), ("--test", self.test)):
            if isinstance(part, Path) and not part.is_file():
                other = "no" if option == "FILE" else "neither a fraction, e.g. 0.1, nor a"
                raise DataError(f"{option} '{part}' is {other} file; give one of lines 'label sentence'")
        found = [self.file, *(part for part in self.parts if isinstance(part, Path))]
        refuse_repeated(found)
        return found

    def case(self) -> bool:
        """Whether words are put into lower case. Raises ValueError, DataError as `lower_of`."""
        return lower_of(self.lower, self.vocabulary_from, "sentences")

    def given(self) -> Given | None:
        """What is taken from another data set, if there is one. Raises DataError if that is none of sentences."""
        if self.vocabulary_from is None:
            return None
        fields = fields_of(self.vocabulary_from, "sentences")
        words = Vocabulary(tuple(fields["words"]["names"]), fields["words"]["unknown"], None)
        return Given(words, fields["labels"]["names"])

    def options(self) -> dict[str, Any]:
        """What is chosen, in JSON: files by their names (what they hold is told apart by its digest)."""
        judged, tested = self.parts
        found = asdict(self) | {"validation": judged, "test": tested, "lower": self.case()}
        made = {name: value.name if isinstance(value, Path) else value for name, value in found.items()}
        made["set"] = made.pop("into")
        made["vocabulary_from"] = None if self.vocabulary_from is None else named(self.vocabulary_from)
        return made
