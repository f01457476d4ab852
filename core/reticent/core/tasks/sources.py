"""Where the named image data sets come from: two travel with the package, one is looked for."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .idx import read_idx

EMBEDDED = Path(__file__).resolve().parent.parent / "data"
SYSTEM = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the official files."""

DIGITS_TEST = 360

# SHA-256 of the decompressed content of the four official files.
OFFICIAL = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class ImageArrays(NamedTuple):
    """Grey images uint8 ``(n, height, width)`` and labels uint8 ``(n,)``, both read-only."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


@dataclass(frozen=True)
class ImageSource:
    """What is publicly known of an image data set, and how to load it.

    Attributes:
        name: Name in a plan.
        side: Height and width of an image in pixels.
        train: Number of training examples, of which the plan makes some public.
        test: Number of test examples.
        white: Pixel value of full intensity.
        mean: Mean intensity that inputs are centred on, in units of ``white``.
        std: Standard deviation that inputs are divided by, in units of ``white``.
        load: Returns the arrays; called when data are first used.
    """

    name: str
    side: int
    train: int
    test: int
    white: int
    mean: float
    std: float
    load: Callable[[], ImageArrays]


def read_embedded(name: str, folder: Path = EMBEDDED) -> NDArray[np.uint8]:
    """Read one data file of the package, verified against ``sums.json`` beside it.

    Raises:
        DataError: If the file is absent, unknown to ``sums.json`` or damaged.
    """
    try:
        sums = json.loads((folder / "sums.json").read_text(encoding="utf-8"))
        expected = str(sums[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'sums.json'}: has no sum for {name}: the installation is damaged, "
            "install the package again"
        ) from error
    return read_idx(folder / name, sha256=expected)


@functools.cache
def load_digits() -> ImageArrays:
    """Return the 8x8 digits; the file is in random order, and its last 360 are the test part."""
    images = read_embedded("digits-images.idx.gz")
    labels = read_embedded("digits-labels.idx.gz")
    cut = len(labels) - DIGITS_TEST
    return ImageArrays(images[:cut], labels[:cut], images[cut:], labels[cut:])


@functools.cache
def load_fashion() -> ImageArrays:
    """Return the 12,000 images that travel with the package, all from the official train file."""
    parts = ("train-images", "train-labels", "test-images", "test-labels")
    return ImageArrays(*(read_embedded(f"fashion-{part}.idx.gz") for part in parts))


def find_official(name: str) -> Path:
    """Return the path of an official Fashion-MNIST file, gzipped or not.

    Looks in the folder that the environment variable RETICENT_DATA names, then in ``SYSTEM``.

    Raises:
        DataError: If it is in neither, with how to get it.
    """
    own = os.environ.get("RETICENT_DATA")
    folders = ([Path(own)] if own else []) + [SYSTEM]
    candidates = [folder / f"{name}{end}" for folder in folders for end in (".gz", "")]
    for path in candidates:
        if path.is_file():
            return path
    looked = " or ".join(str(folder) for folder in folders)
    raise DataError(
        f"fashion-full: {name}.gz is not in {looked}: run `apt-get install "
        "dataset-fashion-mnist`, or set RETICENT_DATA to a folder with the four official files "
        '(the smaller data set task.name="fashion" needs no files)'
    )


@functools.cache
def load_fashion_full() -> ImageArrays:
    """Return all of Fashion-MNIST from the official files, verified by SHA-256."""
    return ImageArrays(*(read_idx(find_official(n), sha256=s) for n, s in OFFICIAL.items()))


# Means and deviations are of whole published data sets: public constants.
SOURCES = {
    source.name: source
    for source in (
        ImageSource("digits", 8, 1437, DIGITS_TEST, 16, 0.3053, 0.3761, load_digits),
        ImageSource("fashion", 28, 10_000, 2_000, 255, 0.2860, 0.3530, load_fashion),
        ImageSource("fashion-full", 28, 60_000, 10_000, 255, 0.2860, 0.3530, load_fashion_full),
    )
}
