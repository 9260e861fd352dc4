"""The laws of the sentences task, for every encoder: padding and batch-mates, sums, memory, vectors, ranks."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional

from collectives.comm import Comm
from hpc.files import sha256_of
from hpc.pieces import read_for
from hpc.prepare.sentences import prepare_sentences
from hpc.records import read_records
from hpc.shards import Dataset
from models.layers.wide_cnn import WideCNN
from models.sentences import Sentences

ENCODERS = ("sru", "sru-later", "lstm", "gru", "qrnn", "cnn")
WORDS = list("abcdefghijklmnopqrst")


def write_sentences(path, count, seed=0):
    """Sentences of 1 to 12 words; their label says whether "good" or "bad" came last."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(0, 11))
        last = draw.choice(["good", "bad"])
        words.insert(draw.randint(0, len(words)), last)
        lines.append(f"{last[0]} {' '.join(words)}\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    file = write_sentences(folder / "all", 60)
    prepare_sentences(Comm(), file, folder, validation=0.0, shards=2, quiet=True)
    return Dataset(folder / "train", ("words",), ("labels",))


def make(data, **options):
    task = Sentences(data.manifest["fields"], **({"width": 12, "embedding": 10, "dropout": 0.3} | options))
    model = task.model()
    task.initialise(model, torch.Generator().manual_seed(0))
    piece = read_for(task, data, [(0, data.rows)])
    task.check(piece)
    return task, model, piece


every_encoder = pytest.mark.parametrize("options", [
    *({"encoder": encoder} for encoder in ENCODERS), {"encoder": "sru", "bidirectional": True, "highway": "always"},
    {"encoder": "lstm", "bidirectional": True, "layers": 3},
], ids=lambda options: "-".join(str(value) for value in options.values()))


def test_a_batch_holds_whole_sentences_with_their_labels(data):
    task, _, piece = make(data)
    names, classes = data.field("words")["names"], data.field("labels")["names"]
    assert len(piece) == data.utterances == 60
    batch = task.collate(piece, 3, 20)
    assert batch.words.shape == (int(batch.lengths.max()), 17) and batch.labels.dtype == torch.int64
    lines = [line.split() for line in (data.folder.parent / "all").read_text().splitlines()]
    for i in range(17):
        label, *words = lines[int(batch.key_of(i).split(":")[1]) - 1]
        length = int(batch.lengths[i])
        assert [names[n] for n in batch.words[:length, i]] == words and classes[batch.labels[i]] == label
        assert not batch.words[length:, i].any()


@every_encoder
def test_padding_and_batch_mates_change_nothing(data, options):
    task, model, piece = make(data, **options)
    model.eval()
    together = task.collate(piece, 0, 24)
    logits = model(together.words, together.lengths)
    other = together.words.clone()
    for i, length in enumerate(together.lengths):
        other[length:, i] = 5  # what stands in the padding
    longer = functional.pad(other, (0, 0, 0, 7), value=3)
    for words in (other, longer):
        torch.testing.assert_close(model(words, together.lengths), logits, rtol=1e-6, atol=1e-6)
    alone = [model(batch.words, batch.lengths) for batch in (task.collate(piece, i, i + 1) for i in range(24))]
    torch.testing.assert_close(torch.cat(alone), logits, rtol=1e-6, atol=1e-6)


@every_encoder
def test_padding_takes_no_gradient(data, options):
    task, model, piece = make(data, **options)
    model.eval()
    batch = task.collate(piece, 0, 24)
    padded = functional.pad(batch.words, (0, 0, 0, 3))
    gradients = []
    for words in (batch.words, padded.where(torch.arange(len(padded))[:, None] < batch.lengths, 7)):
        model.zero_grad()
        task.loss(model, batch._replace(words=words), None)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


@every_encoder
def test_sums_add_up_however_the_sentences_are_cut(data, options):
    task, model, piece = make(data, **options)
    model.eval()
    whole, count, carry = task.loss(model, task.collate(piece, 0, 60), None)
    metrics, _ = task.metrics(model, task.collate(piece, 0, 60), None)
    assert (count, carry) == (60, None) and metrics["loss"] == (pytest.approx(float(whole.detach()), rel=1e-5), 60)
    parts = [task.metrics(model, task.collate(piece, low, min(low + 7, 60)), None)[0] for low in range(0, 60, 7)]
    for name in ("loss", "error"):
        total = tuple(sum(part[name][i] for part in parts) for i in (0, 1))
        assert total == (pytest.approx(metrics[name][0], rel=1e-5), 60)
    posteriors = task.predict(model, task.collate(piece, 0, 60))
    torch.testing.assert_close(posteriors.exp().sum(1), torch.ones(60))
    labels = task.collate(piece, 0, 60).labels
    assert metrics["error"][0] == int((posteriors.argmax(1) != labels).sum())


@every_encoder
def test_one_batch_can_be_memorised(data, options):
    task, model, piece = make(data, **options | {"dropout": 0.0})
    batch = task.collate(piece, 0, 32)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        total, count, _ = task.loss(model, batch, None)
        (total / count).backward()
        optimizer.step()
    assert task.metrics(model, batch, None)[0]["error"] == (0.0, 32.0)


def test_fresh_weights_come_from_the_generator_alone(data):
    for encoder in ENCODERS:
        task, model, _ = make(data, encoder=encoder)
        again = task.model()
        task.initialise(again, torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        task.initialise(again, torch.Generator().manual_seed(1))
        assert not torch.equal(again.embedding.weight, model.embedding.weight)
        assert not model.embedding.weight[0].any() and model.embedding.weight[1:].abs().max() <= 0.25


def test_dropout_is_applied_while_training_alone(data):
    for encoder in ("sru", "lstm", "cnn"):
        task, model, piece = make(data, encoder=encoder, dropout=0.5)
        batch = task.collate(piece, 0, 8)
        assert not torch.equal(model(batch.words, batch.lengths), model(batch.words, batch.lengths))
        model.eval()
        assert torch.equal(model(batch.words, batch.lengths), model(batch.words, batch.lengths))


def test_the_wide_cnn_is_kims_sum_by_sum():
    torch.manual_seed(0)
    cnn = WideCNN(4, maps=6).double()
    lengths = torch.tensor([1, 3, 4, 5, 9])
    x = torch.randn(9, 5, 4, dtype=torch.float64)
    found = cnn(x, lengths)
    assert found.shape == (5, 18)
    for i, length in enumerate(lengths):
        words = functional.pad(x[:length, i], (0, 0, 0, max(0, 5 - int(length))))
        expected = []
        for convolution, width in zip(cnn.convolutions, (3, 4, 5), strict=True):
            spans = [words[at : at + width].T for at in range(len(words) - width + 1)]
            maps = torch.stack([(convolution.weight * span).sum((1, 2)) + convolution.bias for span in spans])
            expected.append(maps.clamp(min=0).amax(0))
        torch.testing.assert_close(found[i], torch.cat(expected))


# -- word vectors ---------------------------------------------------------------------------------------------------


def test_given_vectors_are_of_unit_length_and_stay(data, tmp_path):
    (tmp_path / "vectors").write_text("good 3 4 0\nbad 0 0 -2\nelsewhere 1 1 1\n")
    names = data.field("words")["names"]
    good, bad = names.index("good"), names.index("bad")
    task, model, piece = make(data, vectors=str(tmp_path / "vectors"), embedding=3)
    weight = model.embedding.weight
    assert not weight.requires_grad and not task.model().embedding.weight.requires_grad
    torch.testing.assert_close(weight[[good, bad]], torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, -1.0]]))
    lengths = weight.norm(dim=1)
    torch.testing.assert_close(lengths[1:], torch.ones(len(names) - 1))
    assert float(lengths[0]) == 0, "the unknown word says nothing"
    task.loss(model, task.collate(piece, 0, 8), None)[0].backward()
    assert weight.grad is None

    _, free, _ = make(data, vectors=str(tmp_path / "vectors"), embedding=3, fixed_vectors=False)
    assert free.embedding.weight.requires_grad
    torch.testing.assert_close(free.embedding.weight[good], torch.tensor([3.0, 4.0, 0.0]))


