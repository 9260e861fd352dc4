"""Checkpoints: atomic, checksummed, resumable exactly by any number of ranks. Formats hold no code.

A checkpoint is a folder `checkpoints/step-000001234/`:

    model.safetensors   the weights by parameter name, and the model's buffers (rank 0)
    rank-00000.safetensors ...  each rank's slices of optimizer state and the state of its splits
    state.json          step, schedule, counters
    manifest.json       SHA-256 and size of all of these; written last

It is written to `checkpoints/.step-000001234.tmp` by a thread of each rank, from a snapshot, while training goes on;
when every rank's part is there, rank 0 writes the manifest and renames the folder. The ranks' threads meet through
small files beside their parts, so the run folder must be on storage that all ranks see. Design, section 5.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from collectives.comm import Comm
from collectives.strategy import State
from hpc.files import read_object, sha256_of, write_json, write_sealed
from hpc.flat import Flat
from hpc.manifest import AT_MOST, CheckpointManifest, read_checked
from models.task import Carry, Tensors

MODEL, STATE, MANIFEST = "model.safetensors", "state.json", "manifest.json"
NAME = r"step-\d{9,}"
PART_PATIENCE_S = 600.0  # how long rank 0 waits for the other ranks' parts of one checkpoint


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which and why."""


def step_name(at: int) -> str:
    return f"step-{at:09d}"


class Checkpoint:
    """A saved state opened for reading; serves as the strategy's `Joined`. Let one rank `check` it first.

    folder  the checkpoint's folder
    flat    where the parameters lie

    Raises CheckpointError if it has no manifest.
    """

    def __init__(self, folder: Path, flat: Flat):
        self.folder, self.flat = folder, flat
        self.manifest = read_manifest(folder)
        try:
            self.state: dict[str, Any] = read_object(folder / STATE, AT_MOST)
            self.common: dict[str, Any] = self.state["common"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint '{folder}' has no readable {STATE} ({error})") from error

    def weights_into(self, weights: torch.Tensor) -> None:
        load_model(self.folder / MODEL, self.flat, weights)

    def slice(self, name: str, low: int, high: int) -> torch.Tensor:
        """Floats [low, high) of a joined [P] state tensor, from the parts that hold them, whoever saved them."""
        found = torch.empty(high - low)
        at = low
        while at < high:
            file, start, last = self._holder(name, at)
            last = min(high, last)
            with self._reading(file) as opened:
                found[at - low : last - low] = opened.get_slice(f"slice.{name}")[start : start + last - at]
            at = last
        return found

    def _holder(self, name: str, at: int) -> tuple[str, int, int]:
        """Whose part holds float `at` of a joined tensor: its file, where in its tensor, and up to which float."""
        for part in self.manifest["parts"]:
            start = 0
            for low, high in part["pieces"]:
                if low <= at < high:
                    return part["file"], start + at - low, high
                start += high - low
        raise CheckpointError(f"checkpoint '{self.folder}' does not hold float {at} of '{name}'")

    def split(self, split: int) -> dict[str, torch.Tensor]:
        """What was kept for a split: name -> tensor."""
        return self._of_split("split", split)

    def carry(self, split: int, place: Callable[[torch.Tensor], torch.Tensor]) -> Carry:
        """What a split's next batch starts from, moved to where it is trained on."""
        held = self._of_split("carry", split)
        return tuple(place(held[str(i)]) for i in range(len(held))) or None

    @contextmanager
    def _reading(self, name: str) -> Iterator[Any]:
        """One of its files. Raises CheckpointError for what it does not hold, or not as it should."""
        try:
            with safe_open(self.folder / name, "pt") as file:
                yield file
        except (OSError, SafetensorError, KeyError, IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"checkpoint '{self.folder}': {name} cannot be read ({error})") from error

    def _of_split(self, kind: str, split: int) -> dict[str, torch.Tensor]:
        part = next((p for p in self.manifest["parts"] if split in p["splits"]), None)
        if part is None:
            raise CheckpointError(f"checkpoint '{self.folder}' does not hold split {split}")
        prefix = f"{kind}.{split}."
        with self._reading(part["file"]) as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a dict)
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises CheckpointError."""
    try:
        return read_checked(folder / MANIFEST, CheckpointManifest)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint '{folder}' has no readable {MANIFEST} ({error})") from error


def check(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest. Raises CheckpointError if one is missing or altered."""
    for name, expected in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint '{folder}' lacks {name}")
        try:
            same = path.stat().st_size == expected["bytes"] and sha256_of(path) == expected["sha256"]
        except OSError as error:
            raise CheckpointError(f"checkpoint '{folder}': {name} cannot be read ({error})") from error
        if not same:
            raise CheckpointError(f"checkpoint '{folder}': {name} was altered or cut short (SHA-256 differs)")


