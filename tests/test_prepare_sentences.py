"""`trireme prepare sentences`: what is read, how it is dealt to sets and numbered, what is written, what is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
from material import shared_data
from prepare_material import tree

from collectives.comm import Comm
from hpc.__main__ import build_parser
from hpc.prepare import sentences as preparing
from hpc.prepare.sentence_lines import Sentence, read_text, vocabulary
from hpc.prepare.sentences import prepare_sentences
from hpc.prepare.text import prepare_text
from hpc.run import RunError, compare_fields
from hpc.shards import DataError, Dataset, read_manifest
from models.word_vectors import read_vectors


@pytest.fixture(scope="module")
def comm():
    return Comm()


def command(comm, *words):
    """What the command does, in this process."""
    return preparing.run(build_parser("prepare").parse_args(["prepare", "sentences", *map(str, words)]), comm)


def write_sentences(path, count=60, seed=0, labels=("0", "1"), words="abcdefghijkl"):
    """Random sentences; also the lines, as (label, words)."""
    draw = random.Random(seed)
    lines = [(labels[i % len(labels)], draw.choices(words, k=draw.randint(1, 9))) for i in range(count)]
    path.write_text("".join(f"{label} {' '.join(held)}\n" for label, held in lines))
    return lines


def stored(folder):
    """A data set read back: {key: (label, words)}, in its order, with unknown words as None."""
    data = Dataset(folder, ("words",), ("labels",))
    for shard in range(len(data.manifest["shards"])):
        data.verify(shard)
    ids, labels = np.empty(data.rows, np.int32), np.empty(data.utterances, np.int32)
    data.read("words", 0, data.rows, ids)
    data.read("labels", 0, data.utterances, labels)
    about = data.field("words")
    names = [None if i == about["unknown"] else name for i, name in enumerate(about["names"])]
    classes = data.field("labels")["names"]
    found = {
        key: (classes[label], [names[i] for i in ids[low:high]])
        for key, label, low, high in zip(data.keys(), labels, data.starts, data.starts[1:], strict=False)
    }
    assert about["counts"] == np.bincount(ids, minlength=about["classes"]).tolist()
    assert data.field("labels")["counts"] == np.bincount(labels, minlength=len(classes)).tolist()
    assert len(found) == data.manifest["utterances"] and data.rows == data.manifest["frames"]
    data.close()
    return found


def keys_of(folder):
    data = Dataset(folder, ("words",), ("labels",))
    keys = data.keys()
    data.close()
    return keys


# -- what is written ------------------------------------------------------------------------------------------------


def test_every_sentence_is_stored_once_with_its_words_and_label(comm, tmp_path):
    lines = write_sentences(tmp_path / "all.txt")
    prepare_sentences(comm, tmp_path / "all.txt", tmp_path / "out", test=0.2, shards=3, quiet=True)
    sets = {name: stored(tmp_path / "out" / name) for name in ("train", "validation", "test")}
    assert {name: len(held) for name, held in sets.items()} == {"train": 43, "validation": 5, "test": 12}
    joined = {key: value for held in sets.values() for key, value in held.items()}
    assert joined == {f"all.txt:{i}": line for i, line in enumerate(lines, 1)}
    assert list(sets["train"]) != sorted(sets["train"], key=lambda key: int(key.split(":")[1]))
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["kind"] == "sentences" and len(manifest["shards"]) == 3
    assert manifest["fields"]["labels"]["rows"] == "sequence"
    assert [list(file["rows"]) for file in manifest["shards"][0]["files"]] == [["words"], ["labels"]]


def test_words_are_numbered_by_the_training_part_alone(comm, tmp_path):
    (tmp_path / "train").write_text("1 b a b\n0 c a b\n1 a rare <unk>\n")
    (tmp_path / "dev").write_text("0 c new\n")
    for least, names in ((1, ["<unk>", "a", "b", "c", "rare"]), (2, ["<unk>", "a", "b"])):
        out = tmp_path / f"out{least}"
        prepare_sentences(
            comm, tmp_path / "train", out, validation=tmp_path / "dev", min_count=least, quiet=True
        )
        assert read_manifest(out / "train")["fields"]["words"]["names"] == names
        assert read_manifest(out / "validation")["fields"]["words"]["names"] == names
        assert stored(out / "validation") == {"dev:1": ("0", ["c" if least == 1 else None, None])}
        assert stored(out / "train")["train:3"] == ("1", ["a", "rare" if least == 1 else None, None])


def test_words_of_the_same_frequency_are_in_the_order_of_their_letters():
    sentences = [Sentence("", "", words.split()) for words in ("z z b a", "é b a", "y")]
    assert vocabulary(sentences, 1) == ["<unk>", "a", "b", "z", "y", "é"]
    assert vocabulary(sentences, 2, ["y", "x", "z", "w"]) == ["<unk>", "a", "b", "z", "y", "w", "x"]


def test_classes_are_sorted_by_value_if_they_are_numbers(comm, tmp_path):
    for labels, expected in ((("10", "2", "-1"), ["-1", "2", "10"]), (("pos", "neg", "2"), ["2", "neg", "pos"])):
        write_sentences(tmp_path / "all", labels=labels)
        prepare_sentences(comm, tmp_path / "all", tmp_path / "out", overwrite=True, quiet=True)
        assert read_manifest(tmp_path / "out/train")["fields"]["labels"]["names"] == expected


def test_the_folds_tests_are_disjoint_and_cover_everything(comm, tmp_path):
    lines = write_sentences(tmp_path / "all", count=47)
    report = prepare_sentences(comm, tmp_path / "all", tmp_path / "out", folds=5, quiet=True)
    everything = {f"all:{i}" for i in range(1, len(lines) + 1)}
    tests, judged = [], []
    for fold in range(5):
        parts = {name: keys_of(tmp_path / f"out/fold-0{fold}" / name) for name in ("train", "validation", "test")}
        assert sorted(key for held in parts.values() for key in held) == sorted(everything)
        assert (len(parts["test"]), len(parts["validation"])) in ((9, 4), (10, 4))
        tests += parts["test"]
        judged.append(frozenset(parts["validation"]))
    assert sorted(tests) == sorted(everything) and len(set(judged)) == 5
    assert len(report["sets"]) == 15
    other = prepare_sentences(comm, tmp_path / "all", tmp_path / "other", folds=5, seed=1, quiet=True)
    assert other["state"] == "new" and set(keys_of(tmp_path / "other/fold-00/test")) != set(tests[:10])


def test_without_validation_or_test_there_are_no_such_sets(comm, tmp_path):
    write_sentences(tmp_path / "all")
    prepare_sentences(comm, tmp_path / "all", tmp_path / "one", validation=0.0, quiet=True)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["train"]
    prepare_sentences(comm, tmp_path / "all", tmp_path / "two", folds=2, validation=0.0, quiet=True)
    assert sorted(path.name for path in (tmp_path / "two/fold-01").iterdir()) == ["test", "train"]


def test_a_finished_preparation_is_known_by_its_files_not_by_their_paths(comm, tmp_path, capsys, monkeypatch):
    write_sentences(tmp_path / "all")
    command(comm, tmp_path / "all", tmp_path / "out", "--folds", 3)
    before = tree(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    command(comm, "all", "out", "--folds", 3)
    assert "nothing was done" in capsys.readouterr().out and tree(tmp_path / "out") == before
    with pytest.raises(DataError, match="seed was 0, is 2"):
        command(comm, "all", "out", "--folds", 3, "--seed", 2)
    write_sentences(tmp_path / "all", seed=1)
    with pytest.raises(DataError, match="same options from other data"):
        command(comm, "all", "out", "--folds", 3)


# -- another data set's numbers -------------------------------------------------------------------------------------


def test_another_set_takes_the_words_case_and_classes_of_the_training_set(comm, tmp_path, capsys):
    (tmp_path / "train").write_text("neg B a B\npos c a b\nneg rare\nmid a\n")
    (tmp_path / "more").write_text("pos A new\nmid b C c\n")
    command(comm, tmp_path / "train", tmp_path / "out", "--validation", 0, "--lower")
    add = (tmp_path / "more", tmp_path / "out", "--set", "more", "--vocabulary-from", tmp_path / "out/train")
    command(comm, *add)
    assert stored(tmp_path / "out/more") == {"more:1": ("pos", ["a", None]), "more:2": ("mid", ["b", "c", "c"])}
    ours, theirs = (read_manifest(tmp_path / "out" / name)["fields"] for name in ("train", "more"))
    compare_fields(ours, theirs, "more")  # as `trireme evaluate` does
    assert theirs["labels"]["names"] == ["mid", "neg", "pos"] and theirs["labels"]["counts"] == [1, 0, 1]
    capsys.readouterr()
    command(comm, *add)
    assert "nothing was done" in capsys.readouterr().out

    command(comm, tmp_path / "more", tmp_path / "own", "--set", "more", "--lower")
    assert sorted(keys_of(tmp_path / "own/more")) == ["more:1", "more:2"]
    with pytest.raises(RunError, match=r"field 'words' has another names .*sentences: --vocabulary-from"):
        compare_fields(ours, read_manifest(tmp_path / "own/more")["fields"], "more")
    (tmp_path / "more").write_text("pos a\nbad a\n")
    with pytest.raises(DataError, match=r"more', line 2 has label 'bad', which .*train' has not"):
        command(comm, *add, "--overwrite")


def test_every_fold_may_take_the_same_words(comm, tmp_path):
    write_sentences(tmp_path / "all")
    write_sentences(tmp_path / "few", count=10, words="abx")
    prepare_sentences(comm, tmp_path / "few", tmp_path / "few.set", into="few", quiet=True)
    taken = tmp_path / "few.set/few"
    prepare_sentences(comm, tmp_path / "all", tmp_path / "out", folds=2, vocabulary_from=taken, quiet=True)
    for name in ("fold-00/train", "fold-01/train", "fold-01/test"):
        fields = read_manifest(tmp_path / "out" / name)["fields"]
        assert set(fields["words"]["names"]) == {"<unk>", "a", "b", "x"}


@pytest.mark.parametrize(("words", "message"), [
    (("--set", "a/b"), "--set 'a/b': expected a name"),
    (("--set", "more", "--test", "0.1"), "--set writes one set"),
    (("--set", "more", "--validation", "0.1"), "--set writes one set"),
    (("--set", "more", "--folds", "2"), "--set writes one set"),
    (("--vocabulary-from", "text/train"), "of kind 'text', not of sentences; .*'trireme prepare sentences'"),
    (("--vocabulary-from", "plain/train", "--lower"), "are not in lower case; leave out --lower"),
    (("--vocabulary-from", "plain/train", "--min-count", "2"), "leave out --min-count and --vectors"),
    (("--vocabulary-from", "plain/train", "--vectors", "all"), "leave out --min-count and --vectors"),
    (("--validation", "0.2", "--test", "nowhere"), "'nowhere' is neither a fraction, e.g. 0.1, nor a file"),
    (("--validation", "./0.2", "--test", "0.2"), None),
    (("--validation", "./0.2", "--test", "sub/../0.2"), "'sub/../0.2' is given twice; a text is for one set, once"),
])
def test_what_is_taken_and_held_out_is_checked(comm, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("all", "0.2"):
        write_sentences(tmp_path / name)
    if "--vocabulary-from" in words:
        prepare_sentences(comm, tmp_path / "all", tmp_path / "plain", quiet=True)
        prepare_text(comm, {"train": [tmp_path / "all"]}, tmp_path / "text", quiet=True)
    if message is None:  # what reads as a number is one, whatever files there are
        command(comm, "all", "out", *words)
        sizes = {name: len(keys_of(tmp_path / "out" / name)) for name in ("train", "validation", "test")}
        assert sizes == {"train": 48, "validation": 60, "test": 12}
    else:
        with pytest.raises(ValueError, match=message):
            command(comm, "all", "out", *words)
        assert not (tmp_path / "out").exists()


# -- encodings ------------------------------------------------------------------------------------------------------


def test_the_encoding_is_found(tmp_path):
    text = "1 ein café \x85und naïve\n0 plain\n"
    for encoding in ("utf-8", "utf-8-sig", "latin-1"):
        path = tmp_path / encoding
        path.write_bytes(text.encode(encoding))
        found = read_text(path)
        assert found.encoding == encoding.removesuffix("-sig")
        assert found.note == (f"'{path}' was read as latin-1: line 1 is not UTF-8" if encoding == "latin-1" else "")
        assert [s.words for s in found.sentences] == [["ein", "café", "und", "naïve"], ["plain"]], "0x85 ends no line"
    assert read_text(tmp_path / "latin-1", "cp1252").sentences[0].words[2] == "…und"
    assert read_text(tmp_path / "utf-8", lower=True).sentences[0] == read_text(tmp_path / "utf-8").sentences[0]
    (tmp_path / "crlf").write_bytes(b"X A b\r\nY c\r\n")
    assert [s[1:] for s in read_text(tmp_path / "crlf", lower=True).sentences] == [("X", ["a", "b"]), ("Y", ["c"])]


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        (b"1 a\n0\n1 b\n", "auto", r"'.*all', line 2 has label '0' and no words"),
        (b"1 a\n\n1 b\n", "auto", r"'.*all', line 2 is blank: it has no label"),
        (b"1 a\n0 b\n1 \xe9\n", "utf-8", r"line 3 cannot be decoded as utf-8 \(byte 0xe9"),
        (b"1 a\n0 b\n", "klingon", "--encoding klingon: not known"),
        (b"\n\n", "auto", "is empty"),
        (b"\n".join(b"%d a b" % i for i in range(12)), "auto", "the first words of its 12 lines are 12 different ones"),
        (b"1 a\n1 b\n", "auto", "all sentences have label '1'"),
        (b"1 a\n0 b\n1 c\n", "auto", "has 3 sentences only"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(comm, tmp_path, content, encoding, message):
    (tmp_path / "all").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare_sentences(comm, tmp_path / "all", tmp_path / "out", encoding=encoding, folds=4, quiet=True)
    assert not (tmp_path / "out").exists()


def test_lines_without_labels_are_noticed(comm, tmp_path):
    words = ("in", "the", "beginning", "god", "made")
    (tmp_path / "prose").write_text("".join(f"{word} begins a line\n" for word in words))
    report = prepare_sentences(comm, tmp_path / "prose", tmp_path / "data", folds=2, quiet=True)
    assert any("5 of 5 classes have one sentence" in note for note in report["notes"])


def test_options_that_contradict_each_other_are_refused(comm, tmp_path):
    write_sentences(tmp_path / "all")
    for options, message in (
        ({"folds": 1}, "--folds 1"), ({"folds": 3, "test": 0.1}, "no --test"), ({"test": 1.0}, "--test 1"),
        ({"validation": -0.1}, "--validation -0.1"), ({"min_count": 0}, "--min-count 0"), ({"shards": 0}, "--shards 0"),
        ({"folds": 3, "validation": tmp_path / "all"}, "a fraction for --validation"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_sentences(comm, tmp_path / "all", tmp_path / "out", quiet=True, **options)


# -- word vectors ---------------------------------------------------------------------------------------------------


def test_vectors_are_read_from_both_text_forms(tmp_path):
    lines = "a 1 2 3\n. . 4 5 6\nb -1e-1 0 .5\nb 9 9 9\n\xe9 0 0 1\n"
    for name, text in (("glove", lines), ("word2vec", f"5 3\n{lines}")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        found, width = read_vectors(tmp_path / name, ["a", "b", "\xe9", ".", "none"])
        assert width == 3 and {word: vector.tolist() for word, vector in found.items()} == {
            "a": [1, 2, 3], "b": [np.float32(-0.1), 0, 0.5], "\xe9": [0, 0, 1],
        }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 1 2\nb 1\n", "line 2: word 'b' has 1 values, expected 2"),
        ("a 1 2\nb 1 x\n", "line 2: word 'b': could not"),
        ("a 1 2\nb 1 nan\n", "line 2: word 'b' holds NaN"), ("", "holds no word vectors"),
    ],
)
def test_broken_vectors_are_named(tmp_path, text, message):
    (tmp_path / "vectors").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_vectors(tmp_path / "vectors", ["a", "b"])


def test_words_with_a_vector_are_known_wherever_they_occur(comm, tmp_path):
    (tmp_path / "train").write_text("1 b a b\n0 c a b\n")
    (tmp_path / "test").write_text("0 new other\n")
    (tmp_path / "vectors").write_text("a 1\nc 1\nnew 1\nnever 1\n")
    prepare_sentences(
        comm, tmp_path / "train", tmp_path / "out", validation=0.0, test=tmp_path / "test", min_count=2,
        vectors=tmp_path / "vectors", quiet=True,
    )
    assert read_manifest(tmp_path / "out/train")["fields"]["words"]["names"] == ["<unk>", "b", "a", "c", "new"]
    assert stored(tmp_path / "out/test") == {"test:1": ("0", ["new", None])}


# -- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("rt-polarity.all", 10662), ("subj.all", 10000)])
def test_kims_files_are_read_whole(name, count):
    folder = shared_data("sentences")
    if folder is None:
        pytest.skip("no sentences beside this checkout (set TRIREME_DATA)")
    text = read_text(folder / name)
    assert len(text.sentences) == count and text.encoding == "latin-1"
    labels = [sentence.label for sentence in text.sentences]
    assert labels.count("0") == labels.count("1") == count // 2