def test_vectors_that_do_not_fit_are_refused(data, tmp_path):
    (tmp_path / "vectors").write_text("good 3 4 0\n")
    with pytest.raises(ValueError, match=r"vectors of 3 values, task\.embedding is 10; set it to 3"):
        make(data, vectors=str(tmp_path / "vectors"))
    (tmp_path / "vectors").write_text("elsewhere 3 4 0\n")
    with pytest.raises(ValueError, match="has none of the data set's"):
        make(data, vectors=str(tmp_path / "vectors"), embedding=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "lstm", "activation": "relu"}, "are SRU's"),
        ({"encoder": "cnn", "highway": "always"}, "are SRU's"),
        ({"encoder": "cnn", "bidirectional": True}, "is for recurrent encoders"),
    ],
)
def test_options_that_an_encoder_has_not_are_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        make(data, **options)


def test_what_cannot_be_trained_on_is_named(data):
    task, _, piece = make(data)
    values, starts = piece.targets["labels"]
    for wrong, message in ((torch.full_like(values, 2), "has label 2, the data set has classes 0 to 1"),):
        piece.targets["labels"] = (wrong, starts)
        with pytest.raises(ValueError, match=f"sentence '{piece.key_of(0)}' {message}"):
            task.check(piece)
    piece.targets["labels"] = (values, torch.cat([starts[:5], starts[6:], starts[-1:]]))
    with pytest.raises(ValueError, match="has 2 labels, expected 1"):
        task.check(piece)
    piece.targets["labels"] = (values, starts)
    piece.fields["words"][int(piece.last[7])] = 999
    with pytest.raises(ValueError, match=f"sentence '{piece.key_of(7)}' has word 999"):
        task.check(piece)


