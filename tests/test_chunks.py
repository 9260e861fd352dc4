"""What recurrent layers see at a time: every frame counts once, with its context; running on is as good as whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from material import write_manifest, write_recipe
from test_training import kill, train, train_on, wait_for_step

from hpc.batches import Batches, make_order
from hpc.evaluate import batches_of, pieces_of
from hpc.pieces import read_sequences
from hpc.shards import Dataset, ShardWriter, shard_name
from models.chunks import Chunk
from models.frames import Frames

CLASSES = 7
LENGTHS = [3, 41, 1, 64, 20, 90, 2, 130, 21, 19, 8, 65]


def write_rows(folder, lengths=LENGTHS, shards=2):
    """Every frame's only value is its row's number, its label that number modulo CLASSES."""
    folder.mkdir(parents=True)
    entries, at = [], 0
    for shard, numbers in enumerate(np.array_split(np.arange(len(lengths)), shards)):
        names = [shard_name(kind, shard, shards) for kind in ("features", "labels")]
        with (
            ShardWriter(folder / names[0], {"features": ((1,), np.float32)}) as features,
            ShardWriter(folder / names[1], {"labels": ((), np.int32)}) as labels,
        ):
            for number in numbers:
                rows = np.arange(at, at + lengths[number])
                features.append(f"utterance-{number:02d}", {"features": rows[:, None].astype(np.float32)})
                labels.append(f"utterance-{number:02d}", {"labels": rows % CLASSES})
                at += lengths[number]
        entries.append({"files": [features.summary, labels.summary]})
    counts = np.bincount(np.arange(at) % CLASSES, minlength=CLASSES)
    write_manifest(folder, entries, np.array([at / 2]), np.array([at / 4]), counts, len(lengths))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Dataset(write_rows(tmp_path_factory.mktemp("rows") / "train"))


def task_of(data, **options):
    return Frames(data.manifest["fields"], **({"network": "lstm", "context": 0, "layers": 1, "width": 4} | options))


def model_of(task, seed=0):
    model = task.model()
    task.initialise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def shown(batch):
    """Of every sequence: the rows that it sees (the middle of their windows), and of them those that count."""
    found = []
    for part in batch.parts:
        rows = part.inputs[:, :, part.inputs.shape[2] // 2, 0].long()
        for b, length in enumerate(part.lengths.tolist()):
            found.append((rows[:length, b].tolist(), rows[:, b][part.scored[b]].tolist()))
    return found


def bounds(data, row):
    u = data.utterance_at(row)
    return int(data.starts[u]), int(data.starts[u + 1])


@settings(deadline=None, max_examples=15)
@given(
    splits=some.sampled_from([1, 2, 4]), split_frames=some.sampled_from([1, 150, 10_000]),
    chunk=some.sampled_from(["21-64+21", "0-10+3", "7-20", "1"]), context=some.sampled_from([0, 2]),
)
def test_chunks_of_an_epoch_count_every_frame_once_within_its_context(data, splits, split_frames, chunk, context):
    task = task_of(data, bptt="chunks", chunk=chunk, context=context)
    left, centre, right = Chunk.of(chunk)
    order = make_order(data, task, splits, batch=4, split_frames=split_frames, runs=3, seed=1)
    batches = Batches(order, 1, lambda x: x)
    counted = []
    for t in range(batches.per_epoch):
        for split in range(splits):
            batch = batches(split, t)
            if batch is None:
                continue
            position = 0
            for rows, scored in shown(batch):
                first, last = bounds(data, scored[0])
                assert (scored[0] - first) % centre == 0
                assert scored == list(range(scored[0], min(scored[0] + centre, last)))
                assert rows == list(range(max(first, scored[0] - left), min(scored[-1] + 1 + right, last)))
                assert batch.key_of(position) == data.key(data.utterance_at(scored[0]))
                position += len(scored)
                counted += scored
            assert batch.labels.tolist() == [row % CLASSES for row in counted[-position:]]
    batches.close()
    assert sorted(counted) == list(range(data.rows))
    assert batches.progress(batches.per_epoch)[1] == data.rows


def streamed(data, task, *, lanes=1, splits=1, split_frames=10_000):
    """The batches of an epoch of running frames, by split."""
    order = make_order(
        data, task, splits, batch=lanes * task.steps, split_frames=split_frames, runs=1, seed=1
    )
    batches = Batches(order, 1, lambda x: x)
    found = [[batches(split, t) for t in range(batches.per_epoch)] for split in range(splits)]
    batches.close()
    return order, found


@pytest.mark.parametrize("split_frames", [1, 60, 10_000])
@pytest.mark.parametrize(("options", "lanes", "splits"), [
    ({"chunk": "20"}, 1, 1), ({"chunk": "20", "context": 2}, 4, 2), ({"chunk": "7", "delay": 3}, 2, 1),
    ({"chunk": "30", "delay": 5, "context": 1}, 4, 4), ({"chunk": "16+5", "bidirectional": True}, 4, 2),
])
def test_lanes_count_every_frame_once_and_never_mix_utterances(data, options, lanes, splits, split_frames):
    task = task_of(data, bptt="truncated", **options)
    order, found = streamed(data, task, lanes=lanes, splits=splits, split_frames=split_frames)
    delay, right = options.get("delay", 0), Chunk.of(options["chunk"]).right
    labels, said = [], []
    for batch in (batch for split in found for batch in split):
        (part,) = batch.parts
        for rows, scored in shown(batch):
            said += scored
            assert len({data.utterance_at(row) for row in rows}) == 1
            ends = bounds(data, rows[0])[1]
            assert rows == [min(rows[0] + i, ends - 1) for i in range(len(rows))]
            assert len(rows) <= task.steps + delay + right
        labels += batch.labels.tolist()
        assert int(part.scored.sum()) == len(batch.labels)
    rows = lanes * order.length
    assert rows > data.rows - lanes and abs(len(labels) - rows) <= lanes * delay
    if not delay:
        assert sorted(said) == list(range(rows))
        assert labels == [row % CLASSES for row in said]


def outputs(task, model, batches):
    """Logits of all batches, each going on from the one before, and their labels."""
    carry, found, labels = None, [], []
    for batch in batches:
        logits, carry = task._outputs(model, batch, carry)
        assert all(not held.requires_grad for held in carry)
        found.append(logits)
        labels.append(batch.labels)
    return torch.cat(found), torch.cat(labels)


@pytest.mark.parametrize("split_frames", [1, 10_000])
@pytest.mark.parametrize("network", ["lstm", "sru", "gru", "qrnn"])
@pytest.mark.parametrize("delay", [0, 4])
def test_running_on_is_as_good_as_the_whole(data, network, delay, split_frames):
    """One lane of 20 frames a batch gives what whole utterances give, from an utterance's first frame to its last."""
    options = {"network": network, "layers": 2, "width": 6, "context": 1, "delay": delay}
    task = task_of(data, bptt="truncated", chunk="20", **options)
    model = model_of(task)
    order, (batches,) = streamed(data, task, split_frames=split_frames)
    found, labels = outputs(task, model, batches)
    whole = task_of(data, **options)
    piece = read_sequences(data, [(0, data.rows)])
    expected = torch.cat([whole._outputs(model, whole.collate(piece, i, i + 1), None)[0] for i in range(len(piece))])
    n = len(found)
    assert n >= order.length - delay and labels.tolist() == [row % CLASSES for row in range(n)]
    torch.testing.assert_close(found, expected[:n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("chunk", "bidirectional"), [("20", False), ("16+5", True)])
@pytest.mark.parametrize("lanes", [2, 4])
def test_every_lane_goes_on_from_its_own_state(data, lanes, chunk, bidirectional):
    """As one lane over the same rows does, from where the first utterance of a lane begins."""
    options = {"bptt": "truncated", "chunk": chunk, "bidirectional": bidirectional, "layers": 2, "width": 6}
    task = task_of(data, **options)
    model = model_of(task)
    order, (batches,) = streamed(data, task, lanes=lanes)
    rows = [row for batch in batches for _, scored in shown(batch) for row in scored]
    found, _ = outputs(task, model, batches)
    assert len(found) == len(rows) == lanes * order.length
    whole = task_of(data, **(options if bidirectional else options | {"bptt": "utterance", "chunk": ""}))
    compared = 0
    for lane in range(lanes):
        low, high = lane * order.length, (lane + 1) * order.length
        for u in range(len(LENGTHS)):
            first, last = int(data.starts[u]), int(data.starts[u + 1])
            if not low <= first < high:
                continue
            if bidirectional:  # where a chunk ends depends on where the lane begins
                features = torch.arange(first, last, dtype=torch.float32)[:, None]
                expected = latency_controlled(model, features, 16, 5, (first - low) % 16, high - first)
            else:
                piece = read_sequences(data, [(first, last)])
                expected = whole._outputs(model, whole.collate(piece, 0, 1), None)[0]
            for row in range(first, min(last, high)):
                torch.testing.assert_close(found[rows.index(row)], expected[row - first], rtol=1e-5, atol=1e-6)
                compared += 1
    assert compared > data.rows / 2


def test_a_carry_that_is_no_number_harms_no_utterance_that_begins(data):
    task = task_of(data, bptt="truncated", chunk="20")
    some_fresh = (b for b in streamed(data, task, lanes=4)[1][0] if b.begin[1].any() and not b.begin[1].all())
    batch = next(some_fresh)
    _, goes_on = batch.begin
    state = batch.started((torch.full((4, 4), float("nan")), torch.ones(4, 4)))
    assert torch.isnan(state[0][goes_on]).all() and not state[0][~goes_on].any() and not state[1][~goes_on].any()


def latency_controlled(model, features, centre, right, into=0, until=1 << 30):
    """Of one utterance [T, D], chunk by chunk and layer by layer, as Zhang et al. 2016 have it; logits [T, C].

    into   how far into a chunk the utterance begins
    until  how many of its frames its lane has
    """
    states, out = {}, []
    for begin in range(-into, min(until, len(features)), centre):
        at, end = max(begin, 0), min(begin + centre, until)
        x = model.normal(features[at : end + right])[:, None]
        n = min(end, len(features)) - at
        for number, (ahead, back) in enumerate(model.recurrent.layers):
            h, states[number] = ahead.cell(x[:n], states.get(number))
            forward = torch.cat([h, ahead.cell(x[n:], states[number])[0]]) if len(x) > n else h
            x = torch.cat([forward, back.cell(x.flip(0))[0].flip(0)], dim=2)
        out.append(model.output(x[:n, 0]))
    return torch.cat(out)


def test_latency_controlled_layers_go_on_forward_and_look_ahead_backward(tmp_path):
    data = Dataset(write_rows(tmp_path / "rows", [101], shards=1))
    task = task_of(data, bptt="truncated", chunk="16+5", bidirectional=True, layers=2, width=6)
    model = model_of(task)
    features = torch.arange(101, dtype=torch.float32)[:, None]
    with torch.no_grad():
        expected = latency_controlled(model, features, 16, 5)
        (decoded,) = batches_of(task, data, pieces_of(task, data)[0], lambda x: x)
        torch.testing.assert_close(task.predict(model, decoded), expected.log_softmax(1), rtol=1e-5, atol=1e-6)
        assert decoded.labels.tolist() == [row % CLASSES for row in range(101)]
    order, (batches,) = streamed(data, task)
    torch.testing.assert_close(outputs(task, model, batches)[0], expected[: order.length], rtol=1e-5, atol=1e-6)


def test_overlapped_decoding_is_the_mean_of_two_posteriors(data):
    task = task_of(data, bptt="chunks", chunk="3-8+2", bidirectional=True, layers=2, width=6)
    model = model_of(task)
    with torch.no_grad():
        for runs in pieces_of(task, data):
            found = [(task.predict(model, b), b) for b in batches_of(task, data, runs, lambda x: x)]
            posteriors = torch.cat([log_posteriors for log_posteriors, _ in found]).exp()
            labels = torch.cat([batch.labels for _, batch in found])
            assert labels.tolist() == [row % CLASSES for row in range(*runs[0])]
            for row in range(*runs[0]):
                first, last = bounds(data, row)
                begin = first + (row - first) // 4 * 4
                parts = []
                for low in (begin - 4, begin):
                    at, end = max(low - 3, first), min(low + 8 + 2, last)
                    inputs = torch.arange(at, end, dtype=torch.float32)[:, None, None, None]
                    whole = torch.ones(1, end - at, dtype=torch.bool)
                    logits, _ = model(inputs, torch.tensor([end - at]), whole)
                    parts.append(logits[row - at].softmax(0))
                torch.testing.assert_close(posteriors[row - runs[0][0]], sum(parts) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [
    {"bptt": "chunks", "chunk": "5-16+5", "bidirectional": True}, {"bptt": "truncated", "chunk": "20", "delay": 3},
    {"bptt": "truncated", "chunk": "16+5", "bidirectional": True}, {"delay": 3},
])
@pytest.mark.parametrize("network", ["lstm", "sru"])
def test_batch_mates_and_padding_never_change_metrics(data, options, network):
    task = task_of(data, network=network, layers=2, context=1, **options)
    model = model_of(task)
    found = []
    for rows in (1, 400, 4096):  # of a batch
        sums = []
        with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
            patched.setattr("hpc.evaluate.BATCH_ROWS", rows)
            for runs in pieces_of(task, data):
                sums += [task.metrics(model, batch, None)[0] for batch in batches_of(task, data, runs, lambda x: x)]
        assert sum(s["loss"][1] for s in sums) == data.rows, "every frame is judged"
        found.append(sum(s["loss"][0] for s in sums))
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] == pytest.approx(found[2], rel=1e-6)