def check_own(folder: Path) -> None:
    """As `check`, of one that this job needs. Raises OSError: another job would go on from another one."""
    try:
        check(folder)
    except CheckpointError as error:
        raise OSError(f"{error}; started again, the run goes on from another one") from error


def load_model(
    path: Path, flat: Flat, weights: torch.Tensor, adapted: Callable[[Tensors], Tensors] | None = None
) -> None:
    """Read parameters by name into the flat buffer [P], and the model's frozen ones and buffers, in place.

    adapted  turns what the file holds into what the model does; without it they must be the same

    Raises CheckpointError if names or shapes differ.
    """
    targets = dict(zip(flat.names, flat.views(weights), strict=True)) | flat.fixed
    try:
        with safe_open(path, "pt") as file:
            names, get = set(file.keys()), file.get_tensor
            if adapted:
                tensors = adapted({name: get(name) for name in names})
                names, get = set(tensors), tensors.__getitem__
            if names != set(targets):
                raise CheckpointError(
                    f"model '{path}' has other parameters than the recipe's model: {sorted(names ^ set(targets))[:6]}"
                )
            for name, target in targets.items():
                values = get(name)
                if values.shape != target.shape:
                    raise CheckpointError(
                        f"model '{path}': '{name}' has shape {list(values.shape)}, the recipe's model "
                        f"{list(target.shape)}; use the recipe (layers, width, context) it was trained with"
                    )
                with torch.no_grad():
                    target.copy_(values)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model '{path}' cannot be read ({error})") from error


