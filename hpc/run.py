"""The run folder: the whole record of a run.

    recipe.toml         the resolved recipe
    data.json           what the model must know of its training data (dimensions, classes, mean, deviation, counts)
    metrics.jsonl       every record, a line an event (see meter.py)
    exchange.json       how ranks exchange, and what was measured before that was settled (`Strategy.prepare`)
    checkpoints/        see checkpoint.py
    logs/, tensorboard/
    model.safetensors   the model that ships: the best on validation (without a validation set, the last)
    success             JSON; there only if the run came to its end
    stopped             JSON; there if the last job was asked to stop, and left a checkpoint to go on from
    failure.json        rank, host, step and cause of the last job's failure (see failure.py)
    job.lock            who trains here now (see lock.py)
    ranks/              the stacks of ranks, asked for when one of them hangs (see guard.py)
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collectives.errors import PeerLost
from collectives.strategy import TrainingFailed
from hpc.checkpoint import check_own
from hpc.config import OPERATIONAL, Recipe, differences, read_toml
from hpc.failure import FAILURE, read_failure, write_failure
from hpc.files import read_object, sha256_of, temporary_of, write_json
from hpc.lock import LOCK, Lock
from hpc.manifest import AT_MOST, RunData, checked
from hpc.records import DATA, EXCHANGE, MODEL, RECIPE, STOPPED, SUBMITTED, SUCCESS
from hpc.shards import MANIFEST

PEER_S = 2.0  # that a rank leaves to others to say why a peer is gone
BEFORE = {LOCK, SUBMITTED, "logs"}  # what may be there before a run begins


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
        self.lock = Lock(self.path)
        self.last_failure: dict[str, Any] | None = None  # of the job before this one

    def open(self, recipe: Recipe, fields: dict[str, Any], operational: Sequence[str] = ()) -> bool:
        """Make the folder, or check that it belongs to this recipe and data; whether the run is finished already.

        operational  recipe keys that may differ, beside config.OPERATIONAL

        A run that has not come to a checkpoint yet has nothing to lose: its recipe is replaced.

        Raises RunError naming the keys that differ, if it holds another recipe's run; Locked if a job trains in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in self.path.iterdir() if not path.name.startswith(".")}  # those are ours
        if RECIPE not in there and there - BEFORE:
            raise RunError(f"'{self.path}' is not empty and not a run folder; choose another one (run=...)")
        self.lock.take()
        try:
            return self._opened(recipe, fields, operational)
        except BaseException:  # an interrupt, too, leaves nobody's lock behind
            self.lock.release()
            raise

    def _opened(self, recipe: Recipe, fields: dict[str, Any], operational: Sequence[str]) -> bool:
        for path in self.path.rglob("*"):
            if path.is_symlink():  # what is written through one may be anywhere
                raise RunError(f"'{path}' is a link, which Trireme does not make in a run folder; put the file there")
        finished, learned = (self.path / SUCCESS).exists(), any(self.checkpoints.glob("step-*"))
        data = {"fields": fields, "train": _digest(recipe.data.train), "validation": _digest(recipe.data.validation)}
        if finished or learned:
            held = read_toml(self.path / RECIPE)
            changed = differences(held, recipe.to_dict(), (*OPERATIONAL, *operational))
            held_data = read_data(self.path)
            other = [k for k in ("train", "validation") if held_data.get(k) != data[k]]
            changed += [f"data.{k}: another data set than before" for k in other]
            if changed:
                raise RunError(
                    f"run folder '{self.path}' holds a run of another recipe ({'; '.join(changed)}); "
                    f"choose another folder (run=...; init_from={self.path} starts from this model), or remove it"
                )
        if finished:
            self.lock.release()
            return True
        for stale in (*self.path.glob(f".{RECIPE}.tmp*"), *self.path.glob(f".{MODEL}.tmp*")):
            stale.unlink()
        temporary = temporary_of(self.path / RECIPE)
        temporary.write_text(recipe.to_toml(), encoding="utf-8")
        os.replace(temporary, self.path / RECIPE)  # first, so that the folder is known for what it is
        write_json(self.path / DATA, data)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.last_failure = read_failure(self.path)
        for name in (FAILURE, STOPPED):
            (self.path / name).unlink(missing_ok=True)
        return False

    def exchange(self) -> dict[str, Any] | None:
        """How ranks exchanged when the run began or was last resumed; None if that is not known."""
        try:
            return read_object(self.path / EXCHANGE, AT_MOST)
        except (OSError, ValueError):
            return None

    def keep_exchange(self, settled: dict[str, Any]) -> None:
        write_json(self.path / EXCHANGE, settled)

    def ship(self, checkpoint: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Put a checkpoint's model under its own name and mark the run as a success; the summary with its SHA-256.

        Raises OSError if the checkpoint was altered since it was written, Locked if another job trains here.
        """
        self.lock.check()
        check_own(self.checkpoints / checkpoint)
        temporary = temporary_of(self.path / MODEL)
        shutil.copyfile(self.checkpoints / checkpoint / MODEL, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path / MODEL)
        whole = summary | {"sha256": sha256_of(self.path / MODEL)}
        write_json(self.path / SUCCESS, whole)
        (self.path / FAILURE).unlink(missing_ok=True)
        return whole

    def stop(self, at: int) -> None:
        """Note that this job was asked to stop, with step `at` checkpointed. Raises Locked if another job is here."""
        self.lock.check()
        write_json(self.path / STOPPED, {"time": time.time(), "step": at})

    def fail(self, rank: int, host: str, step: int, where: str, error: BaseException) -> None:
        """Keep the cause of a failure, if it is this job's first."""
        if self.opened:
            frame = traceback.extract_tb(error.__traceback__)[-1:]
            if isinstance(error, PeerLost):
                time.sleep(PEER_S)  # its guard knows why
            write_failure(
                self.lock, "raised", rank, host, where, f"{type(error).__name__}: {error}", step=step,
                call=next((f"{f.filename}:{f.lineno}, {f.name}" for f in frame), ""),
                final=isinstance(error, ValueError | TrainingFailed) and not isinstance(error.__cause__, OSError),
                traceback="".join(traceback.format_exception(error)),
            )


def read_data(path: Path) -> dict[str, Any]:
    """What a run kept of its data. Raises RunError if the folder is no run folder."""
    try:
        return checked(read_object(path / DATA, AT_MOST), RunData)
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
