"""Make the data files that travel with the package, the same bytes on every run.

    pip install scikit-learn
    PYTHONPATH=core python scripts/embed_data.py --fashion DIR --out core/reticent/core/data

DIR holds the official Fashion-MNIST training files (Debian: /usr/share/datasets/fashion-mnist).
The digits are those of scikit-learn, which only this script needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import DataError
from reticent.core.seeds import numpy_generator
from reticent.core.tasks.idx import encode_idx, gzip_bytes, read_idx
from reticent.core.tasks.sources import OFFICIAL

SEED = 20170825  # the day Fashion-MNIST was posted to arXiv; any constant would do
TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 200

Arrays = dict[str, NDArray[Any]]


def choose(
    labels: NDArray[np.uint8], train: int, test: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return disjoint positions with ``train`` and ``test`` examples of every label, shuffled."""
    rng = numpy_generator(seed, "embed", "fashion")
    kept, held = [], []
    for label in np.unique(labels):
        found = rng.permutation(np.flatnonzero(labels == label))
        if len(found) < train + test:
            raise DataError(f"label {label}: {len(found)} examples, need {train + test}")
        kept.append(found[:train])
        held.append(found[train : train + test])
    return rng.permutation(np.concatenate(kept)), rng.permutation(np.concatenate(held))


def fashion(folder: Path) -> Arrays:
    """Return the chosen part of Fashion-MNIST; the official test file is not touched."""
    images, labels = (
        read_official(folder, f"train-{k}-ubyte") for k in ("images-idx3", "labels-idx1")
    )
    kept, held = choose(labels, TRAIN_PER_CLASS, TEST_PER_CLASS, SEED)
    return {
        "fashion-train-images.idx.gz": images[kept],
        "fashion-train-labels.idx.gz": labels[kept],
        "fashion-test-images.idx.gz": images[held],
        "fashion-test-labels.idx.gz": labels[held],
    }


def read_official(folder: Path, name: str) -> NDArray[Any]:
    """Read one official file, gzipped or not, and verify it."""
    path = folder / f"{name}.gz"
    return read_idx(path if path.exists() else folder / name, sha256=OFFICIAL[name])


def digits() -> Arrays:
    """Return scikit-learn's digits in a fixed random order, so that any suffix is a fair test."""
    from sklearn.datasets import load_digits  # pyright: ignore

    data = load_digits()
    order = numpy_generator(SEED, "embed", "digits").permutation(len(data.target))
    return {
        "digits-images.idx.gz": data.images.astype(np.uint8)[order],
        "digits-labels.idx.gz": data.target.astype(np.uint8)[order],
    }


def write(arrays: Arrays, out: Path) -> dict[str, str]:
    """Write the arrays as gzipped IDX and return the SHA-256 of each one's IDX content."""
    sums = {}
    for name, array in arrays.items():
        content = encode_idx(array)
        (out / name).write_bytes(gzip_bytes(content))
        sums[name] = hashlib.sha256(content).hexdigest()
    return sums


def main() -> int:
    """Write all files and their sums."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--fashion", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        sums = write({**digits(), **fashion(options.fashion)}, options.out)
    except (DataError, ImportError) as error:
        print(f"embed_data: {error}", file=sys.stderr)
        return 1
    text = json.dumps(sums, indent=2, sort_keys=True) + "\n"
    (options.out / "sums.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
