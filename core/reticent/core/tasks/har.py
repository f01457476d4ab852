"""Human activity recognition: six activities from 30 people's phones.

Windows of 2.56 s of a smartphone worn on the waist (Reyes-Ortiz, Oneto, Samà, Parra and Anguita
2016, "Transition-aware human activity recognition using smartphones"; UCI Machine Learning
Repository). Statements about its licence disagree, so it does not travel with the package: a user
adds a copy.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import struct
import zipfile
import zlib
from lzma import LZMAError
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import models
from ..decoding import parse_npy
from ..errors import DataError
from ..plain_files import read_plain
from .folder import Arrays, data_folder, restore, store
from .owned import OwnedArrays, OwnedSource
from .people import People

ACTIVITIES = ("walking", "upstairs", "downstairs", "sitting", "standing", "laying")
KNOWN = "1868f08faabef73f101c6ce4872a807ba11f7ae51b4eb9818c03a11e476ba5ec"
"""SHA-256 of the conversion that the figures in the documentation are of."""

VOLUNTEERS = 30
TEST = (2, 4, 9, 10, 12, 13, 18, 20, 24)
"""The people of the original test set."""

PEOPLE = People("people", VOLUNTEERS - len(TEST), examples=330, fewest=250)
HINT = "run `reticent data add har PATH` with your own copy (docs/tasks.md says of what form)"

_MAX_BYTES = 2**28
_WINDOW = (6, 128)
# Rounded public constants: gravity along the first axis, and typical deviations, in g and rad/s.
_MEAN = (0.8, 0.0, 0.0, 0.0, 0.0, 0.0)
_STD = (0.4, 0.4, 0.4, 0.4, 0.4, 0.4)

_UNREADABLE = (
    *(OSError, ValueError, OverflowError, EOFError, zipfile.BadZipFile, zlib.error, LZMAError),
    *(NotImplementedError, RuntimeError, struct.error),  # a zip of another version, or encrypted
)


def add_har(path: Path) -> tuple[Path, bool]:
    """Check a ``.npz`` file and store it in the data folder.

    Returns where it is stored, and whether it is the file with the SHA-256 :data:`KNOWN`.

    The file is never unpickled. The arrays are

    ===========  ===========================================================================
    ``signals``  floats ``(n, 6, 128)``: acceleration x, y, z in g (gravity included), rotation
                 x, y, z in rad/s, 50 Hz
    ``label``    integers ``(n,)``, 0 to 5: position in :data:`ACTIVITIES`
    ``user``     integers ``(n,)``, 1 to 30, each at least 250 times
    ===========  ===========================================================================

    Raises:
        DataError: If the file cannot be read, or holds anything else.
    """
    content, arrays = _read(path)
    checked = _checked(str(path), arrays)
    kept: Arrays = {
        "signals": checked["signals"].astype(np.float16),
        "label": checked["label"].astype(np.uint8),
        "user": checked["user"].astype(np.uint8),
    }
    digest = hashlib.sha256(content).hexdigest()
    _loaded.cache_clear()
    return store("har", kept, {"source": digest}), digest == KNOWN


def _read(path: Path) -> tuple[bytes, Arrays]:
    content = read_plain(path, _MAX_BYTES, DataError, links=True)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            size = sum(part.file_size for part in parts.infolist())
            if size > _MAX_BYTES:
                raise DataError(f"{path}: holds {size:,} bytes: must be at most {_MAX_BYTES:,}")
            names = ("signals", "label", "user")
            return content, {name: parse_npy(parts.read(f"{name}.npy")) for name in names}
    except KeyError as error:
        raise DataError(f"{path}: must hold arrays signals, label and user: {error}") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from error


def load_har() -> OwnedArrays:
    """Return the windows of the data folder.

    Raises:
        DataError: If they are not there or damaged.
    """
    return _loaded(data_folder())


@functools.cache
def _loaded(folder: Path) -> OwnedArrays:
    arrays = _checked("har", restore(folder, "har", HINT))
    signals, labels, users = arrays["signals"], arrays["label"], arrays["user"]
    held_out = np.isin(users, TEST)
    rest = ~held_out
    return OwnedArrays(
        signals[rest], labels[rest], users[rest], signals[held_out], labels[held_out]
    )


def _checked(where: str, arrays: Arrays) -> dict[str, NDArray[Any]]:
    signals, labels, users = (arrays.get(n, np.empty(0)) for n in ("signals", "label", "user"))
    if signals.dtype.kind != "f" or signals.shape[1:] != _WINDOW or not len(signals):
        raise DataError(
            f"{where}: signals are {signals.dtype} of shape {signals.shape}: must be floats of "
            f"shape (n, {_WINDOW[0]}, {_WINDOW[1]})"
        )
    for name, values, low, high in (
        ("label", labels, 0, len(ACTIVITIES) - 1),
        ("user", users, 1, VOLUNTEERS),
    ):
        if values.dtype.kind not in "iu" or values.shape != (len(signals),):
            raise DataError(
                f"{where}: {name} is {values.dtype} of shape {values.shape}: must be integers of "
                f"shape ({len(signals)},)"
            )
        if values.min() < low or values.max() > high:
            raise DataError(
                f"{where}: {name} goes from {values.min()} to {values.max()}: must be {low} to "
                f"{high}"
            )
    counts = np.bincount(users.astype(np.int64), minlength=VOLUNTEERS + 1)[1:]
    if counts.min() < PEOPLE.fewest:
        raise DataError(
            f"{where}: user {int(counts.argmin()) + 1} has {counts.min()} windows: must be at "
            f"least {PEOPLE.fewest} of each of {VOLUNTEERS} users"
        )
    _check_values(where, signals)
    return {"signals": signals, "label": labels, "user": users}


def _check_values(where: str, signals: NDArray[Any]) -> None:
    if not np.isfinite(signals).all():
        raise DataError(f"{where}: signals hold NaN or infinity: must be finite")
    gravity = np.linalg.norm(signals[:, :3].mean(axis=2, dtype=np.float64), axis=1)
    if not 0.5 < float(np.median(gravity)) < 2:
        raise DataError(
            f"{where}: the median acceleration is {np.median(gravity):.2f}: must be about 1, in g "
            "with gravity included (divide m/s² by 9.80665)"
        )


def _inputs(signals: NDArray[Any]) -> NDArray[np.float32]:
    mean, std = (np.array(v, dtype=np.float32)[:, None] for v in (_MEAN, _STD))
    return ((signals.astype(np.float32) - mean) / std)[:, :, None]


HAR = OwnedSource(
    name="har",
    classes=len(ACTIVITIES),
    input_shape=(6, 1, 128),
    people=PEOPLE,
    preprocessing=json.dumps(
        {"units": "g (with gravity) x3, rad/s x3, 50 Hz", "mean": _MEAN, "std": _STD}
    ),
    load=load_har,
    inputs=_inputs,
    teacher=models.teacher,
    student=models.student,
)
