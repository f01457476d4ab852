"""What an artifact's ``manifest.json`` says: task, figures, and every file's size and SHA-256."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reticent.core.errors import ArtifactError

from .backends import BackendName
from .backends.registry import BACKENDS

FORMAT_VERSION = 2
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
COMMON_FILES = ("model.json", "self_test.safetensors", "MODEL_CARD.md")
MAX_FILE_BYTES = 256 * 2**20
MAX_MANIFEST_BYTES = 2**20


def files_of(backend: BackendName) -> tuple[str, ...]:
    """Return the names of the files that a manifest of ``backend`` lists."""
    return (BACKENDS[backend].model_file, *COMMON_FILES)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TaskInfo(_Part):
    """What the model is for.

    Attributes:
        name: Name of the task.
        classes: Number of classes: the length of the logits.
        input_shape: Shape of one example.
        preprocessing: How raw data become inputs (say, the mean and deviation they were scaled by).
    """

    name: str
    classes: Annotated[int, Field(ge=1)]
    input_shape: tuple[Annotated[int, Field(ge=1)], ...]
    preprocessing: str


class FileEntry(_Part):
    """Size and SHA-256 of one file."""

    bytes: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Part):
    """What an artifact is, and what it is made of.

    Format 2 packs weights (:mod:`packing`); format 1, whose weights are plain int8, is still read.
    ``privacy`` always has ``epsilon``: a number, or the word ``"infinity"`` when privacy was off.
    ``backend`` says which file holds the model and what runs it (:mod:`.backends`).
    """

    format_version: Literal[1, 2] = FORMAT_VERSION
    backend: BackendName = "qnnpack"
    created_by: str
    plan_digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    task: TaskInfo
    metrics: dict[str, Any]
    privacy: dict[str, Any]
    sizes: dict[str, Any]
    files: dict[str, FileEntry]


def parse_manifest(text: bytes) -> Manifest:
    """Return what the JSON ``text`` says, of a manifest whose signature was checked.

    Raises:
        ArtifactError: If it is not a manifest, or lists other files than its backend's.
    """
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{MANIFEST}: {where}: {first['msg']}") from error
    # A fixed set of names leaves no room for paths that lead elsewhere.
    files = files_of(manifest.backend)
    if manifest.files.keys() != set(files):
        raise ArtifactError(f"{MANIFEST}: lists {sorted(manifest.files)}: must list {list(files)}")
    return manifest
