"""The run folder: the whole record of a run.

    recipe.toml         the resolved recipe
    data.json           what the model must know of its training data (dimensions, classes, mean, deviation, counts)
    metrics.jsonl       every record, a line an event (see meter.py)
    exchange.json       how ranks exchange, and what was measured before that was settled (`Strategy.prepare`)
    checkpoints/        see checkpoint.py
    logs/, tensorboard/
    model.safetensors   the model that ships: the best on validation (without a validation set, the last)
    success             JSON; there only if the run came to its end
    failure.json        rank, host, step and cause of the last failure
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.checkpoint import check
from hpc.config import OPERATIONAL, Recipe, differences, read_toml
from hpc.shards import MANIFEST, sha256_of, write_json

RECIPE, DATA, SUCCESS, FAILURE, MODEL = "recipe.toml", "data.json", "success", "failure.json", "model.safetensors"
EXCHANGE = "exchange.json"


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """A run's folder, opened for training on rank 0.

    path  the folder; made if it is not there
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.opened = False  # whether it is this run's: only then a failure is written into it

    def open(self, recipe: Recipe, fields: dict[str, Any], operational: Sequence[str] = ()) -> bool:
        """Make the folder, or check that it belongs to this recipe and data; whether the run is finished already.

        operational  recipe keys that may differ, beside config.OPERATIONAL

        A run that has not come to a checkpoint yet has nothing to lose: its recipe is replaced.

        Raises RunError naming the keys that differ, if it holds another recipe's run.
        """
        finished, learned = (self.path / SUCCESS).exists(), any(self.checkpoints.glob("step-*"))
        data = {"fields": fields, "train": _digest(recipe.data.train), "validation": _digest(recipe.data.validation)}
        if (self.path / RECIPE).exists():
            held = read_toml(self.path / RECIPE)
            changed = differences(held, recipe.to_dict(), (*OPERATIONAL, *operational))
            held_data = read_data(self.path)
            other = [k for k in ("train", "validation") if held_data[k] != data[k]]
            changed += [f"data.{k}: another data set than before" for k in other]
            if changed and (finished or learned):
                raise RunError(
                    f"run folder '{self.path}' holds a run of another recipe ({'; '.join(changed)}); "
                    f"choose another folder (run=...; init_from={self.path} starts from this model), or remove it"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunError(f"'{self.path}' is not empty and not a run folder; choose another one (run=...)")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.path / DATA, data)
        temporary = self.path / f".{RECIPE}.tmp"
        temporary.write_text(recipe.to_toml(), encoding="utf-8")
        os.replace(temporary, self.path / RECIPE)
        return finished

    def exchange(self) -> dict[str, Any] | None:
        """How ranks exchanged when the run began or was last resumed; None if that is not known."""
        try:
            return json.loads((self.path / EXCHANGE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def keep_exchange(self, settled: dict[str, Any]) -> None:
        write_json(self.path / EXCHANGE, settled)

    def ship(self, checkpoint: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Put a checkpoint's model under its own name and mark the run as a success; the summary with its SHA-256.

        Raises CheckpointError if the checkpoint was altered since it was written.
        """
        check(self.checkpoints / checkpoint)
        temporary = self.path / f".{MODEL}.tmp"
        shutil.copyfile(self.checkpoints / checkpoint / MODEL, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path / MODEL)
        whole = summary | {"sha256": sha256_of(self.path / MODEL)}
        write_json(self.path / SUCCESS, whole)
        (self.path / FAILURE).unlink(missing_ok=True)
        return whole

    def fail(self, rank: int, host: str, where: str, error: BaseException) -> None:
        """Keep the cause of a failure; a disk too full even for that is not the failure to report."""
        if not self.opened:
            return
        cause = {
            "time": time.time(), "rank": rank, "host": host, "where": where,
            "error": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        try:
            write_json(self.path / FAILURE, cause)
        except OSError as second:
            print(f"({FAILURE} could not be written either: {second})", file=sys.stderr)


def read_data(path: Path) -> dict[str, Any]:
    """What a run kept of its data. Raises RunError if the folder is no run folder."""
    try:
        return json.loads((path / DATA).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"'{path}' is not a run folder ({DATA}: {error})") from error


def compare_fields(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
    """Raise RunError if a data set's fields are not those that a model is trained on.

    ours, theirs  field descriptions (`dataset.json`, `data.json`)
    where         the other data set's name, for the message
    """
    for name, about in ours.items():
        other = theirs.get(name)
        if other is None:
            raise RunError(f"data set '{where}' has no field '{name}'; it has {sorted(theirs)}")
        made, other_made = (dict(f.get("description") or {}) for f in (about, other))
        pairs = [(key, about.get(key), other.get(key)) for key in ("width", "classes", "names", "dtype")]
        pairs += [(key, made.get(key), other_made.get(key)) for key in sorted((made | other_made).keys() - {"source"})]
        for key, mine, its in pairs:
            if mine != its:
                raise RunError(
                    f"data set '{where}': field '{name}' has another {key} than the training data ({_brief(its)}, not "
                    f"{_brief(mine)}); prepare it the same way, with --stats-from (text and sentences: "
                    "--vocabulary-from) the training set"
                )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(folder: str) -> str:
    if not folder:
        return ""
    return hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()
