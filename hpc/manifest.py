"""Manifests: what a data set or a checkpoint consists of, by whomever it was written, checked before it is believed.

A manifest names files in its own folder, never elsewhere, with their sizes and SHA-256, and seals itself: no byte of it
can change unnoticed, and what it says of sizes is held against the files before anything is allocated for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Len, MinLen
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hpc.files import SEAL, read_object

AT_MOST = 32 << 20  # bytes of a manifest, which may take 30 times as many in memory; vocabularies are in them
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=255)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Ge(0)]


class Part(BaseModel):
    """Strict in what is named here; what else is there is kept, and trusted by nobody."""

    model_config = ConfigDict(strict=True, extra="allow")


class ShardFile(Part):
    name: FileName
    rows: Annotated[dict[str, Count], MinLen(1)]
    utterances: Count
    bytes: Count
    sha256: Digest


class Shard(Part):
    files: Annotated[list[ShardFile], MinLen(1)]


class About(Part):
    """What is said of a field; sizes that memory is taken for are those of lists that are there."""

    classes: Count | None = None
    names: list[str] | None = None
    width: Count | None = None
    mean: list[float] | None = None

    @model_validator(mode="after")
    def _sizes(self) -> About:
        if self.classes is not None and self.classes != len(self.names or ()):
            raise ValueError(f"{self.classes} classes, and {len(self.names or ())} names")
        if self.width is not None and self.mean is not None and self.width != len(self.mean):
            raise ValueError(f"rows of {self.width} values, and {len(self.mean)} means")
        return self


class RunData(Part):
    """A run folder's `data.json`."""

    fields_: dict[str, About] = Field(alias="fields")


class DataManifest(RunData):
    """`dataset.json`."""

    version: Literal[2] = Field(alias="schema")
    shards: list[Shard]


class Sealed(Part):
    bytes: Count
    sha256: Digest


class RankPart(Part):
    file: FileName
    pieces: list[Annotated[list[Count], Len(2, 2)]]
    splits: list[Count]


class CheckpointManifest(Part):
    """A checkpoint's `manifest.json`."""

    files: dict[FileName, Sealed]
    parts: Annotated[list[RankPart], MinLen(1)]


Kind = TypeVar("Kind", bound=Part)


def read_checked(path: Path, kind: type[Kind]) -> dict[str, Any]:
    """A manifest of this kind, as plain values. Raises ValueError, saying what is wrong, or OSError."""
    value = checked(read_object(path, AT_MOST), kind)
    if SEAL not in value:
        raise ValueError(f'it has no "{SEAL}"')
    return value


def checked(value: dict[str, Any], kind: type[Part]) -> dict[str, Any]:
    """The value, if it is of this kind. Raises ValueError, saying what is wrong."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    return value