@pytest.mark.parametrize(("options", "said"), [
    ({"chunk": "20"}, "goes with task.bptt"), ({"bptt": "chunks", "chunk": "a-b"}, "as left-centre"),
    ({"bptt": "chunks", "chunk": "3-0+3"}, "is no chunk"), ({"bptt": "chunks", "delay": 2}, "leave it out"),
    ({"bptt": "truncated", "chunk": "5-20"}, "the past is in the state"),
    ({"bptt": "truncated", "chunk": "20+5"}, "frames ahead are for task.bidirectional; write '20'"),
    ({"bptt": "truncated", "chunk": "20", "bidirectional": True}, "both directions need frames ahead; write '20\\+21'"),
    ({"network": "dnn", "delay": 2}, "task.delay"),
    ({"delay": 2, "bidirectional": True}, "of one direction"),
])
def test_what_does_not_go_together_is_an_error(data, options, said):
    with pytest.raises(ValueError, match=said):
        task_of(data, **options)


# -- whole runs -------------------------------------------------------------------------------------------------------

LSTM = 'task={name="frames", network="lstm", layers=2, width=16, variational=0.1, context=1, '


@pytest.mark.parametrize(("task", "batch"), [
    ('bptt="chunks", chunk="5-12+5", bidirectional=true}', 16),
    ('bptt="truncated", chunk="8", delay=2}', 64),
    ('bptt="truncated", chunk="8+4", bidirectional=true}', 64),
])
def test_whole_runs_keep_the_law_killed_and_resumed(trireme, start, tmp_path, task, batch):
    recipe = write_recipe(tmp_path)
    changes = (
        LSTM + task, f"data.batch={batch}", "optim.learning_rate=0.3", "schedule.epochs=3", "checkpoint.every=150",
        'strategy={name="bmuf", block_steps=5, turn_steps=2}',
    )
    digests = train_on(trireme, recipe, (1, 2), tmp_path, *changes)
    assert len(set(digests.values())) == 1, digests
    stopped = tmp_path / "stopped"
    process = start("train", recipe, f"run={stopped}", *changes, ranks=4)
    wait_for_step(stopped, 15, process)
    kill(process)
    assert train(trireme, recipe, 2, stopped, *changes) == digests[1]
    trireme("predict", tmp_path / "run1", tmp_path / "validation", "--to", "h5", ranks=2)


def test_a_split_may_draw_all_frames_in_one_lane(data):
    task = task_of(data, bptt="truncated", chunk="20")
    order = make_order(data, task, 2, batch=2 * task.steps, split_frames=10_000, runs=1, seed=1, draw=1.0)
    assert order.length == data.rows and len(order.load(0, 0, 0)) == data.rows
