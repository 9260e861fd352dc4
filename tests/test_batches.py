"""Who reads what when: every frame once an epoch, the same for any number of ranks, in its own utterance's window."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from material import WIDTH, write_frames

from hpc.batches import Batches, make_order
from hpc.pieces import read_piece
from hpc.shards import Dataset
from models.frames import Frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("frames") / "train", utterances=50, shards=4)


def make(folder, splits, *, batch=24, split_frames=64, runs=3, seed=1, context=2):
    data = Dataset(folder)
    task = Frames(data.manifest["fields"], context=context, layers=1, width=4)
    order = make_order(data, task, splits, batch=batch, split_frames=split_frames, runs=runs, seed=seed)
    return Batches(order, seed, place=lambda x: x)


@settings(deadline=None, max_examples=25)
@given(
    splits=some.sampled_from([1, 2, 3, 4, 6]), per_split=some.integers(1, 9), split_frames=some.integers(1, 3000),
    runs=some.integers(1, 9), epoch=some.integers(0, 3),
)
def test_an_epoch_is_every_frame_exactly_once(folder, splits, per_split, split_frames, runs, epoch):
    batches = make(folder, splits, batch=splits * per_split, split_frames=split_frames, runs=runs)
    rows = [
        row for block in range(batches.order.blocks) for split in range(splits)
        for low, high in batches.order.runs_of(split, epoch, block) for row in range(low, high)
    ]
    assert sorted(rows) == list(range(batches.order.dataset.rows))


def test_every_step_takes_the_whole_batch_and_only_the_last_what_is_left(folder):
    batches = make(folder, 4)
    sizes = [
        sum(len(b.labels) for split in range(4) if (b := batches(split, t)) is not None)
        for t in range(batches.per_epoch)
    ]
    assert sizes[:-1] == [24] * (batches.per_epoch - 1) and sum(sizes) == batches.order.dataset.rows
    assert batches.progress(batches.per_epoch) == (1.0, batches.order.dataset.rows)
    batches.close()


def stream(batches, split, steps, held=None):
    """A split's batches, read step by step among those of all splits that are held (None: it alone)."""
    found = []
    for t in range(steps):
        taken = {each: batches(each, t) for each in (held or [split])}
        batch = taken[split]
        found.append(None if batch is None else (batch.inputs, batch.labels))
    return found


def same(one, other):
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a[0], b[0]))
        for a, b in zip(one, other, strict=True)
    )


def test_a_splits_batches_do_not_depend_on_who_holds_it_nor_on_where_reading_starts(folder):
    everything, alone = make(folder, 4), make(folder, 4)
    steps = 2 * everything.per_epoch + 3
    reference = stream(everything, 2, steps, held=range(4))
    assert same(reference, stream(alone, 2, steps))
    later = make(folder, 4)
    assert same(reference[steps - 5 :], [
        None if (b := later(2, t)) is None else (b.inputs, b.labels) for t in range(steps - 5, steps)
    ])
    for other in ({"seed": 2}, {"splits": 2}):
        different = make(folder, **({"splits": 4} | other))
        assert not same(reference[:3], stream(different, 1, 3))
        different.close()
    epoch = everything.per_epoch
    assert not same(reference[: epoch - 1], reference[epoch : 2 * epoch - 1]), "epochs come in another order"
    for batches in (everything, alone, later):
        batches.close()


@settings(deadline=None, max_examples=30)
@given(some.data())
def test_windows_repeat_the_edges_of_their_own_utterance(folder, data):
    dataset = Dataset(folder)
    context = data.draw(some.integers(0, 6))
    low = data.draw(some.integers(0, dataset.rows - 1))
    high = data.draw(some.integers(low + 1, dataset.rows))
    task = Frames(dataset.manifest["fields"], context=context, layers=1, width=4)
    piece = read_piece(dataset, [(low, high)], task.margin)
    batch = task.collate(piece, 0, len(piece))
    everything = np.empty((dataset.rows, WIDTH), np.float32)
    dataset.read("features", 0, dataset.rows, everything)
    labels = np.empty(dataset.rows, np.int32)
    dataset.read("labels", 0, dataset.rows, labels)
    for position, row in enumerate(range(low, high)):
        u = dataset.utterance_at(row)
        wanted = [min(max(row + o, dataset.starts[u]), dataset.starts[u + 1] - 1) for o in range(-context, context + 1)]
        assert torch.equal(batch.inputs[position], torch.from_numpy(everything[wanted]))
        assert int(batch.labels[position]) == labels[row]
        assert piece.key_of(position) == dataset.key(u)


def test_a_batch_that_the_splits_do_not_divide_is_an_error(folder):
    with pytest.raises(ValueError, match="no multiple of splits = 5"):
        make(folder, 5, batch=24)


def test_more_splits_than_the_last_step_has_frames_leaves_some_dry(folder):
    batches = make(folder, 12, batch=12, split_frames=5)
    last = batches.per_epoch - 1
    rest = batches.order.dataset.rows - last * 12
    held = [batches(split, last) for split in range(12)]
    assert sum(b is not None for b in held) == rest
    batches.close()


def test_seeding_depends_on_split_and_step_alone(folder):
    batches = make(folder, 4)
    draws = {}
    for split, t in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        batches.seed_all(split, t)
        draws.setdefault((split, t), []).append(float(torch.rand(1)))
    assert draws[0, 0][0] == draws[0, 0][1] and len({d[0] for d in draws.values()}) == 3
    batches.close()
