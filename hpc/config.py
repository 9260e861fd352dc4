"""The recipe: frozen, typed, strict; the only reader of TOML recipes and of `key=value` overrides.

One recipe file describes one run. Fixed sections are typed here; the tables `[task]`, `[strategy]`, `[optim]` and
`[schedule]` name a registered class, and their keys are that class's keyword-only arguments, typed by its signature
(`build.py` hands the registered classes in, so tasks and strategies of other packages are checked just as strictly).
"""

from __future__ import annotations

import difflib
import inspect
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tomli_w
from annotated_types import Ge
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from hpc.files import read_start

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)
TABLES = ("task", "strategy", "optim", "schedule")
DEFAULT_NAMES = {"strategy": "allreduce", "optim": "momentum", "schedule": "newbob"}
# Keys that change where or how a run is kept, not what is learned: a run may be resumed with other values of these.
OPERATIONAL = (
    "run", "device", "data.train", "data.validation", "data.stage", "data.verify", "checkpoint", "log",
)


AT_MOST = 1 << 20  # bytes of a recipe


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names the key, the value and what is allowed."""


class Section(BaseModel):
    model_config = STRICT


class Data(Section):
    """Which data, and how it is cut into batches, splits and blocks."""

    train: str = Field(description="folder of the training data set")
    validation: str = Field(default="", description="folder of the validation data set; empty: no validation")
    batch: int = Field(default=1024, ge=1, description="frames (or sequences) of one step over all splits together")
    split_frames: int = Field(default=262144, ge=1, description="frames of a split held in memory at a time")
    draw: float = Field(
        default=0.0, ge=0, le=1,
        description="part of the data that every split draws anew each epoch, whatever others draw; 0: they share all",
    )
    runs: int = Field(default=8, ge=1, description="contiguous runs that a split's frames are read from")
    stage: str = Field(default="", description="node-local folder to copy the shards to first; empty: read in place")
    verify: bool = Field(default=True, description="check every shard's SHA-256 once, before training")


class Validate(Section):
    """When rank 0 judges."""

    every: int = Field(default=0, ge=0, description="what the loss counts, between validations; 0: once an epoch")
    metric: str = Field(default="loss", description="the metric that is judged; smaller is better")


class Minibatch(Section):
    """When larger minibatches are tried, and which is kept (paper 002, section 4)."""

    every: int = Field(
        default=0, ge=0,
        description="what the loss counts between selections, at least, which come after validations; 0: none",
    )
    stretch: int = Field(default=50000, ge=1, description="what the loss counts, of the data that sizes are tried on")
    sizes: list[Annotated[int, Ge(1)]] = Field(
        default=[1, 2, 4, 8], min_length=1, description="what is tried: so many times data.batch"
    )
    metric: str = Field(default="frame_error", description="what is compared, on that data; smaller is better")
    tolerance: float = Field(
        default=0.002, ge=0, description="by how much a larger size's metric may be above the best"
    )


class Checkpoint(Section):
    """What is kept to resume from."""

    every: int = Field(
        default=0, ge=0, description="what the loss counts, between checkpoints beside validations; 0: none"
    )
    keep: int = Field(default=2, ge=1, description="how many of the last checkpoints to keep, beside the best one")


class Log(Section):
    """What is written down while training, and when a silent run is called a hang."""

    every: int = Field(default=50, ge=1, description="steps between records in metrics.jsonl")
    tensorboard: bool = Field(default=True, description="write TensorBoard events too")
    trace: int = Field(
        default=20, ge=0, description="turns traced from every start and validation on ('trireme trace'); 0: none"
    )
    watchdog: float = Field(default=900.0, ge=0, description="seconds without progress until the job ends; 0: never")
    silence: float = Field(default=6.0, ge=0, description="seconds until a host nobody hears is lost; 0: never")


class Recipe(Section):
    """Everything that decides what is learned, and where it is put."""

    run: str = Field(pattern=r"^[^\x00-\x1f\x7f]+$", description="the run's folder")
    seed: int = Field(default=1, ge=0, lt=2**31)
    splits: int = Field(default=1, ge=1, description="parts the data is learned in; the number of ranks must divide it")
    threads: int = Field(default=1, ge=1, description="threads a rank; another number may change last bits")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    init_from: str = Field(default="", description="start from the model of this finished run (folder)")
    data: Data
    validate_: Validate = Field(default=Validate(), alias="validate")
    minibatch: Minibatch = Minibatch()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    task: Any
    strategy: Any
    optim: Any
    schedule: Any

    def to_dict(self) -> dict[str, Any]:
        """All keys with their resolved values, nested as in the file."""
        plain = self.model_dump(by_alias=True)
        scalars = {k: v for k, v in plain.items() if not isinstance(v, dict)}
        return scalars | {k: v for k, v in plain.items() if isinstance(v, dict)}

    def to_toml(self) -> str:
        """The resolved recipe as a recipe file."""
        return tomli_w.dumps(self.to_dict())


def options(section: Any) -> dict[str, Any]:
    """The keyword arguments that a `[task]`-like table carries for its class."""
    return {k: v for k, v in section.model_dump().items() if k != "name"}


def keywords_of(cls: type) -> dict[str, tuple[Any, Any]]:
    """A class's keyword-only constructor arguments: name -> (type, default), `...` for a required one."""
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    found = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            if name not in hints:
                raise TypeError(f"{cls.__name__}.__init__: option '{name}' needs a type, the recipe is checked by it")
            kind = Annotated[str, BeforeValidator(_as_text)] if hints[name] is str else hints[name]
            found[name] = (kind, ... if parameter.default is inspect.Parameter.empty else parameter.default)
    return found