def model_tensors(flat: Flat) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers by name, copied to host memory."""
    named = dict(zip(flat.names, flat.views(flat.weights), strict=True)) | flat.fixed
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()}


class Saver:
    """Writes a run's checkpoints in the background and keeps the last ones and the best.

    folder  the run's `checkpoints` folder, seen by all ranks
    keep    how many of the last checkpoints to keep, beside the best
    report  told of every checkpoint that rank 0 has finished: step, name, seconds, bytes
    allowed raises an error if this job may write here no longer; asked on rank 0 before anything is removed or renamed
    """

    def __init__(
        self, folder: Path, comm: Comm, flat: Flat, keep: int,
        report: Callable[[dict[str, Any]], None] = lambda _: None, allowed: Callable[[], None] = lambda: None,
    ):
        self.folder, self.comm, self.flat, self.keep = folder, comm, flat, keep
        self.best: str | None = None
        self.report, self.allowed = report, allowed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[dict[str, Any] | None] | None = None

    def save(
        self, at: int, state: State, carries: Mapping[int, Carry], record: Mapping[str, Any], best: bool
    ) -> None:
        """Snapshot now, write in the background (all ranks, at the same step).

        at       the step
        state    this rank's part of the strategy's state
        carries  split -> what its next batch starts from, for the splits this rank holds
        record   JSON values for state.json, the same on every rank
        best     whether this is the best model so far

        Raises OSError if the previous write failed (a full disk, say); the checkpoints before it are untouched.
        """
        self.wait()
        name = step_name(at)
        if best:
            self.best = name
        tensors = {f"slice.{k}": v.detach().to("cpu", copy=True) for k, v in state.slices.items()}
        for split, held in state.splits.items():
            tensors |= {f"split.{split}.{k}": v.detach().to("cpu", copy=True) for k, v in held.items()}
        for split, carry in carries.items():
            tensors |= {f"carry.{split}.{i}": v.to("cpu", copy=True).contiguous() for i, v in enumerate(carry or ())}
        part = {
            "file": f"rank-{self.comm.rank:05d}.safetensors", "pieces": state.pieces, "splits": list(self.comm.splits),
        }
        record = {**record, "at": at, "common": state.common, "best": self.best}
        self.comm.on_root(lambda: self._clear(name))
        finish = (lambda: self._finish(name, model, record)) if (model := self._model_on_root()) else None
        self._writing = self._thread.submit(self._write, at, tensors, part, finish)

    def _model_on_root(self) -> dict[str, torch.Tensor]:
        return model_tensors(self.flat) if self.comm.is_root() else {}

    def wait(self) -> None:
        """Until the last checkpoint is written by this rank. Raises OSError if it could not be."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            written = writing.result()
            if written is not None:
                self.report(written)

    def poll(self) -> None:
        """Raise OSError at once if the checkpoint being written has failed."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _clear(self, name: str) -> None:
        self.allowed()
        for stale in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        (self.folder / f".{name}.tmp").mkdir(parents=True)

    def _write(
        self, at: int, tensors: dict[str, torch.Tensor], part: dict[str, Any], finish: Callable[[], None] | None
    ) -> dict[str, Any] | None:
        """Write this rank's part (on the writing thread); on rank 0 also `finish`, and what to report of it."""
        name = step_name(at)
        temporary = self.folder / f".{name}.tmp"
        began = time.monotonic()
        try:
            save_file(tensors, temporary / part["file"])
            write_json(temporary / f"part-{self.comm.rank:05d}.json", part | _seal(temporary / part["file"]))
            if finish is None:
                return None
            finish()
            size = sum(p.stat().st_size for p in (self.folder / name).iterdir())
            return {"step": at, "name": name, "seconds": time.monotonic() - began, "bytes": size}
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"checkpoint '{self.folder / name}' could not be written ({error}); the one before it is kept. "
                "Free some space and start the same command again to resume from it"
            ) from error

    def _finish(self, name: str, model: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        """Rank 0: its own files, then wait for the others' parts, the manifest, the rename, and what is kept."""
        temporary, final = self.folder / f".{name}.tmp", self.folder / name
        save_file(model, temporary / MODEL)
        write_json(temporary / STATE, record)
        files = {MODEL: _seal(temporary / MODEL), STATE: _seal(temporary / STATE)}
        parts = []
        for rank in range(self.comm.size):
            path = temporary / f"part-{rank:05d}.json"
            deadline = time.monotonic() + PART_PATIENCE_S
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise OSError(f"rank {rank} wrote no part in {PART_PATIENCE_S:.0f} s; is the run folder shared?")
                time.sleep(0.02)
            part = json.loads(path.read_text())
            files[part["file"]] = {k: part.pop(k) for k in ("bytes", "sha256")}
            parts.append(part)
            path.unlink()
        write_sealed(temporary / MANIFEST, {"files": files, "parts": parts})
        _sync_folder(temporary)
        self.allowed()
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _sync_folder(self.folder)
        earlier = sorted(p.name for p in self.folder.glob("step-*") if p.name <= name)  # later ones are torn or undone
        last = earlier[-self.keep :]
        keep = set(last)
        for one in last:  # should the newest be damaged, an older one goes on, with the best model that it knew
            with suppress(CheckpointError):
                keep.add(str(best_of(self.folder / one)))
        for old in self.folder.glob("step-*"):
            if old.name not in keep:
                shutil.rmtree(old)


class Newest(NamedTuple):
    """What a run goes on from.

    path        a whole checkpoint; None: there is none
    complaints  what is wrong with newer ones
    best        the checkpoint of its best model so far; None: none yet, or `lost`
    lost        whether there was such a one, and it is not whole
    """

    path: Path | None
    complaints: list[str]
    best: str | None = None
    lost: bool = False


def newest(folder: Path) -> Newest:
    """The newest whole checkpoint of a run's `checkpoints` folder whose best one is whole, too; else the newest whole.

    The best model is what ships, and what a schedule may go back to.
    """
    complaints: list[str] = []
    without: Newest | None = None
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            check(path)
            best = best_of(path)
        except CheckpointError as error:
            complaints.append(str(error))
            continue
        try:
            if best not in (None, path.name):
                check(folder / best)
            return Newest(path, complaints, best)
        except CheckpointError as error:
            complaints.append(f"{error}, the best model so far of checkpoint '{path.name}'")
            without = without or Newest(path, complaints, None, True)
    return without or Newest(None, complaints)


def best_of(folder: Path) -> str | None:
    """The name of the checkpoint that held the best model when this one was written. Raises CheckpointError."""
    try:
        best = read_object(folder / STATE, AT_MOST).get("best")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint '{folder}' has no readable {STATE} ({error})") from error
    if best is not None and not (isinstance(best, str) and re.fullmatch(NAME, best)):
        raise CheckpointError(f"checkpoint '{folder}': '{best}' is no checkpoint's name")
    return best


def _seal(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
