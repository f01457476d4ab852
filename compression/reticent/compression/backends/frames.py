"""Model files of other software as zstandard frames (RFC 8878): their weights are not packed.

ONNX and ExecuTorch store a weight of few bits, or a pruned one, as a whole byte. A frame makes the
file about as small as reticent's own packing, and ``zstd -d`` gives the plain file.
"""

from __future__ import annotations

import zstandard

from reticent.core.errors import ArtifactError

_LEVEL = 19
_LARGEST = 1 << 30


def framed(plain: bytes) -> bytes:
    """Return one zstandard frame that declares its size; the same bytes for the same bytes."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(plain)


def unframed(data: bytes, name: str) -> bytes:
    """Undo :func:`framed`; the size is checked in the frame's header before any allocation.

    Raises:
        ArtifactError: If ``data`` are not one whole frame of at most 1 GiB; ``name`` is the file's.
    """
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size > _LARGEST or frame.window_size > _LARGEST:
            raise ArtifactError(f"{name}: must be a zstandard frame of at most {_LARGEST} bytes")
        return zstandard.ZstdDecompressor().decompress(
            data, max_output_size=_LARGEST, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{name}: is not a zstandard frame: {error}") from error
