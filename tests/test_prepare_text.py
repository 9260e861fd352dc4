"""`trireme prepare text`: what is written, held out, numbered, refused, remembered; on one rank and on several."""

from __future__ import annotations

import gzip
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepare_material import tree

from collectives.comm import Comm
from hpc.__main__ import build_parser
from hpc.prepare import text as preparing
from hpc.prepare import texts as reading
from hpc.prepare.stretches import hold_out
from hpc.prepare.text import prepare_text
from hpc.prepare.texts import scan
from hpc.prepare.vocabulary import Choice
from hpc.shards import DataError, Dataset, read_manifest

ALL = {"validation": 0.0}


@pytest.fixture(scope="module")
def comm():
    return Comm()


@pytest.fixture
def short_runs(monkeypatch):
    """Utterances of about 40 bytes, so that a small text has many."""
    monkeypatch.setattr(reading, "RUN_BYTES", 40)


def words_of(folder):
    """A data set's words, in order, and its keys."""
    data = Dataset(folder, ("words",))
    for shard in range(len(data.manifest["shards"])):
        data.verify(shard)
    ids = np.empty(data.rows, np.int32)
    data.read("words", 0, data.rows, ids)
    names, keys, starts = data.field("words")["names"], data.keys(), data.starts.tolist()
    data.close()
    return [names[i] for i in ids], keys, starts


