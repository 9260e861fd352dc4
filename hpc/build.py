"""The composition root: from a recipe to a task, a model, a strategy and a job. Only this file knows concrete names.

Tasks and strategies of other packages join through the entry points `trireme.tasks` and `trireme.strategies`.
"""

from __future__ import annotations

import logging
import math
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from collectives.allreduce import AllReduce
from collectives.averaging import MasterSlave
from collectives.bmuf import BMUF
from collectives.comm import Comm
from collectives.elastic import Elastic
from collectives.onebit import OneBitSGD
from hpc import guard, optim
from hpc.batches import Batches, make_order
from hpc.checkpoint import Checkpoint, CheckpointError, Saver, load_model, newest
from hpc.config import Recipe, RecipeError, options, read_toml, resolve
from hpc.evaluate import batches_of, count_of, evaluate, pieces_of
from hpc.everywhere import made_everywhere
from hpc.files import read_object, sha256_of
from hpc.flat import Flat
from hpc.job import Carries, Job
from hpc.manifest import AT_MOST
from hpc.meter import Journal, Meter, RunJournal, Silence
from hpc.minibatch import Selection
from hpc.pulse import Pulse, stacks_name
from hpc.records import MODEL, RECIPE, SUCCESS
from hpc.run import RunError, RunFolder, compare_fields, read_data
from hpc.runtime import Device, StopFlag
from hpc.schedule import POLICIES, Replay, Schedule
from hpc.shards import REMEDY, DataError, Dataset, read_manifest
from hpc.spans import Spans
from hpc.staging import stage
from models.frames import Frames
from models.lm import LanguageModel
from models.sentences import Sentences
from models.task import Task

UPDATES = 4  # that a minibatch size is tried on, at least
TASKS: dict[str, type] = {"frames": Frames, "sentences": Sentences, "lm": LanguageModel}
STRATEGIES: dict[str, type] = {
    "allreduce": AllReduce, "onebit": OneBitSGD, "bmuf": BMUF, "elastic": Elastic, "master_slave": MasterSlave,
}
RULES: dict[str, type] = {
    "sgd": optim.SGD, "momentum": optim.Momentum, "nesterov": optim.Nesterov, "adagrad": optim.AdaGrad,
    "adam": optim.Adam, "adamax": optim.Adamax,
}


@cache
def registry() -> dict[str, dict[str, type]]:
    """Every name that a recipe may use, table by table, those of installed packages included."""
    outside = {group: {e.name: e for e in entry_points(group=f"trireme.{group}")} for group in ("tasks", "strategies")}
    return {
        "task": Registered(outside["tasks"] | TASKS),
        "strategy": Registered(outside["strategies"] | STRATEGIES),
        "optim": RULES,
        "schedule": POLICIES,
    }


class Registered(dict[str, Any]):
    """Names to classes; those of other packages are imported when they are asked for, so a broken one harms no one."""

    def __getitem__(self, name: str) -> type:
        value = super().__getitem__(name)
        return value.load() if isinstance(value, EntryPoint) else value


def make_task(recipe: Recipe, fields: dict[str, Any]) -> Task:
    """The recipe's task for data of these field descriptions. Raises ValueError for options that do not go together."""
    kind = registry()["task"][recipe.task.name]
    missing = [name for name in (*getattr(kind, "fields", ()), *getattr(kind, "targets", ())) if name not in fields]
    if missing:
        raise ValueError(
            f"task '{recipe.task.name}' needs field {missing}, the training data ({recipe.data.train}) has "
            f"{sorted(fields)}; it was prepared for another task: prepare data for this one (trireme prepare --help)"
        )
    task: Task = kind(fields, **options(recipe.task))
    apart = [name for name, about in fields.items() if about.get("rows") == "sequence"]
    if apart and task.unit == "stream":
        raise ValueError(
            f"task '{recipe.task.name}' reads running text, the training data ({recipe.data.train}) holds "
            f"sequences with {apart} of their own; make text with 'trireme prepare text'"
        )
    if task.targets and task.unit != "sequence":
        raise ValueError(f"task '{recipe.task.name}' has targets, {task.targets}, so its unit must be \"sequence\"")
    return task


def make_model(task: Task, device: Device, seed: int | None = None) -> torch.nn.Module:
    """The task's model on the device, initialised from a seed; None: its weights whatever they are."""
    model = task.model()
    if seed is not None:
        task.initialise(model, torch.Generator().manual_seed(seed))
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False):
            raise ValueError(
                f"module '{name}' ({type(module).__name__}) keeps running statistics, which no strategy joins over "
                "splits yet; set track_running_stats=False"
            )
    return model.to(device.torch)


