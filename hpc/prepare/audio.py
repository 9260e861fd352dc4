"""Utterances from sound files: log-mel features, and the class of a file's folder as the label of every frame.

Legend: N samples, T frames, D mel filters.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import kaldi_native_fbank
import numpy as np
import soundfile
import soxr

from collectives.comm import Comm
from hpc.prepare.journal import stamp
from hpc.prepare.labels import some
from hpc.quantities import counted
from hpc.shards import DataError

SUFFIXES = (".wav", ".flac", ".ogg")
FRAME_LENGTH_MS = 25.0
SCALE = 32768.0  # Kaldi's features are those of 16-bit samples as they are, not of samples within -1..1


@dataclass(frozen=True)
class Sound:
    """One file: its class, its path below the class's folder (the class's name before it), its header, its stamp."""

    name: str  # class/relative/path.wav
    path: str
    label: int
    samples: int
    rate: int
    channels: int
    stamp: str

    @property
    def key(self) -> str:
        return str(PurePosixPath(self.name).with_suffix(""))


class LogMel:
    """Log-mel energies as Kaldi's compute-fbank-feats --dither=0 computes them, from samples within -1..1.

    rate            samples a second
    mels            mel filters from 20 Hz to half the rate
    frame_shift_ms  milliseconds from one frame to the next

    Raises ValueError if some filters would hold no frequency at all.
    """

    def __init__(self, rate: int, mels: int, frame_shift_ms: float):
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = rate
        options.frame_opts.dither = 0
        options.frame_opts.frame_length_ms = FRAME_LENGTH_MS
        options.frame_opts.frame_shift_ms = frame_shift_ms
        options.mel_opts.num_bins = mels
        self.rate, self.mels, self._options = rate, mels, options
        self.description: dict[str, Any] = {
            "kind": "log-mel", "sample_rate": rate, "mels": mels, "frame_length_ms": FRAME_LENGTH_MS,
            "frame_shift_ms": frame_shift_ms, "frames_per_second": 1000 / frame_shift_ms,
            "window": options.frame_opts.window_type, "dither": 0,
            "preemphasis": round(options.frame_opts.preemph_coeff, 6),
            "remove_dc_offset": options.frame_opts.remove_dc_offset, "snip_edges": options.frame_opts.snip_edges,
            "low_frequency": options.mel_opts.low_freq, "high_frequency": rate / 2, "sample_scale": SCALE,
        }
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, rate).astype(np.float32)
        narrow = f"--mels {mels} at {rate} samples a second: some filters are narrower than a frequency bin"
        try:
            dead = int((self(noise).std(axis=0) < 1e-3).sum())
        except ValueError as error:  # newer libraries refuse to build them
            raise ValueError(f"{narrow}; use fewer, e.g. 40 ({error})") from error
        if dead:
            raise ValueError(f"{narrow}, and {dead} would always be empty; use fewer, e.g. 40")

    @property
    def window(self) -> int:
        """Samples in a frame."""
        return int(self.rate * 0.001 * FRAME_LENGTH_MS)

    def __call__(self, samples_N: np.ndarray) -> np.ndarray:
        """Samples [N] within -1..1 as features [T, D] float32."""
        fbank = kaldi_native_fbank.OnlineFbank(self._options)
        fbank.accept_waveform(self.rate, (samples_N * SCALE).astype(np.float32))
        fbank.input_finished()
        frames = [fbank.get_frame(i) for i in range(fbank.num_frames_ready)]
        return np.stack(frames) if frames else np.empty((0, self.mels), np.float32)


class AudioSource:
    """Sounds as utterances `class/relative/path`, every frame labelled with the class.

    sounds   what to take, as `find_audio` returns them
    names    class names
    log_mel  how features are computed; files of another rate are resampled to its rate
    options  what to remember as the options of this source
    notes    what was left out, for the user
    """

    def __init__(
        self, sounds: Sequence[Sound], names: list[str], log_mel: LogMel, options: dict[str, Any], notes: list[str]
    ):
        self._sounds: dict[str, Sound] = {}
        for sound in sounds:
            if sound.key in self._sounds:
                raise DataError(
                    f"'{self._sounds[sound.key].path}' and '{sound.path}' would both be utterance '{sound.key}'; "
                    "rename one or leave it out with --exclude"
                )
            self._sounds[sound.key] = sound
        self._log_mel = log_mel
        self.names: list[str] | None = names
        self.options, self.notes = options, notes
        self.tally: dict[str, int] = {}
        self.description: dict[str, Any] = {"source": "audio", **log_mel.description}

    def keys(self) -> list[str]:
        return list(self._sounds)

    def digest(self) -> list[str]:
        return [f"{s.name} {s.label} {s.samples} {s.rate} {s.channels} {s.stamp}" for s in self._sounds.values()]

    def load(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        sound = self._sounds[key]
        samples = _samples(sound).mean(axis=1)
        if sound.rate != self._log_mel.rate:
            samples = soxr.resample(samples, sound.rate, self._log_mel.rate)
            self.tally["files resampled"] = self.tally.get("files resampled", 0) + 1
        features = self._log_mel(samples)
        return features, np.full(len(features), sound.label, np.int64)


def find_audio(
    comm: Comm, folders: Sequence[str], *, exclude: Sequence[str] = (), sample_rate: int | None = None, mels: int = 40,
    frame_shift_ms: float = 10.0, names: list[str] | None = None,
) -> AudioSource:
    """The source of all sound files below some folders (collective: the ranks share the reading of headers).

    Files shorter than a frame are left out, and so is every file whose samples are those of an earlier one (in the
    order of classes, then of paths): it would tell the training what the validation asks. Both are counted in `notes`.

    folders         `NAME=DIR` once a class, or one folder with a sub-folder a class
    exclude         patterns of `class/relative/path.wav` to leave out; `*` also matches `/`
    sample_rate     samples a second to resample to, or None: the files' own, which must then agree
    mels            mel filters
    frame_shift_ms  milliseconds from one frame to the next
    names           the classes in their order, or None: as given, or the sub-folders sorted

    Raises DataError for no files, a class without a name, rates that differ or unreadable files; ValueError, OSError.
    """
    classes = comm.on_root(lambda: _classes(folders, names))
    order = [name for name, _ in classes] if names is None else names
    listing = comm.on_root(lambda: _listing(classes, exclude))
    sounds = [
        Sound(name, path, order.index(label), *header)
        for (label, name, path), header in zip(
            listing, _dealt(comm, len(listing), lambda i: _header(listing[i][2])), strict=True
        )
    ]
    rate = sample_rate or comm.on_root(lambda: _common_rate(sounds))
    comm.on_root(lambda: LogMel(rate, mels, frame_shift_ms).mels)  # one complaint, not one a rank
    log_mel = LogMel(rate, mels, frame_shift_ms)
    long_enough = [s for s in sounds if s.samples * rate // s.rate >= log_mel.window]
    kept, repeated = _without_duplicates(comm, long_enough)
    notes = []
    if len(long_enough) < len(sounds):
        left = [s.name for s in sounds if s.samples * rate // s.rate < log_mel.window]
        notes.append(f"shorter than one frame and left out: {counted(len(left), 'file')}: {some(left)}")
    if repeated:
        pairs = [f"{again} = {first}" for again, first in repeated]
        notes.append(f"with the samples of an earlier file and left out: {counted(len(pairs), 'file')}: {some(pairs)}")
    options = {
        "source": "audio", "folders": list(folders), "exclude": list(exclude), "sample_rate": sample_rate, "mels": mels,
        "frame_shift_ms": frame_shift_ms, "names": order,
    }
    comm.on_root(lambda: AudioSource(kept, order, log_mel, options, notes).notes)
    return AudioSource(kept, order, log_mel, options, notes)


def _classes(folders: Sequence[str], known: Sequence[str] | None) -> list[tuple[str, str]]:
    """The classes and their folders. Raises DataError if one is not among those known (None: all are)."""
    classes = _folders(folders)
    unknown = [name for name, _ in classes if known is not None and name not in known]
    if unknown:
        raise DataError(f"classes {unknown} are not among the classes of the data set given with --stats-from: {known}")
    return classes


def _folders(folders: Sequence[str]) -> list[tuple[str, str]]:
    """The classes and their folders. Raises ValueError for a mixture of forms, OSError for a missing folder."""
    if len(folders) == 1 and (os.path.isdir(folders[0]) or "=" not in folders[0]):
        if not os.path.isdir(folders[0]):
            raise NotADirectoryError(f"--from audio '{folders[0]}' is not a folder")
        found = [(e.name, e.path) for e in os.scandir(folders[0]) if e.is_dir() and not e.name.startswith(".")]
        if not found:
            raise DataError(f"'{folders[0]}' has no sub-folders, expected one a class; or give NAME=DIR NAME=DIR")
        return sorted(found)
    classes = []
    for folder in folders:
        name, equals, path = folder.partition("=")
        if not (name and equals):
            raise ValueError(f"--from audio '{folder}': expected NAME=DIR once a class, or a single DIR")
        if not os.path.isdir(path):
            raise NotADirectoryError(f"--from audio '{folder}': '{path}' is not a folder")
        classes.append((name, path))
    names = [name for name, _ in classes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"--from audio has the classes {names}; expected NAME=DIR, every name once")
    return classes


def _listing(classes: Sequence[Sequence[str]], exclude: Sequence[str]) -> list[tuple[str, str, str]]:
    """(class, class/relative/path.wav, path) of all sound files, in the order of classes, then of paths."""
    listing = []
    for label, root in classes:
        found, seen = [], set()
        for folder, inner, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link that leads back up
                inner.clear()
                continue
            seen.add(real)
            for file in files:
                path = os.path.join(folder, file)
                name = f"{label}/{Path(path).relative_to(root).as_posix()}"
                taken = name.lower().endswith(SUFFIXES) and not file.startswith(".")
                if taken and not any(fnmatch(name, pattern) for pattern in exclude):
                    found.append((label, name, path))
        for _, name, path in found:
            if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes that were no utf-8
                raise DataError(f"file {path!r}: its name is no readable utf-8, so it cannot be a key; rename it")
        if not found:
            raise DataError(f"class '{label}': no {', '.join(SUFFIXES)} files below '{root}' that --exclude leaves")
        listing += sorted(found)
    return listing


def _dealt(comm: Comm, count: int, act: Any) -> list[Any]:
    """act(i) for i in range(count), dealt to the ranks; all values on every rank (collective)."""
    values: list[Any] = [None] * count
    for rank, part in enumerate(comm.each(lambda: [act(i) for i in comm.mine(count)])):
        values[rank :: comm.size] = part
    return values


def _header(path: str) -> tuple[int, int, int, str]:
    """(samples, rate, channels, stamp)"""
    try:
        info = soundfile.info(path)
        return info.frames, info.samplerate, info.channels, stamp(path)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"'{path}' cannot be read ({error}); repair it or leave it out with --exclude") from error


def _samples(sound: Sound) -> np.ndarray:
    """A sound's samples [N, channels] float32 within -1..1."""
    try:
        samples, _ = soundfile.read(sound.path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(f"'{sound.path}' cannot be read ({error}); repair it or leave it out with --exclude") from error
    if samples.shape != (sound.samples, sound.channels):
        raise DataError(
            f"'{sound.path}' holds {len(samples)} samples, its header says {sound.samples}; it is cut short: restore "
            "it or leave it out with --exclude"
        )
    return samples


def _common_rate(sounds: Sequence[Sound]) -> int:
    rates = Counter(sound.rate for sound in sounds)
    if len(rates) > 1:
        found = ", ".join(f"{rate} ({count} files)" for rate, count in sorted(rates.items()))
        raise DataError(f"the files have different sample rates: {found}; choose one, e.g. --sample-rate {min(rates)}")
    return next(iter(rates))


def _without_duplicates(comm: Comm, sounds: Sequence[Sound]) -> tuple[list[Sound], list[tuple[str, str]]]:
    """The sounds without those that repeat an earlier one's samples, and (repeated name, first name) (collective).

    Only sounds that agree in length, rate and channels with another are read at all.
    """
    shapes = Counter((s.samples, s.rate, s.channels) for s in sounds)
    suspects = [s for s in sounds if shapes[s.samples, s.rate, s.channels] > 1]
    digests = _dealt(
        comm, len(suspects), lambda i: hashlib.sha256(np.ascontiguousarray(_samples(suspects[i])).tobytes()).hexdigest()
    )
    first: dict[tuple[str, int, int], str] = {}
    repeated = {}
    for sound, digest in zip(suspects, digests, strict=True):
        name = first.setdefault((digest, sound.rate, sound.channels), sound.name)
        if name != sound.name:
            repeated[sound.name] = name
    return [s for s in sounds if s.name not in repeated], list(repeated.items())