# -- through the command --------------------------------------------------------------------------------------------


RECIPE = """
run = "{folder}/run"
seed = 3
splits = 4
[data]
train = "{folder}/data/train"
validation = "{folder}/data/validation"
batch = 16
split_frames = 300
runs = 3
[task]
name = "sentences"
width = 16
embedding = 12
dropout = 0.2
[strategy]
name = "allreduce"
[optim]
name = "adam"
learning_rate = 0.01
[schedule]
name = "constant"
epochs = 3
[validate]
metric = "error"
[checkpoint]
every = 60
[log]
every = 5
tensorboard = false
"""


def write_recipe(folder):
    write_sentences(folder / "all", 240)
    prepare_sentences(Comm(), folder / "all", folder / "data", test=0.1, shards=2, quiet=True)
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    return folder / "recipe.toml"


@pytest.mark.parametrize("encoder", ["sru", "lstm", "cnn"])
def test_the_same_bytes_for_every_number_of_ranks(trireme, tmp_path, encoder):
    recipe = write_recipe(tmp_path)
    digests, losses = [], []
    for ranks in (1, 2, 4):
        run = tmp_path / f"run{ranks}"
        trireme("train", recipe, f"run={run}", f"task.encoder={encoder}", ranks=ranks)
        digests.append(sha256_of(run / "model.safetensors"))
        losses.append([(r["step"], r["loss"], r.get("error")) for r in read_records(run) if "loss" in r])
    assert len(set(digests)) == 1 and losses[0] == losses[1] == losses[2] and len(losses[0]) > 6


def test_fixed_vectors_are_the_same_bytes_for_every_number_of_ranks_and_ship(trireme, tmp_path):
    recipe = write_recipe(tmp_path)
    draw = random.Random(0)
    lines = [f"{word} {' '.join(f'{draw.gauss(0, 1):.3f}' for _ in range(12))}\n" for word in (*WORDS[:9], "good")]
    (tmp_path / "vectors").write_text("".join(lines))
    for ranks in (1, 2):
        trireme("train", recipe, f"run={tmp_path / f'run{ranks}'}", f"task.vectors={tmp_path / 'vectors'}", ranks=ranks)
    assert len({sha256_of(tmp_path / f"run{ranks}/model.safetensors") for ranks in (1, 2)}) == 1
    (tmp_path / "vectors").unlink()  # the model has them
    measured = trireme("evaluate", tmp_path / "run2", tmp_path / "data/test", "--json", ranks=2).stdout
    assert '"error"' in measured