def make_policy(recipe: Recipe) -> Any:
    """The recipe's learning-rate policy, starting at the optimizer's learning rate."""
    chosen = POLICIES[recipe.schedule.name]
    if chosen is Replay:
        from hpc.records import read_records

        rates = [r["learning_rate"] for r in read_records(Path(recipe.schedule.of)) if r["event"] == "validate"]
        if not rates:
            raise RecipeError(f"schedule.of = '{recipe.schedule.of}' has no validations, so no rates to replay")
        return Replay(recipe.optim.learning_rate, rates, **options(recipe.schedule))
    return chosen(recipe.optim.learning_rate, **options(recipe.schedule))


def open_data(recipe: Recipe, comm: Comm, task: Task, pulse: Pulse) -> list[Dataset]:
    """The training set and, if the recipe has one, the validation set: staged, opened and verified (collective)."""
    opened: list[Dataset] = []
    for folder in map(Path, filter(None, (recipe.data.train, recipe.data.validation))):
        place = stage(folder, recipe.data.stage, comm, pulse) if recipe.data.stage else folder
        remedy = f"it is a staged copy: remove the folder '{place}' and start again" if recipe.data.stage else REMEDY
        comm.each(partial(_open, opened, place, task, remedy))
    if recipe.data.verify:
        for dataset in opened:
            comm.each(partial(_verify, dataset, comm, pulse))
    return opened


def _open(opened: list[Dataset], place: Path, task: Task, remedy: str) -> None:
    opened.append(Dataset(place, task.fields, task.targets, remedy))


def _verify(dataset: Dataset, comm: Comm, pulse: Pulse) -> None:
    with pulse.working():
        for shard in comm.mine(len(dataset.manifest["shards"])):
            pulse.beat(f"checking shard {shard} of '{dataset.folder}'")
            dataset.verify(shard)


def make_job(
    recipe: Recipe, comm: Comm, device: Device, run: RunFolder, pulse: Pulse, stop: StopFlag
) -> tuple[Job, int, Carries] | None:
    """Everything that training needs, the step to go on from, and what the splits' next batches start from there; None
    if the run is finished already (collective).

    Raises ValueError or OSError, saying what to do, for anything that cannot be trained with.
    """
    asked = getattr(recipe.strategy, "algorithm", "")
    comm = comm.with_splits(recipe.splits).on(device.torch, nccl=asked == "nccl")
    fields = comm.on_root(lambda: _checked_fields(recipe))
    task = made_everywhere(comm, lambda: make_task(recipe, fields))
    kind: Any = registry()["strategy"][recipe.strategy.name]
    operational = [f"strategy.{option}" for option in kind.operational]
    if comm.on_root(lambda: run.open(recipe, fields, operational)):
        return None
    run.opened = True
    run.lock.token = comm.on_root(lambda: run.lock.token)  # all of them are this job
    pulse.keep(run.lock.token, run.path / guard.FOLDER / stacks_name(comm.rank), comm.rank)
    comm.barrier()
    pulse.guarded(guard.start(comm, run.path, run.lock.token, pulse.patience, recipe.log.silence))
    with pulse.resting():  # who has copied and checked its part waits for the others
        train_set, *rest = open_data(recipe, comm, task, pulse)
    fresh = comm.on_root(lambda: not any(run.checkpoints.glob("step-*")) and not recipe.init_from)
    made: list[torch.nn.Module] = []
    with pulse.resting():  # there may be word vectors to read
        comm.each(lambda: made.append(make_model(task, device, recipe.seed if fresh else None)))
    (model,) = made
    rule = registry()["optim"][recipe.optim.name](**options(recipe.optim))
    data = recipe.data
    parts = kind.parts_of_a_batch(**options(recipe.strategy))
    order = made_everywhere(comm, lambda: make_order(
        train_set, task, comm.n_splits, batch=part_of(data.batch, parts, comm.n_splits),
        split_frames=data.split_frames, runs=data.runs, seed=recipe.seed, draw=data.draw,
    ))
    shared = kind.shares_weights and device.torch.type == "cpu"
    flat = Flat(model, comm.memory.common if shared else partial(comm.memory.zeros, device=device.torch))
    comm.barrier()  # who goes on from here may change weights that others were still filling in
    strategy = kind(comm, flat, rule, order.counted * parts, **options(recipe.strategy))
    pulse.about = lambda: strategy.waiting_for() or (comm.waiting and f"waiting for {comm.waiting}")
    apart = comm.apart()

    def validate(alone: bool = False) -> dict[str, float]:
        """The validation metrics of the model as it is: by all ranks together, or by this one alone."""
        return evaluate(
            task, model, rest[0], apart if alone else comm, device.place, device.autocast,
            lambda: pulse.beat("validating"),
        )

    strategy.evaluate = validate if rest else None
    settled = strategy.prepare(comm.on_root(run.exchange))
    comm.on_root(lambda: run.keep_exchange(settled))
    comm.sent.clear()  # what was sent to measure is no part of the run
    said = settled.get("said", "as the strategy does it")
    logging.getLogger("trireme").info("exchange: %s; over %s", said, comm.transport)
    batches = Batches(order, recipe.seed, device.place)
    schedule = Schedule(make_policy(recipe), batches.per_epoch, _steps(recipe.validate_.every, order.counted))
    if doubt := strategy.doubt(schedule.steps):
        logging.getLogger("trireme").warning(doubt)
    journal: Journal = Silence()
    if comm.is_root():
        journal = RunJournal(run.path, schedule.steps, recipe.log.tensorboard)
    spans = Spans(run.path, recipe.log.trace)
    meter = Meter(
        comm, journal, pulse, recipe.log.every, batches.progress, task.noun, spans,
        active=lambda: strategy.active_s, sent=lambda: strategy.sent(),
    )
    saver = Saver(
        run.checkpoints, comm, flat, recipe.checkpoint.keep, lambda written: journal.write("checkpoint", **written),
        run.lock.check,
    )
    strategy.note, strategy.phase, batches.loaded = meter.note, meter, spans.loaded
    job = Job(
        comm, device, task, model, batches, strategy, schedule, _selection(recipe, order.counted, parts, schedule),
        saver, meter, stop, validate if rest else None, recipe.validate_.metric,
        _steps(recipe.checkpoint.every, order.counted), count_of(task, rest[0]) if rest else 0,
    )
    if rest:
        comm.on_root(lambda: _check_metric(job, rest[0], "validate.metric", job.metric))
    if job.selection.every:
        comm.on_root(lambda: _check_metric(job, train_set, "minibatch.metric", job.selection.metric))
    at, carries = _resume(job, recipe, run, flat)
    spans.open(comm, at)
    return job, at, carries


