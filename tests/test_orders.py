"""Sequences and running text: who gets what when, whole, once an epoch, the same for any number of ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from material import write_frames

from hpc.batches import Batches, make_order
from hpc.evaluate import STRETCH, batches_of, pieces_of
from hpc.pieces import read_sequences
from hpc.shards import DataError, Dataset, ShardWriter, shard_name, write_manifest
from models.frames import Frames


class Words:
    """A task that only looks at what it is given."""

    fields, targets, unit, judged, per_row, margin, noun = ("words",), (), "stream", None, False, 0, "words"

    def __init__(self, steps):
        self.steps = steps

    def check(self, piece):
        assert piece.fields["words"].dtype == torch.int32

    def collate(self, piece, low, high):
        items = piece.items[low:high].view(-1, piece.lanes)
        words = piece.fields["words"]
        return words[items], words[items + 1], lambda position: piece.key_of(low + position)


def write_words(folder, lengths, shards=2):
    """A text of consecutive numbers, in stretches of these lengths."""
    folder.mkdir(parents=True)
    entries, at = [], 0
    for shard, numbers in enumerate(np.array_split(np.arange(len(lengths)), shards)):
        with ShardWriter(folder / shard_name("labels", shard, shards), {"words": ((), np.int32)}) as writer:
            for number in numbers:
                writer.append(f"stretch-{number}", {"words": np.arange(at, at + lengths[number])})
                at += lengths[number]
        entries.append({"files": [writer.summary]})
    fields = {"words": {"dtype": "int32", "classes": at, "names": [str(i) for i in range(at)]}}
    write_manifest(folder, {"kind": "text", "fields": fields, "shards": entries})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Dataset(write_words(tmp_path_factory.mktemp("words") / "train", [40, 1, 300, 77, 5, 210]), ("words",))


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    return write_frames(tmp_path_factory.mktemp("frames") / "train", utterances=50, shards=4)


@settings(deadline=None, max_examples=12)
@given(
    lanes=some.sampled_from([4, 12]), splits=some.sampled_from([1, 2, 4]), steps=some.integers(1, 40),
    split_frames=some.integers(1, 400),
)
def test_lanes_hold_the_text_in_order_whatever_the_splits(text, lanes, splits, steps, split_frames):
    order = make_order(
        text, Words(steps), splits, batch=lanes * steps, split_frames=split_frames, runs=3, seed=1
    )
    batches = Batches(order, 1, lambda x: x)
    found = [[] for _ in range(lanes)]
    for t in range(2 * batches.per_epoch):
        if batches.begins(t):
            assert all(not lane or len(lane) == order.length for lane in found)
            found = [[] for _ in range(lanes)]
        for split in range(splits):
            inputs, targets, key_of = batches(split, t)
            assert torch.equal(targets, inputs + 1) and inputs.shape[1] == lanes // splits
            assert len(inputs) == steps or (t + 1) % batches.per_epoch == 0
            last = inputs.numel() - 1
            assert key_of(last) == text.key(text.utterance_at(int(inputs.flatten()[last])))
            for lane in range(lanes // splits):
                found[split * (lanes // splits) + lane] += inputs[:, lane].tolist()
    batches.close()
    assert [word for lane in found for word in lane] == list(range(lanes * order.length))
    assert text.rows - 1 - lanes * order.length < lanes
    assert batches.progress(batches.per_epoch) == (1.0, lanes * order.length)


def test_lanes_that_do_not_fit_are_errors(text):
    with pytest.raises(ValueError, match="use a multiple of 28"):
        make_order(text, Words(7), 4, batch=42, split_frames=100, runs=1, seed=1)
    with pytest.raises(DataError, match="633 words, too few for 700 lanes"):
        make_order(text, Words(1), 1, batch=700, split_frames=100, runs=1, seed=1)


@pytest.mark.parametrize("lengths", [[3, 2], [STRETCH, 1], [STRETCH], [40_000], [STRETCH * 3, 7, 4]])
def test_every_word_but_the_first_is_evaluated_once(tmp_path, lengths):
    data = Dataset(write_words(tmp_path / "words", lengths, shards=1), ("words",))
    found = []
    for runs in pieces_of(Words(35), data):
        assert len({high - low for low, high in runs}) == 1
        for _, targets, _ in batches_of(Words(35), data, runs, lambda x: x):
            found += targets.flatten().tolist()
    assert sorted(found) == list(range(1, sum(lengths)))


def test_lanes_that_are_drawn_begin_anywhere_and_anew_every_epoch(text):
    order = make_order(text, Words(5), 2, batch=4 * 5, split_frames=60, runs=1, seed=1, draw=0.3)
    assert order.length == int(0.3 * (text.rows - 1)) // 2 and order.total == 4 * order.length
    batches = Batches(order, 1, lambda x: x)
    begins = set()
    for epoch in range(3):
        for split in range(2):
            steps = [batches(split, t) for t in range(epoch * order.per_epoch, (epoch + 1) * order.per_epoch)]
            words = torch.cat([inputs for inputs, _, _ in steps])
            assert torch.equal(words - words[0], torch.arange(order.length)[:, None].expand(-1, 2)), "in a stretch"
            assert all(torch.equal(targets, inputs + 1) for inputs, targets, _ in steps)
            begins |= set(words[0].tolist())
    batches.close()
    assert len(begins) > 6 and max(begins) + order.length < text.rows


@settings(deadline=None, max_examples=12)
@given(
    splits=some.sampled_from([1, 3]), draw=some.sampled_from([0.1, 0.5, 1.0]),
    network=some.sampled_from(["dnn", "sru"]), split_frames=some.sampled_from([1, 120, 10_000]),
)
def test_every_split_draws_its_part_without_looking_at_others(frames, splits, draw, network, split_frames):
    data = Dataset(frames)
    task = Frames(data.manifest["fields"], network=network, context=0, layers=1, width=4)

    def drawn(n_splits, split, epoch):
        order = make_order(
            data, task, n_splits, batch=4 * n_splits, split_frames=split_frames, runs=12, seed=1, draw=draw
        )
        items = data.rows if network == "dnn" else data.utterances
        assert order.total == n_splits * round(draw * items)
        assert order.per_epoch == -(-order.total // order.batch)
        runs = [order.runs_of(split, epoch, block) for block in range(order.blocks)]
        rows = [row for block in runs for low, high in block for row in range(low, high)]
        assert len(set(rows)) == len(rows), "none twice"
        assert sum(len(order.load(split, epoch, block)) for block in range(order.blocks)) == order.total // n_splits
        return rows

    found = {(split, epoch): drawn(splits, split, epoch) for split in range(splits) for epoch in range(2)}
    if split_frames == 10_000:  # pieces are as long whatever the number of splits
        assert drawn(5, 0, 1) == found[0, 1]
    if draw < 1:
        assert len({tuple(rows) for rows in found.values()}) == len(found), "others, and anew every epoch"
    else:
        assert all(sorted(rows) == list(range(data.rows)) for rows in found.values())


def recurrent(folder, splits, *, batch=8, split_frames=400, seed=1):
    data = Dataset(folder)
    task = Frames(data.manifest["fields"], network="sru", context=1, layers=1, width=4)
    order = make_order(data, task, splits, batch=batch, split_frames=split_frames, runs=3, seed=seed)
    return Batches(order, seed, lambda x: x)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("split_frames", [1, 100, 10_000])
def test_an_epoch_is_every_utterance_exactly_once(frames, splits, split_frames):
    batches = recurrent(frames, splits, split_frames=split_frames)
    dataset = batches.order.dataset
    for epoch in range(2):
        keys, sizes = [], []
        for t in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            held = [b for split in range(splits) if (b := batches(split, t)) is not None]
            sizes.append(sum(len(b.parts[0].lengths) for b in held))
            for batch in held:
                ends = batch.parts[0].lengths.cumsum(0)
                keys += [batch.key_of(int(end) - 1) for end in ends]
                assert keys[-1] == batch.key_of(len(batch.labels) - 1)
        assert sorted(keys) == sorted(dataset.keys())
        assert sizes[:-1] == [8] * (len(sizes) - 1)
    assert batches.progress(batches.per_epoch)[1] == dataset.rows
    assert batches.order.counted == pytest.approx(8 * dataset.rows / dataset.utterances)
    batches.close()


def test_batches_are_of_like_lengths_and_of_the_same_ones_in_all_splits_at_a_step(frames):
    batches = recurrent(frames, 2, batch=8, split_frames=10_000)
    spans, apart = [], []
    for t in range(batches.per_epoch - 1):
        lengths = [batches(split, t).parts[0].lengths.float() for split in range(2)]
        spans += [float(part.max() - part.min()) for part in lengths]
        apart.append(float(abs(lengths[0].mean() - lengths[1].mean())))
    everything = torch.from_numpy(np.diff(batches.order.dataset.starts)).float()
    assert np.mean(spans) < float(everything.max() - everything.min()) / 3
    assert np.mean(apart) < float(everything.std()) / 2
    batches.close()


def test_splits_of_other_sizes_still_meet_like_lengths_at_a_step(frames):
    """47 utterances over 4 splits of 2 a step: some splits have a batch more than others."""
    data = Dataset(frames)
    task = Frames(data.manifest["fields"], network="sru", context=0, layers=1, width=4)
    order = make_order(data, task, 4, batch=8, split_frames=10_000, runs=3, seed=1)
    order.total = 47
    pieces = [order.load(split, 0, 0) for split in range(4)]
    assert sorted(map(len, pieces)) == [11, 12, 12, 12]
    ranks = [torch.argsort(torch.argsort((p.last - p.first)[:10].view(5, 2).float().mean(1))) for p in pieces]
    assert all(torch.equal(ranks[0], other) for other in ranks)


def test_sequences_are_whole_and_labelled_row_by_row(frames):
    data = Dataset(frames)
    task = Frames(data.manifest["fields"], network="lstm", context=0, layers=1, width=4)
    first, last = 3, 9
    piece = read_sequences(data, [(int(data.starts[first]), int(data.starts[last]))])
    batch = task.collate(piece, 1, 4)
    features, labels = (np.empty((data.rows, 6), np.float32), np.empty(data.rows, np.int32))
    data.read("features", 0, data.rows, features)
    data.read("labels", 0, data.rows, labels)
    at = 0
    for i, u in enumerate(range(first + 1, first + 4)):
        low, high = data.starts[u], data.starts[u + 1]
        assert int(batch.parts[0].lengths[i]) == high - low
        assert torch.equal(batch.parts[0].inputs[: high - low, i, 0], torch.from_numpy(features[low:high]))
        assert torch.equal(batch.labels[at : at + high - low], torch.from_numpy(labels[low:high]).long())
        assert batch.key_of(at) == batch.key_of(at + high - low - 1) == data.key(u)
        at += int(high - low)
