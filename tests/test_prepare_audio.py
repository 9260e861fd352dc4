"""Sound files and Sphinx files as sources of `trireme prepare frames`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from collectives.comm import Comm
from hpc.prepare.audio import LogMel, find_audio
from hpc.prepare.frames import prepare_frames
from hpc.prepare.holdout import Holdout
from hpc.prepare.labels import read_names
from hpc.prepare.sphinx import DROPPED, SphinxSource, read_mfc
from hpc.shards import DataError, read_manifest


@pytest.fixture(scope="module")
def comm():
    return Comm()


def noise(seed, samples=4000, channels=1):
    return np.random.default_rng(seed).uniform(-0.3, 0.3, (samples, channels)).astype(np.float32)


def put(path, samples, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)


@pytest.fixture
def sounds(tmp_path):
    """Two classes of two and three files."""
    for i, name in enumerate(["en/a.wav", "en/deep/b.flac", "fr/a.wav", "fr/c.v2.wav", "fr/d.ogg"]):
        put(tmp_path / "in" / name, noise(i))
    return tmp_path / "in"


# -- log-mel --------------------------------------------------------------------------------------------------------


def fbank(samples, rate, mels):
    """Kaldi's log-mel filter bank without dither, straight from its definition, in float64."""
    window, shift = int(rate * 0.025), int(rate * 0.010)
    size = 1 << (window - 1).bit_length()
    povey = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))) ** 0.85
    mel = lambda hz: 1127 * np.log1p(np.asarray(hz) / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(rate / 2), mels + 2)
    bins = mel(np.arange(size // 2) * rate / size)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    rows = []
    for t in range(1 + (len(samples) - window) // shift):
        frame = samples[t * shift : t * shift + window].astype(np.float64) * 32768
        frame -= frame.mean()
        frame = np.concatenate([[frame[0] * (1 - 0.97)], frame[1:] - 0.97 * frame[:-1]]) * povey
        power = np.abs(np.fft.rfft(frame, size)[: size // 2]) ** 2
        rows.append(np.log(np.maximum(filters @ power, np.finfo(np.float32).eps)))
    return np.array(rows)


@pytest.mark.parametrize(("rate", "mels"), [(8000, 40), (16000, 40), (16000, 23)])
def test_log_mel_equals_the_definition(rate, mels):
    samples = noise(1, rate // 2)[:, 0] * np.linspace(0.01, 1, rate // 2, dtype=np.float32)
    got = LogMel(rate, mels, 10.0)(samples)
    expected = fbank(samples, rate, mels)
    assert got.shape == expected.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_too_many_filters_are_refused():
    with pytest.raises(ValueError, match="--mels 200 at 8000"):
        LogMel(8000, 200, 10.0)


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_class_of_the_folder_labels_every_frame(comm, sounds):
    source = find_audio(comm, [str(sounds)])
    assert source.names == ["en", "fr"] and source.notes == []
    assert source.keys() == ["en/a", "en/deep/b", "fr/a", "fr/c.v2", "fr/d"]
    features, labels = source.load("fr/a")
    assert features.shape == (48, 40) and labels.tolist() == [1] * 48
    samples = soundfile.read(sounds / "fr/a.wav", dtype="float32")[0]
    assert np.array_equal(features, LogMel(8000, 40, 10.0)(samples))
    assert source.description["sample_rate"] == 8000 and source.description["frames_per_second"] == 100


def test_classes_by_name_keep_their_order(comm, sounds):
    source = find_audio(comm, [f"french={sounds}/fr", f"english={sounds}/en"])
    assert source.names == ["french", "english"] and source.load("english/a")[1][0] == 1
    with pytest.raises(ValueError, match="every name once"):
        find_audio(comm, [f"a={sounds}/fr", f"a={sounds}/en"])


def test_a_class_list_from_elsewhere_numbers_the_classes(comm, sounds):
    source = find_audio(comm, [f"fr={sounds}/fr"], names=["de", "en", "fr"])
    assert source.names == ["de", "en", "fr"] and source.load("fr/a")[1][0] == 2
    with pytest.raises(DataError, match=r"\['fr'\] are not among"):
        find_audio(comm, [f"fr={sounds}/fr"], names=["de", "en"])


def test_excluded_short_and_repeated_files_are_left_out(comm, sounds):
    put(sounds / "en/silence/1.wav", noise(11))
    put(sounds / "en/short.wav", noise(12, 199))
    put(sounds / "en/just.wav", noise(13, 200))
    again = soundfile.read(sounds / "en/a.wav", dtype="int16")[0]
    put(sounds / "fr/again.wav", again)
    put(sounds / "fr/again.flac", again)
    source = find_audio(comm, [str(sounds)], exclude=["*/silence/*"])
    assert source.keys() == ["en/a", "en/deep/b", "en/just", "fr/a", "fr/c.v2", "fr/d"]
    assert source.notes == [
        "shorter than one frame and left out: 1 file: 'en/short.wav'",
        "with the samples of an earlier file and left out: 2 files: 'fr/again.flac = en/a.wav', "
        "'fr/again.wav = en/a.wav'",
    ]
    assert len(source.load("en/just")[0]) == 1


def test_rates_must_agree_or_are_resampled(comm, sounds):
    time = np.arange(16000) / 16000
    put(sounds / "en/tone.wav", (0.3 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32), 16000)
    with pytest.raises(DataError, match=r"8000 \(5 files\), 16000 \(1 files\).*--sample-rate 8000"):
        find_audio(comm, [str(sounds)])
    source = find_audio(comm, [str(sounds)], sample_rate=8000)
    got, _ = source.load("en/tone")
    time = np.arange(8000) / 8000
    expected = LogMel(8000, 40, 10.0)((0.3 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32))
    assert got.shape == expected.shape and source.tally == {"files resampled": 1}
    loudest = expected[50].argmax()
    assert (got[5:-5].argmax(axis=1) == loudest).all()
    np.testing.assert_allclose(got[5:-5, loudest], expected[5:-5, loudest], atol=0.01)


def test_channels_are_averaged(comm, sounds):
    stereo = noise(21, 4000, 2)
    put(sounds / "en/stereo.wav", stereo)
    read = soundfile.read(sounds / "en/stereo.wav", dtype="float32")[0]
    got, _ = find_audio(comm, [str(sounds)]).load("en/stereo")
    assert np.array_equal(got, LogMel(8000, 40, 10.0)(read.mean(axis=1)))


def test_names_that_collide_and_files_that_are_broken_are_refused(comm, sounds):
    put(sounds / "en/a.flac", noise(31))
    with pytest.raises(DataError, match=r"a.flac' and .*a.wav' would both be utterance 'en/a'"):
        find_audio(comm, [str(sounds)])
    (sounds / "en/a.flac").write_bytes(b"no sound at all")
    with pytest.raises(DataError, match=r"a.flac' cannot be read.*--exclude"):
        find_audio(comm, [str(sounds)])
    (sounds / "en/a.flac").unlink()
    (sounds / "empty").mkdir()
    with pytest.raises(DataError, match=r"class 'empty': no .wav"):
        find_audio(comm, [str(sounds)])


def test_audio_becomes_a_data_set(comm, sounds, tmp_path):
    prepare_frames(comm, find_audio(comm, [str(sounds)]), tmp_path / "out", deltas=2, quiet=True)
    fields = read_manifest(tmp_path / "out/train")["fields"]
    assert fields["features"]["width"] == 120 and fields["features"]["description"]["mels"] == 40
    assert fields["labels"]["names"] == ["en", "fr"] and sum(fields["labels"]["counts"]) == 4 * 48


# -- Sphinx ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", "<>")
def test_mfc_files_of_either_byte_order(tmp_path, order):
    values = np.random.default_rng(0).normal(size=(7, 13)).astype(np.float32)
    body = np.array([91], f"{order}i4").tobytes() + values.astype(f"{order}f4").tobytes()
    (tmp_path / "u.mfc").write_bytes(body)
    assert np.array_equal(read_mfc(tmp_path / "u.mfc", 13), values)
    with pytest.raises(DataError, match="91 values, not a multiple of 12"):
        read_mfc(tmp_path / "u.mfc", 12)
    for broken in (body[:-4], body[:-1], body[:2], b""):
        (tmp_path / "u.mfc").write_bytes(broken)
        with pytest.raises(DataError, match=f"has {len(broken)} bytes"):
            read_mfc(tmp_path / "u.mfc", 13)


def test_the_last_frame_is_dropped_on_request_alone(tmp_path):
    for key, frames in (("a", 5), ("b", 6), ("c", 7)):
        body = np.array([frames * 2], "<i4").tobytes() + np.arange(frames * 2, dtype="<f4").tobytes()
        (tmp_path / f"{key}.mfc").write_bytes(body)
    (tmp_path / "train.ali").write_text("a 0 1 2 3 4\nb 0 1 2 3 4\nc 0 1 2 3 4\nd 0\n")
    plain = SphinxSource(tmp_path, tmp_path / "train.ali", width=2)
    with pytest.raises(DataError, match=r"'b' has 6 feature frames and 5 labels.*--drop-last-frame"):
        plain.load("b")
    source = SphinxSource(tmp_path, tmp_path / "train.ali", width=2, drop_last_frame=True)
    assert len(source.load("a")[0]) == 5 and source.load("b")[0].tolist() == [[2 * i, 2 * i + 1] for i in range(5)]
    assert source.tally == {DROPPED: 1}
    with pytest.raises(DataError, match="'c' has 7 feature frames and 5 labels"):
        source.load("c")
    with pytest.raises(DataError, match="'d' has labels but no file"):
        source.load("d")
    (tmp_path / "ids").write_text("b\na\ne\n")
    chosen = SphinxSource(tmp_path, tmp_path / "train.ali", fileids=tmp_path / "ids", width=2)
    assert chosen.keys() == ["b", "a"] and chosen.notes == ["1 of 3 utterances have no labels and were left out: 'e'"]


@pytest.fixture
def an4():
    data = Path(os.environ.get("TRIREME_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "an4_mfc"
    if not data.is_dir():
        pytest.skip(f"no AN4 at {data}; set TRIREME_DATA to the folder that holds an4_mfc")
    return data


def test_an4_with_labels_one_frame_short(comm, tmp_path, an4):
    labels, names = an4 / "cntk_align/train.ali", read_names(an4 / "cntk_align/state.list")
    source = SphinxSource(an4 / "feat", labels, names=names, drop_last_frame=True)
    rule = Holdout(groups=9, pattern="/([^/]+)/")
    report = prepare_frames(comm, source, tmp_path, deltas=2, validation=rule, quiet=True)
    assert report["notes"] == ["last frames dropped: 948"]
    assert [sum(row[what] for row in report["sets"]) for what in ("utterances", "frames")] == [948, 252734]
    assert [row["classes"] for row in report["sets"]] == [132, 132] and report["sets"][0]["width"] == 39
    with pytest.raises(DataError, match="--drop-last-frame"):
        prepare_frames(comm, SphinxSource(an4 / "feat", labels, names=names), tmp_path / "x", quiet=True)


def test_an4_with_labels_of_every_frame(comm, tmp_path, an4):
    source = SphinxSource(an4 / "feat", an4 / "align/train.ali", names=read_names(an4 / "align/states.txt"))
    report = prepare_frames(comm, source, tmp_path, validation=Holdout(fraction=0), quiet=True)
    assert report["sets"][0]["frames"] == 253682 and report["sets"][0]["present"] == 102
    test = SphinxSource(an4 / "feat", an4 / "align/test.ali")
    report = prepare_frames(comm, test, tmp_path, into="test", stats_from=tmp_path / "train", quiet=True)
    assert (report["sets"][0]["utterances"], report["sets"][0]["frames"]) == (130, 35570)