def _as_text(value: object) -> object:
    """A whole number where text is expected is that text: task.chunk=20."""
    return str(value) if type(value) is int else value


def load(path: str | Path, overrides: Sequence[str], registry: Mapping[str, Mapping[str, type]]) -> Recipe:
    """Read a recipe file, apply `key=value` overrides and check every key.

    path       a TOML file
    overrides  "optim.learning_rate=0.05": dotted key, TOML value (a bare word is a string)
    registry   table name -> registered name -> class, for the tables of TABLES

    Raises RecipeError, listing every wrong key; OSError if the file cannot be read.
    """
    raw = read_toml(path)
    for override in overrides:
        apply_override(raw, override)
    return resolve(raw, registry)


def read_toml(path: str | Path) -> dict[str, Any]:
    """A recipe file as nested dictionaries, unchecked. Raises RecipeError if it is missing or not TOML."""
    try:
        return tomllib.loads(read_start(Path(path), AT_MOST).decode())
    except RecursionError:
        raise RecipeError(f"recipe '{path}' is nested too deeply") from None
    except FileNotFoundError as error:
        raise RecipeError(f"recipe '{path}' does not exist; Trireme's own are in jobs/recipes/") from error
    except IsADirectoryError as error:
        raise RecipeError(f"'{path}' is a folder, not a recipe file") from error
    except ValueError as error:
        raise RecipeError(f"recipe '{path}' is not TOML: {error}") from error


def resolve(raw: dict[str, Any], registry: Mapping[str, Mapping[str, type]]) -> Recipe:
    """Check a recipe given as nested dictionaries. Raises RecipeError."""
    fields: dict[str, Any] = {}
    raw = dict(raw)
    for table in TABLES:
        raw.setdefault(table, {})
        fields[table] = (_table_model(table, raw, registry[table]), ...)
    model = create_model("Recipe", __base__=Recipe, **fields)
    try:
        recipe = model.model_validate(raw)
        if recipe.data.batch % recipe.splits:
            raise RecipeError(
                f"recipe key 'data.batch' = {recipe.data.batch}: expected a multiple of splits = {recipe.splits}"
            )
        return recipe
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(e, model) for e in error.errors())) from None


def _table_model(table: str, raw: dict[str, Any], known: Mapping[str, type]) -> type[BaseModel]:
    given = raw[table]
    if not isinstance(given, dict):
        raise RecipeError(f"recipe key '{table}' = {given!r}: expected a table, [{table}]")
    name: Any = given.get("name", DEFAULT_NAMES.get(table))
    if not isinstance(name, str) or name not in known:
        if name is None:
            raise RecipeError(f"recipe key '{table}.name' is missing; it is one of {sorted(known)}")
        raise RecipeError(f"recipe key '{table}.name' = {name!r}: not registered; {_nearest(str(name), known)}")
    raw[table] = given | {"name": name}
    fields: dict[str, Any] = {"name": (Literal[name], name), **keywords_of(known[name])}
    return create_model(table, __config__=STRICT, **fields)


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key in nested dictionaries, in place. Raises RecipeError if it is not `key=value`."""
    key, sign, text = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise RecipeError(f"override '{override}' is not of the form key=value, e.g. optim.learning_rate=0.05")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except RecursionError:
        raise RecipeError(f"override '{override[:60]}...' is nested too deeply") from None
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"override '{override}': '{part}' is a value, not a table")
    table[parts[-1]] = value


def differences(one: Mapping[str, Any], other: Mapping[str, Any], ignore: Sequence[str] = OPERATIONAL) -> list[str]:
    """Dotted keys in which two recipes (nested dictionaries) differ, as "key: a -> b", the ignored ones left out."""
    a, b = dict(flatten(one)), dict(flatten(other))
    found = []
    for key in sorted(a.keys() | b.keys()):
        ignored = any(key == i or key.startswith(f"{i}.") for i in ignore)
        if not ignored and a.get(key) != b.get(key):
            found.append(f"{key}: {a.get(key)!r} -> {b.get(key)!r}")
    return found


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dictionaries."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest(word: str, valid: Any) -> str:
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"valid here: {', '.join(names)}{hint}"


def _explain(error: Any, model: type[BaseModel]) -> str:
    """One line for one of pydantic's errors: the key, the value, what is allowed."""
    path = [str(p) for p in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        section: Any = model
        for part in path[:-1]:
            section = next(f.annotation for n, f in section.model_fields.items() if part in (n, f.alias))
        valid = [f.alias or n for n, f in section.model_fields.items()]
        hint = ""
        if path[0] in TABLES:  # most often the name was changed, and another name's keys are still there
            name = section.model_fields["name"].default
            hint = f"; to change {path[0]}.name, replace the whole table: '{path[0]}={{name=\"{name}\", ...}}'"
        return f"unknown recipe key '{key}'; {_nearest(path[-1], valid)}{hint}"
    if error["type"] == "missing":
        return f"recipe key '{key}' is missing"
    allowed = error["msg"].removeprefix("Input should be ")
    return f"recipe key '{key}' = {error['input']!r}: expected {allowed}"


