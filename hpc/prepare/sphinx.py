"""Utterances from Sphinx: .mfc feature files, and label lines `key 3 3 4 ...`.

A .mfc file is an int32 count of values followed by as many float32, in either byte order; the count, which must
agree with the file's size, tells which.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpc.files import sha256_of
from hpc.prepare.journal import stamp
from hpc.prepare.labels import LabelFiles, check_lengths, read_keys, some
from hpc.shards import DataError

DROPPED = "last frames dropped"


def read_mfc(path: Path, width: int) -> np.ndarray:
    """The features of one .mfc file, float32 [T, width].

    Raises DataError if the count in the file does not agree with its size or its width, OSError if it cannot be read.
    """
    size = path.stat().st_size
    values = (size - 4) // 4
    with open(path, "rb") as file:
        head = file.read(4)
        orders = [order for order in "<>" if len(head) == 4 and np.frombuffer(head, f"{order}i4")[0] == values]
        if not orders or size != 4 + 4 * values:
            raise DataError(
                f"'{path}' has {size} bytes and starts with {head.hex()}, which is no count of {max(values, 0)} values "
                "in either byte order; it is cut short or no .mfc file"
            )
        body = np.frombuffer(file.read(), f"{orders[0]}f4")
    if values % width:
        raise DataError(f"'{path}' has {values} values, not a multiple of {width} a frame; give its width with --width")
    return body.astype(np.float32).reshape(-1, width)


class SphinxSource:
    """Utterances that have a label line; keys of `fileids` that have none are left out and counted in `notes`.

    mfc              the folder that holds `<key>.mfc`
    labels           label lines, or any other form that `labels.LabelFiles` reads
    fileids          a file with the keys to take, one a line, or None for all that have labels
    width            values a frame
    names            class names, or None if they are to be counted from the labels
    drop_last_frame  drop the last feature frame where the labels are exactly one frame short, and count it
    frame_shift_ms   milliseconds from one frame to the next

    Raises DataError for a repeated key, OSError if a file cannot be read.
    """

    def __init__(
        self, mfc: Path, labels: Path, *, fileids: Path | None = None, width: int = 13, names: list[str] | None = None,
        drop_last_frame: bool = False, frame_shift_ms: float = 10.0,
    ):
        if not mfc.is_dir():
            raise NotADirectoryError(f"--mfc '{mfc}' is not a folder")
        self._mfc, self._fileids, self._width, self._drop_last_frame = mfc, fileids, width, drop_last_frame
        self._labels = LabelFiles([labels])
        wanted = list(self._labels) if fileids is None else read_keys(fileids)
        self._keys = [key for key in wanted if key in self._labels]
        self.names = names
        self.tally: dict[str, int] = {}
        self.description: dict[str, Any] = {
            "source": "sphinx", "values": width, "frames_per_second": 1000 / frame_shift_ms
        }
        self.options: dict[str, Any] = {
            "source": "sphinx", "mfc": str(mfc), "labels": str(labels),
            "fileids": None if fileids is None else str(fileids),
            "width": width, "names": names, "drop_last_frame": drop_last_frame, "frame_shift_ms": frame_shift_ms,
        }
        missing = [key for key in wanted if key not in self._labels]
        self.notes = (
            [f"{len(missing)} of {len(wanted)} utterances have no labels and were left out: {some(missing)}"]
            if missing else []
        )

    def keys(self) -> list[str]:
        return self._keys

    def digest(self) -> list[str]:
        lists = [] if self._fileids is None else [sha256_of(self._fileids)]
        return [*lists, *self._labels.digest(self._keys), *(stamp(self._path(key)) for key in self._keys)]

    def load(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        features, labels = read_mfc(self._path(key), self._width), self._labels.load(key)
        if self._drop_last_frame and len(features) == len(labels) + 1:
            features = features[:-1]
            self.tally[DROPPED] = self.tally.get(DROPPED, 0) + 1
        advice = "use the features that the labels were made from"
        if len(features) == len(labels) + 1:
            advice = "add --drop-last-frame if the labels are always one frame short"
        check_lengths(key, len(features), len(labels), advice)
        return features, labels

    def _path(self, key: str) -> Path:
        path = self._mfc / f"{key}.mfc"
        if not path.is_file():
            raise DataError(f"utterance '{key}' has labels but no file '{path}'; check --mfc or choose with --fileids")
        return path
