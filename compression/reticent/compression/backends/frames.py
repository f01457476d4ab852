"""Model files of other software as zstandard frames (RFC 8878): their weights are not packed.

ONNX and ExecuTorch store a weight of few bits, or a pruned one, as a whole byte. A frame makes the
file about as small as reticent's own packing, and ``zstd -d`` gives the plain file.
"""

from __future__ import annotations

import zstandard

from reticent.core.errors import ArtifactError

_LEVEL = 19
_LARGEST = 1 << 30
_ANYWAY, _PER_BYTE = 16 << 20, 256  # what a short frame may hold, and what each byte of it adds


def framed(plain: bytes) -> bytes:
    """Return one zstandard frame that declares its size; the same bytes for the same bytes."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(plain)


def unframed(data: bytes, name: str) -> bytes:
    """Undo :func:`framed`; the size is checked in the frame's header before any allocation.

    Raises:
        ArtifactError: If ``data`` are not one whole frame that declares its size, at most 1 GiB and
            at most 16 MiB and 256 times its own; ``name`` is the file's.
    """
    most = min(_LARGEST, _ANYWAY + _PER_BYTE * len(data))
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size > most or frame.window_size > _LARGEST:
            raise ArtifactError(
                f"{name}: must be a zstandard frame of {len(data)} bytes that holds at most {most}"
            )
        return zstandard.ZstdDecompressor().decompress(
            data, max_output_size=most, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{name}: is not a zstandard frame: {error}") from error