def _check_metric(job: Job, dataset: Dataset, key: str, metric: str) -> None:
    """Raise RecipeError now, not after an epoch, if the task has no metric of the name that is to be judged."""
    pieces = pieces_of(job.task, dataset)
    if not pieces:
        raise DataError(f"data set '{dataset.folder}' has nothing to evaluate; give another")
    batch = next(batches_of(job.task, dataset, pieces[0], job.device.place))
    with torch.no_grad(), job.device.autocast():
        sums, _ = job.task.metrics(job.model, batch, None)
    known = {name: total / count for name, (total, count) in sums.items()}
    known |= job.task.derived(known)
    if metric not in known:
        raise RecipeError(f"recipe key '{key}' = '{metric}': the task has {', '.join(sorted(known))}")


def _checked_fields(recipe: Recipe) -> dict[str, Any]:
    """The training set's field descriptions, after comparing the validation set's with them (rank 0)."""
    fields = read_manifest(Path(recipe.data.train))["fields"]
    if recipe.data.validation:
        compare_fields(fields, read_manifest(Path(recipe.data.validation))["fields"], recipe.data.validation)
    elif getattr(recipe.strategy, "rejection", False):
        raise RecipeError(
            "strategy.rejection judges slaves by their loss on data.validation, which is empty; give a validation set, "
            "or set strategy.rejection = false"
        )
    elif recipe.schedule.name in ("halving", "newbob") or recipe.schedule.patience:
        raise RecipeError(
            f"schedule '{recipe.schedule.name}' judges validation results, and data.validation is empty; "
            "give a validation set, or use schedule.name = 'constant' with patience = 0"
        )
    return fields


def part_of(batch: int, parts: int, splits: int) -> int:
    """The batch of the loop, where a strategy learns the recipe's in so many parts. Raises RecipeError."""
    if parts > 1 and batch % (parts * splits):
        raise RecipeError(
            f"recipe key 'data.batch' = {batch}: with this [strategy] it is learned in {parts} parts; expected a "
            f"multiple of {parts} * splits = {parts * splits}"
        )
    return batch // parts