def text_of(lines, seed=0, vocabulary=30):
    random = np.random.default_rng(seed)
    drawn = [random.zipf(1.5, int(random.integers(0, 12))) % vocabulary for _ in range(lines)]
    return "".join(" ".join(f"w{i}" for i in line) + "\n" for line in drawn)


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_data_set_holds_the_text_in_its_order(comm, tmp_path, short_runs):
    first, second = text_of(60, 1), text_of(3, 2).rstrip("\n")  # the last line may have no end
    (tmp_path / "a.txt").write_text(first)
    (tmp_path / "b.txt").write_text(second)
    report = prepare_text(comm, {"train": [tmp_path / "b.txt", tmp_path / "a.txt"]}, tmp_path / "out", quiet=True)
    words, keys, starts = words_of(tmp_path / "out/train")
    lines = [line.split() for line in (second + "\n" + first).splitlines()]
    assert words == [word for line in lines for word in [*line, "<eos>"]]
    manifest = read_manifest(tmp_path / "out/train")
    assert len(manifest["shards"]) == 8 and manifest["utterances"] == len(keys) > 8
    assert (manifest["schema"], manifest["kind"], manifest["frames"]) == (2, "text", len(words))
    assert manifest["sentences"] == 63 and report["sets"][0]["sentences"] == 63
    about, counts = manifest["fields"]["words"], Counter(words)
    assert about["counts"] == [counts[word] for word in about["names"]] == sorted(about["counts"], reverse=True)
    assert about["names"][about["unknown"]] == "<unk>" and about["names"][about["sentence_end"]] == "<eos>"
    assert about["classes"] == len(about["names"]) == len(set(words)) + 1
    # A key names the place in the text that its words come from.
    for key, low, high in zip(keys, starts, starts[1:], strict=False):
        name, line = key.split(":")
        begin = int(line) - 1 + (3 if name == "a.txt" else 0)
        size = words[low:high].count("<eos>")
        assert words[low:high] == [w for words_ in lines[begin : begin + size] for w in [*words_, "<eos>"]]
    assert any("kept as sentence ends alone" in note for note in report["notes"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("text", ["", "\n", "a", "a\n", "\n\n", "a b\n\nc", "long line of text\n" * 9 + "end"])
def test_a_scan_finds_all_lines_and_where_runs_begin(tmp_path, monkeypatch, suffix, chunk, text):
    monkeypatch.setattr(reading, "RUN_BYTES", 20)
    monkeypatch.setattr(reading, "CHUNK_BYTES", chunk)
    path = tmp_path / f"text{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    found = scan(path)
    starts = [0, *(m.end() for m in re.finditer("\n", text))]
    starts = [at for at in starts if at < len(text)]
    assert found["lines"] == len(starts)
    expected, before = [], -20
    for line, at in enumerate(starts):
        if at >= before + 20:
            expected.append((at, line))
            before = at
    assert found["runs"] == expected


def test_folders_and_compressed_files_and_byte_order_marks_and_capitals(comm, tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfThe End\r\n")
    (folder / "deep/b.txt").write_text("ONE two\n")
    (folder / "a.gz").write_bytes(gzip.compress(b"zip zap\n"))
    (folder / ".hidden").write_bytes(b"\xff\xfe")
    prepare_text(comm, {"train": [folder]}, tmp_path / "out", lower=True, quiet=True)
    words, keys, _ = words_of(tmp_path / "out/train")
    assert words == ["zip", "zap", "<eos>", "the", "end", "<eos>", "one", "two", "<eos>"]
    assert [key.rpartition("corpus/")[2] for key in keys] == ["a.gz:1", "b.txt:1", "deep/b.txt:1"]


def test_running_text_has_no_sentence_ends(comm, tmp_path):
    (tmp_path / "t").write_text("a b\n\n\nc d\n")
    choice = Choice(sentence_end=None)
    report = prepare_text(comm, {"train": [tmp_path / "t"]}, tmp_path / "out", vocabulary=choice, quiet=True)
    assert words_of(tmp_path / "out/train")[0] == ["a", "b", "c", "d"]
    assert read_manifest(tmp_path / "out/train")["fields"]["words"]["sentence_end"] is None
    assert "2 lines without words, left out" in report["notes"][0]


# -- what is held out -------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=5), st.floats(0, 0.25), st.floats(0, 0.25),
)
def test_stretches_are_whole_even_and_lose_nothing(lengths, validation, test):
    total = sum(lengths)
    try:
        parts = hold_out(lengths, {"validation": validation, "test": test})
    except DataError:
        assert total < 4 or total * (validation + test) > total / 2 - 2
        return
    lines = {name: [(f, i) for f, a, b in stretches for i in range(a, b)] for name, stretches in parts.items()}
    assert sorted(line for part in lines.values() for line in part) == [
        (f, i) for f, length in enumerate(lengths) for i in range(length)
    ]
    for name, part in lines.items():
        assert part == sorted(part)
        wanted = {"validation": validation, "test": test}.get(name)
        if wanted is not None:
            assert len(part) == max(1, round(total * wanted))


def test_what_is_held_out_is_spread_over_the_whole_text():
    parts = hold_out([1000], {"validation": 0.04, "test": 0.1})
    assert parts["validation"] == [(0, 50 * i + 43, 50 * i + 45) for i in range(20)]
    assert parts["test"] == [(0, 50 * i + 45, 50 * i + 50) for i in range(20)]
    assert parts[""] == [(0, 50 * i, 50 * i + 43) for i in range(20)]


def test_only_the_training_part_is_counted(comm, tmp_path, short_runs):
    lines = [f"line{i} common" for i in range(200)]
    (tmp_path / "t").write_text("\n".join(lines) + "\n")
    held = {"validation": 0.1, "test": 0.05}
    prepare_text(comm, {"train": [tmp_path / "t"]}, tmp_path / "out", held=held, quiet=True)
    words = {name: words_of(tmp_path / "out" / name)[0] for name in ("train", "validation", "test")}
    assert [len(w) // 3 for w in words.values()] == [170, 20, 10]
    assert words["test"] == ["<unk>", "common", "<eos>"] * 10  # their first words are nowhere else
    kept = {w for w in words["train"] if w.startswith("line")}
    assert [f"{w} common" for w in words["train"] if w in kept] == [line for line in lines if line.split()[0] in kept]
    manifests = [read_manifest(tmp_path / "out" / name)["fields"]["words"] for name in words]
    assert manifests[0]["names"] == manifests[1]["names"] == manifests[2]["names"]
    assert manifests[0]["counts"][manifests[0]["unknown"]] == 0 and manifests[1]["counts"] != manifests[0]["counts"]
    notes = read_manifest(tmp_path / "out/train")["prepared"]["notes"]
    assert any("no unknown words" in note for note in notes)


def test_sets_of_their_own_files(comm, tmp_path):
    for name, text in (("tr", "a b a\n"), ("va", "b z\n"), ("te", "a\n")):
        (tmp_path / name).write_text(text)
    files = {"train": [tmp_path / "tr"], "validation": [tmp_path / "va"], "test": [tmp_path / "te"]}
    prepare_text(comm, files, tmp_path / "out", quiet=True)
    assert words_of(tmp_path / "out/validation")[0] == ["b", "<unk>", "<eos>"]
    assert words_of(tmp_path / "out/test")[0] == ["a", "<eos>"]


# -- which words have a number ----------------------------------------------------------------------------------------


def test_vocabularies_are_cut_by_count_and_then_by_letters():
    counts = {"c": 3, "b": 2, "a": 2, "d": 1, "e": 1, "<unk>": 4}
    every = Choice().count(counts, 2)
    assert every.words == ("<unk>", "c", "<eos>", "a", "b", "d", "e") and every.unknown == 0 and every.sentence_end == 2
    cut = Choice(words=4).count(counts, 2)  # 4 unknown in the text, b, d and e beside them
    assert cut.words == ("<unk>", "c", "<eos>", "a") and len(cut.words) == 4
    assert Choice(least=2, sentence_end=None).count(counts, 2).words == ("<unk>", "c", "a", "b")
    assert Choice(words=100, unknown="OOV").count({"x": 1}, 5).words == ("<eos>", "x", "OOV")


def test_given_vocabularies_keep_their_numbers(comm, tmp_path):
    (tmp_path / "t").write_text("Red green blue\n")
    (tmp_path / "words").write_text("blue 17\n\ngreen 3\n")
    given = Choice(file=tmp_path / "words")
    prepare_text(comm, {"train": [tmp_path / "t"]}, tmp_path / "out", vocabulary=given, quiet=True)
    assert read_manifest(tmp_path / "out/train")["fields"]["words"]["names"] == ["blue", "green", "<unk>", "<eos>"]
    assert words_of(tmp_path / "out/train")[0] == ["<unk>", "green", "blue", "<eos>"]
    low = Choice(least=1)
    prepare_text(comm, {"train": [tmp_path / "t"]}, tmp_path / "low", vocabulary=low, lower=True, quiet=True)
    again = Choice(dataset=tmp_path / "low/train")
    prepare_text(comm, {"test": [tmp_path / "t"]}, tmp_path / "low", vocabulary=again, quiet=True)
    assert words_of(tmp_path / "low/test")[0] == ["red", "green", "blue", "<eos>"]
    ours, theirs = (read_manifest(tmp_path / f"low/{name}")["fields"]["words"] for name in ("test", "train"))
    assert {k: v for k, v in ours.items() if k != "counts"} == {k: v for k, v in theirs.items() if k != "counts"}
    (tmp_path / "words").write_text("blue\nred\nblue\n")
    with pytest.raises(DataError, match="'blue' is in line 1 and in line 3"):
        given.given("utf-8")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_no_text_is_named_with_file_and_line(comm, tmp_path, short_runs):
    lines = [b"caf\xc3\xa9 au lait number %d" % i for i in range(40)]
    lines[28] = b"caf\xe9 noir"
    (tmp_path / "t.txt").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError, match=r"t.txt', line 29, is not utf-8: byte 3 of it is 0xe9 .*caf.xe9 noir"):
        prepare_text(comm, {"train": [tmp_path / "t.txt"]}, tmp_path / "out", quiet=True)
    assert not list((tmp_path / "out").rglob("dataset.json"))
    prepare_text(comm, {"train": [tmp_path / "t.txt"]}, tmp_path / "out", encoding="latin-1", quiet=True)
    assert "café" in words_of(tmp_path / "out/train")[0]


@pytest.mark.parametrize(("words", "message"), [
    (("missing.txt",), "there is no file .*missing.txt"),
    (("t", "t"), "given twice"),
    (("empty",), "files of set 'train' are empty"),
    (("blank", "--validation", "0"), "only empty lines"),
    (("hollow",), "folder .*hollow' holds no files"),
    (("broken.gz",), "broken.gz' is broken"),
    (("t", "--encoding", "utf-16"), "iconv"),
    (("t", "--encoding", "klingon"), "klingon: not known"),
    (("t", "--words", "5", "--min-count", "2"), "--words and --min-count contradict"),
    (("t", "--words", "2"), "--words 2: expected 3 or more"),
    (("t", "--validation", "1.5"), "--validation 1.5: expected a fraction"),
    (("t", "--validation", "0.3", "--test", "0.3"), "from 0 to 0.5"),
    (("t", "--validation", "0.1", "--validation", "t"), "expected one fraction, or files"),
    (("t", "--validation", "0.7"), "from 0 to 0.5"),  # a file is called so: what reads as a number is one
    (("t", "--validation", "./0.7", "--test", "./0.7"), "given twice"),
    (("t", "--set", "a/b"), "--set 'a/b': expected a name"),
    (("t", "--set", "x", "--test", "t"), "--set writes one set"),
    (("t", "--vocabulary", "nowhere"), "there is no file 'nowhere' to read a vocabulary from"),
    (("t", "--vocabulary-from", "nowhere"), "'nowhere' is not a data set"),
    (("t", "--vocabulary-from", "nowhere", "--unknown", "x"), "brings its own"),
    (("t", "--sentence-end", "the end"), "expected one word"),
    (("t", "--shards", "0"), "--shards 0"),
])
def test_what_cannot_be_prepared_is_refused_in_words(comm, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").write_text("a b\n" * 30)
    (tmp_path / "empty").write_text("")
    (tmp_path / "blank").write_text("\n\n")
    (tmp_path / "0.7").write_text("a b\n")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"a b c\n" * 100)[:-12])
    files = [word for word in words[:2] if not word.startswith("--")][: 2 if words[:2] == ("t", "t") else 1]
    arguments = build_parser("prepare").parse_args(["prepare", "text", *files, "out", *words[len(files) :]])
    with pytest.raises((ValueError, OSError), match=message):
        preparing.run(arguments, comm)
    assert not list(tmp_path.glob("out/*/dataset.json"))


# -- what is remembered -----------------------------------------------------------------------------------------------


def test_an_interrupted_preparation_is_continued(comm, tmp_path, short_runs, monkeypatch):
    (tmp_path / "t").write_text(text_of(300))
    wanted = {"files": {"train": [tmp_path / "t"]}, "held": {"validation": 0.1}, "quiet": True}
    prepare_text(comm, out=tmp_path / "straight", **wanted)
    build = preparing.build_shard

    def stops(texts, keys, folder, index, *rest):
        if index == 5:
            raise OSError("no space left on device")
        return build(texts, keys, folder, index, *rest)

    monkeypatch.setattr(preparing, "build_shard", stops)
    with pytest.raises(OSError, match="no space left"):
        prepare_text(comm, out=tmp_path / "out", **wanted)
    monkeypatch.setattr(preparing, "build_shard", build)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.h5")}
    report = prepare_text(comm, out=tmp_path / "out", **wanted)
    assert (report["state"], report["resumed"], len(kept)) == ("continued", 5, 5)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert tree(tmp_path / "out") == tree(tmp_path / "straight")


def test_a_finished_preparation_is_left_alone(comm, tmp_path, short_runs):
    (tmp_path / "t").write_text(text_of(300))
    wanted = {"files": {"train": [tmp_path / "t"]}, "shards": 2, "quiet": True}
    prepare_text(comm, out=tmp_path / "out", **wanted)
    before = tree(tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.h5")}
    assert prepare_text(comm, out=tmp_path / "out", **wanted)["state"] == "finished"
    with pytest.raises(DataError, match="made with other options: lower was False, is True"):
        prepare_text(comm, out=tmp_path / "out", **wanted, lower=True)
    assert tree(tmp_path / "out") == before
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.h5")}
    (tmp_path / "t").write_text(text_of(300, 5))
    with pytest.raises(DataError, match="same options from other data"):
        prepare_text(comm, out=tmp_path / "out", **wanted)
    assert prepare_text(comm, out=tmp_path / "out", **wanted, overwrite=True)["state"] == "new"
    assert tree(tmp_path / "out") != before


def test_what_one_rank_cannot_read_ends_all_and_the_text_can_be_mended(comm, trireme, tmp_path):
    text, words = tmp_path / "t", tmp_path / "words"
    text.write_text(text_of(9000, 4, 5000))
    words.write_text("\n".join(f"w{i}" for i in range(2000)))
    whole = text.read_bytes()
    at = int(len(whole) * 0.3)  # the third of 8 shards: in the second round of two ranks
    text.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    prepare = ("prepare", "text", text, tmp_path / "out", "--vocabulary", words, "--validation", "0")
    failed = trireme(*prepare, ranks=2, code=None)
    line = whole[:at].count(b"\n") + 1
    assert failed.returncode != 0 and f"line {line}, is not utf-8" in failed.stderr and "Traceback" not in failed.stderr
    assert not list((tmp_path / "out").rglob("dataset.json"))
    assert 2 <= len(list((tmp_path / "out").rglob("done-*"))) < 8
    text.write_bytes(whole)
    wanted = {"files": {"train": [text]}, "held": {"validation": 0.0}, "vocabulary": Choice(file=words), "quiet": True}
    prepare_text(comm, out=tmp_path / "straight", **wanted)
    with pytest.raises(DataError, match="from other data"):  # the text is another one now
        prepare_text(comm, out=tmp_path / "out", **wanted)
    assert prepare_text(comm, out=tmp_path / "out", **wanted, overwrite=True)["resumed"] == 0
    assert {n: b for n, b in tree(tmp_path / "out").items() if n.endswith("h5")} == {
        n: b for n, b in tree(tmp_path / "straight").items() if n.endswith("h5")
    }