def _selection(recipe: Recipe, counted: float, parts: int, schedule: Schedule) -> Selection:
    """Of minibatch sizes; stretches are whole batches. Raises RecipeError where one is too short to tell, or never due.
    """
    asked = recipe.minibatch
    stretch, largest = _steps(asked.stretch, counted * parts), max(asked.sizes)
    if asked.every and stretch < UPDATES * largest:
        raise RecipeError(
            f"recipe key 'minibatch.stretch' = {asked.stretch}: {largest} times data.batch would be tried on "
            f"{stretch // largest} updates; expected {math.ceil(UPDATES * largest * counted * parts)} or more, or "
            "smaller minibatch.sizes"
        )
    selection = Selection(
        every=parts * _steps(asked.every, counted * parts), stretch=parts * stretch,
        sizes=asked.sizes, metric=asked.metric, tolerance=asked.tolerance, batch=recipe.data.batch,
    )
    if asked.every and not any(selection.due(at, schedule) for at in schedule.judgements()):
        raise RecipeError(
            f"recipe key 'minibatch.every' = {asked.every}: no validation is late enough for it and has "
            f"minibatch.stretch = {asked.stretch} behind it, of {math.ceil(schedule.steps * counted)} that this run "
            "trains on; expected less of either, more validations (validate.every), or minibatch.every = 0 (no trials)"
        )
    return selection


def _steps(frames: int, counted: float) -> int:
    return max(1, int(frames / counted)) if frames else 0


def _resume(job: Job, recipe: Recipe, run: RunFolder, flat: Flat) -> tuple[int, Carries]:
    """Go on from the newest whole checkpoint, or begin; the step to go on from, and with what (collective)."""
    log = logging.getLogger("trireme")
    found, complaints, best, lost = job.comm.on_root(lambda: _newest(run))
    for complaint in complaints:
        log.warning("%s; going on from another one", complaint)
    if found:
        checkpoint = Checkpoint(run.checkpoints / found, flat)
        if "minibatch" not in checkpoint.state:
            raise CheckpointError(f"checkpoint '{found}' is of an earlier development version; start a new run")
        job.strategy.restore(checkpoint)
        job.schedule.restore(checkpoint.state["schedule"])
        job.selection.restore(checkpoint.state["minibatch"], job.strategy)
        job.saver.best = best
        if lost and (job.schedule.stopped or checkpoint.state["at"] >= job.schedule.steps):
            raise CheckpointError(f"{complaints[-1]}: training is over, and its model is lost; start anew (run=...)")
        if lost:
            job.schedule.forget_best()
            log.warning("the best model so far is lost with its checkpoint: the next validation's counts as the best")
        log.info("resuming from checkpoint %s", found)
        job.meter.at = checkpoint.state["at"]
        return checkpoint.state["at"], {split: checkpoint.carry(split, job.device.place) for split in job.comm.splits}
    if run.last_failure:
        log.info("there is no checkpoint yet to go on from (checkpoint.every makes some amid epochs): beginning anew")
    if recipe.init_from:
        with job.meter.pulse.resting():  # large matrices may be restructured
            load_model(Path(recipe.init_from, MODEL), flat, flat.weights, partial(job.task.adapted, job.model))
        log.info("starting from the model of %s", recipe.init_from)
        job.comm.barrier()  # who goes on may change weights that others were still filling in
    job.strategy.begin()
    return 0, dict.fromkeys(job.comm.splits)


def _newest(run: RunFolder) -> tuple[str, list[str], str | None, bool]:
    path, complaints, best, lost = newest(run.checkpoints)
    if path is None and complaints:
        raise CheckpointError(
            f"no checkpoint of '{run.path}' can be used: {'; '.join(complaints)}; remove the folder to start over"
        )
    return path.name if path else "", complaints, best, lost


def finished_model(run: Path) -> Path:
    """The model file of a finished run. Raises RunError if the run did not finish, or the model was altered since."""
    if not (run / SUCCESS).exists():
        if not (run / RECIPE).exists():
            what = f"no {RECIPE} in it" if run.is_dir() else "there is no such folder"
            raise RunError(f"'{run}' is not a run folder: {what}")
        raise RunError(f"'{run}' did not finish (no '{SUCCESS}' in it); start its training command again to finish it")
    try:
        digest = read_object(run / SUCCESS, AT_MOST).get("sha256")
    except ValueError as error:
        raise RunError(f"'{run / SUCCESS}' cannot be read ({error})") from error
    if sha256_of(run / MODEL) != digest:
        raise RunError(f"'{run / MODEL}' was altered since the run ended (SHA-256 differs); copy it from a checkpoint")
    return run / MODEL


def load_run(path: Path, device_name: str, comm: Comm) -> tuple[Recipe, Task, torch.nn.Module, Device]:
    """A finished run's recipe, task and trained model, for evaluation and prediction (collective)."""
    model_file = Path(comm.on_root(lambda: str(finished_model(path))))
    recipe = resolve(read_toml(path / RECIPE), registry())
    device = Device(device_name, recipe.precision, comm.local_rank, recipe.threads)
    task = make_task(recipe, read_data(path)["fields"])
    model = make_model(task, device)
    flat = Flat(model, lambda count: torch.zeros(count, device=device.torch))
    load_model(model_file, flat, flat.weights)
    return recipe, task, model.eval(), device
