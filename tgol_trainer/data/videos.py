"""Decode video values of any kind to the frames that are trained on. Only encoded files need PyAV."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from .files import NO_FILE, NotAFileError, open_file, read_url
from .images import ImageError, VisualError, content_of, crop_offset, not_found, open_image, to_pixels

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

# What a damaged file may raise beside FFmpeg's own errors: a header that was cut leaves a container without streams.
_BROKEN_FILE = (OSError, EOFError, IndexError, ValueError, RuntimeError)
_WEBM_SIDE, _WEBM_BITS, _USUAL_RATE = 1280, 8_000_000, 16
_UNTOLD_SECONDS = 0.5
"""A whole file may be this much shorter than its header says: containers round, and sound ends later."""


class VideoError(VisualError):
    """One video that cannot be trained on; see [`VisualError`]."""

    medium = "video"


@dataclasses.dataclass(frozen=True)
class Video:
    """
    A video that was decoded once and found good. Its frames are not kept: in memory a clip is many times larger.

    Args:
        value (`Any`): The value of the dataset.
        size (`tuple[int, int]`): (width, height) in pixels, in the order of Pillow.
        digest (`bytes`): Hash of the chosen frames' pixels.
    """

    value: Any
    size: tuple[int, int]
    digest: bytes

    def tobytes(self) -> bytes:
        """Return the digest, which stands for the pixels."""
        return self.digest


def sample_frames(total: int, num_frames: int) -> list[int]:
    """
    Choose frames spread evenly over a clip. The choice is always the same and holds the first and the last frame.

    Args:
        total (`int`): Frames of the clip, at least `num_frames`.
        num_frames (`int`): Frames to choose; a single one is taken from the middle.

    Returns:
        `list[int]`: `num_frames` rising numbers in 0 .. total - 1, `i·(total-1)/(num_frames-1)` rounded half up.

    Raises:
        VideoError: for a clip with too few frames.
    """
    if total < num_frames:
        raise VideoError(f"it has {total} frames, {num_frames} are needed", cause="too few frames")
    if num_frames == 1:
        return [(total - 1) // 2]
    gaps = num_frames - 1
    return [(2 * i * (total - 1) + gaps) // (2 * gaps) for i in range(num_frames)]


def read_video(value: Any, num_frames: int | None, use: Callable[[Image.Image], Result]) -> list[Result]:
    """
    Decode a video given in any of the forms that datasets hold, and use each chosen frame as soon as it is decoded.

    Args:
        value (`dict`, `str`, `pathlib.Path`, `bytes`, `Sequence` of frames, `numpy.ndarray` or [`Video`]):
            A dictionary with `"bytes"` or `"path"` (an undecoded `datasets.Video`); a path or a URL that `datasets`
            can read; an encoded file; frames in any form that [`open_image`] reads; or pixels (F, H, W, 1 to 4
            channels), integers in 0..255 or floating point in 0..1.
        num_frames (`int` or `None`):
            Frames to choose, as [`sample_frames`] does; `None` takes every frame. The decoded frames of a file are
            counted: its frame rate plays no part.
        use (`Callable[[PIL.Image.Image], Any]`):
            Called with each chosen frame, upright and RGB, in order; all are of one size.

    Returns:
        `list`: what `use` returned.

    Raises:
        VideoError: for a video that is missing, undecodable, truncated or too short, or a value of another kind.
        ImportError: where PyAV is needed and missing.
    """
    value = _content(value)
    use = _of_one_size(use)
    if isinstance(value, (list, tuple, np.ndarray)):
        return [use(frame) for frame in _listed_frames(value, num_frames)]
    return _read_file(value, num_frames, use)


def open_video(value: Any, num_frames: int) -> Video:
    """
    Decode a video once, to learn whether it is good, its size, and a hash of its pixels.

    Args:
        value (`Any`): As in [`read_video`].
        num_frames (`int`): Frames that will be trained on.

    Returns:
        [`Video`]

    Raises:
        VideoError, ImportError: as [`read_video`].
    """
    digest = hashlib.blake2b(digest_size=16)

    def size(frame: Image.Image) -> tuple[int, int]:
        digest.update(frame.tobytes())
        return frame.size

    found = read_video(value, num_frames, size)[0]
    return Video(value, found, digest.digest())


def frame_rate(value: Any) -> float | None:
    """
    Return how many frames a second an encoded video shows.

    Args:
        value (`Any`): As in [`read_video`].

    Returns:
        `float`: the average rate that the file states; `None` for frames, arrays, and a file that states none.

    Raises:
        VideoError, ImportError: as [`read_video`].
    """
    value = _content(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        return None
    with _container(value) as container:
        rate = container.streams.video[0].average_rate
    return float(rate) if rate else None


def encode_video(frames: Sequence[Image.Image], fps: int) -> bytes:
    """
    Write frames as an MP4 file without any loss: H.264 in RGB, so that decoding gives the same pixels.

    Args:
        frames (`Sequence[PIL.Image.Image]`): Frames of one size, at least one.
        fps (`int`): Frames a second, written into the file for players.

    Returns:
        `bytes`: the same for the same frames, with one version of PyAV.

    Raises:
        ImportError: where PyAV, or its encoder `libx264rgb` (the wheels on PyPI have it), is missing.
    """
    av = _import_av()
    if "libx264rgb" not in av.codecs_available:
        raise ImportError(
            "This build of PyAV has no encoder libx264rgb, with which clips are written without loss. The wheels on "
            "PyPI have it: `pip install --force-reinstall av`."
        )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "rgb24"
        stream.codec_context.thread_count = 1  # the encoder writes its settings into the file, this one too
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame.convert("RGB"))))
        container.mux(stream.encode())
    return buffer.getvalue()


def coding(value: Any) -> tuple[str, str, str]:
    """
    Return how an encoded video is stored, by FFmpeg's names: container, codec and pixel format.

    Args:
        value (`Any`): As in [`read_video`], an encoded file.

    Raises:
        VideoError, ImportError: as [`read_video`].
    """
    with _container(value) as container:
        if not container.streams.video:
            raise VideoError("the file holds no video track")
        found = container.streams.video[0].codec_context
        return container.format.name, found.name, found.pix_fmt or ""


def encode_webm(value: Any) -> bytes:
    """
    Write a video as a WebM file (VP8), which browsers play whatever the source is; large frames become smaller.

    Args:
        value (`Any`): As in [`read_video`], an encoded file.

    Returns:
        `bytes`: the file, without sound.

    Raises:
        VideoError, ImportError: as [`read_video`].
    """
    av = _import_av()
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        options = {"deadline": "realtime", "cpu-used": "8", "crf": "10"}
        stream = container.add_stream("libvpx", rate=round(frame_rate(value) or _USUAL_RATE), options=options)
        stream.pix_fmt, stream.bit_rate = "yuv420p", _WEBM_BITS

        def write(frame: Image.Image) -> None:
            frame.thumbnail((_WEBM_SIDE, _WEBM_SIDE))
            if not stream.codec_context.is_open:
                stream.width, stream.height = frame.size
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))

        read_video(value, None, write)
        container.mux(stream.encode())
    return buffer.getvalue()


def video_pixels(
    value: Any, num_frames: int, resolution: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int, int, int], bytes]:
    """
    Return a clip's training pixels, each frame resized and cut as [`to_pixels`] does with an image.

    Args:
        value (`Any`): As in [`read_video`].
        num_frames (`int`): Frames to take.
        resolution (`tuple[int, int]`): (height, width) in pixels.

    Returns:
        `tuple[torch.Tensor, tuple, bytes]`: (3, num_frames, height, width) float32 in -1..1; height, width, top and
        left of the crop as in [`Collator`]'s `geometry`; and the digest of [`Video`].
    """
    import torch

    sizes: list[tuple[int, int]] = []
    digest = hashlib.blake2b(digest_size=16)

    def pixels(frame: Image.Image) -> torch.Tensor:
        sizes.append(frame.size)
        digest.update(frame.tobytes())
        return to_pixels(frame, resolution)

    frames = read_video(value, num_frames, pixels)
    width, height = sizes[0]
    geometry = (height, width, *crop_offset(width, height, resolution))
    return torch.stack(frames, dim=1), geometry, digest.digest()


def _content(value: Any) -> Any:
    """Return what a cell holds: frames, an array, encoded bytes or a path."""
    value = content_of(value.value if isinstance(value, Video) else value, VideoError)
    if not isinstance(value, (list, tuple, np.ndarray, bytes, bytearray, memoryview, str, Path)):
        raise VideoError(
            f"a value of type {type(value).__name__} is not a video; give a path, encoded bytes, a list of frames or "
            "a NumPy array"
        )
    return value


def _of_one_size(use: Callable[[Image.Image], Result]) -> Callable[[Image.Image], Result]:
    first: list[tuple[int, int]] = []

    def checked(frame: Image.Image) -> Result:
        first.append(frame.size)
        if frame.size != first[0]:
            raise VideoError(f"its frames differ in size: {first[0]} and {frame.size} (width, height)")
        return use(frame)

    return checked


def _chosen(total: int, num_frames: int | None) -> list[int]:
    return sample_frames(total, max(1, total) if num_frames is None else num_frames)


def _listed_frames(value: Sequence[Any] | np.ndarray, num_frames: int | None) -> Iterator[Image.Image]:
    if len(value) and isinstance(value[0], list):  # nested lists of numbers, as `datasets` returns stored arrays
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise VideoError(f"the nested lists are not a regular array: {error}") from error
    if isinstance(value, np.ndarray) and value.dtype != object and (value.ndim != 4 or value.shape[-1] > 4):
        hint = "; put the channels last: `video.transpose(0, 2, 3, 1)`" if value.ndim == 4 else ""
        raise VideoError(f"the array has shape {value.shape}; expected (frames, height, width, channels){hint}")
    for index in _chosen(len(value), num_frames):
        try:
            yield open_image(value[index])
        except ImageError as error:
            cause = error.cause.replace("image", "video") if error.absent else None
            raise VideoError(f"frame {index}: {error.cause}, {error}", cause) from error


def _read_file(value: Any, num_frames: int | None, use: Callable[[Image.Image], Result]) -> list[Result]:
    with _container(value) as container:
        if not container.streams.video:
            raise VideoError("the file holds no video track")
        total = _count_packets(container)
    while True:
        results, seen = _decode(value, _chosen(total, num_frames), use)
        if seen == total:
            return results
        total = seen  # some packets hold no frame, others several: choose again among the decoded frames


@contextlib.contextmanager
def _container(value: Any) -> Iterator[Any]:
    """Open an encoded file; what a missing or damaged file raises inside the block becomes a [`VideoError`]."""
    av = _import_av()
    try:
        with _opened(value) as source, av.open(source) as container:
            yield container
    except NO_FILE as error:
        raise VideoError(not_found(error), cause="video file not found") from error
    except NotAFileError as error:
        raise VideoError(str(error)) from error
    except (VideoError, ImportError):
        raise
    except (av.FFmpegError, *_BROKEN_FILE) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{type(error).__name__}: {text}") from error


def _opened(value: Any) -> Any:
    # Always a file object: FFmpeg would take a path such as `concat:a|b` or `http://...` for more than a file.
    if isinstance(value, (bytes, bytearray, memoryview)):
        return io.BytesIO(value)
    return read_url(value) if isinstance(value, str) and "://" in value else open_file(value)


def _count_packets(container: Any) -> int:
    """Return how many frames the video track stores, after comparing their number and length with the header."""
    stream, count, end = container.streams.video[0], 0, 0.0
    for packet in container.demux():
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is stream and packet.size and not packet.is_discard:
            count += 1
        if packet.is_corrupt:
            raise VideoError(f"the file breaks off after frame {count}", cause="truncated video")
    if stream.frames and count < stream.frames:
        raise VideoError(f"the header states {stream.frames} frames, the file has {count}", cause="truncated video")
    length = (container.duration or 0) / 1_000_000  # FFmpeg's unit is the microsecond
    if not stream.frames and end < length - _UNTOLD_SECONDS:
        raise VideoError(f"the header states {length:.2f} s, the file has {end:.2f} s", cause="truncated video")
    return count


def _decode(value: Any, chosen: list[int], use: Callable[[Image.Image], Result]) -> tuple[list[Result], int]:
    """Decode the whole track; return what `use` made of the chosen frames, and how many frames there were."""
    wanted, results, seen = set(chosen), [], 0
    with _container(value) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # the workers of a DataLoader are the parallelism
        for frame in container.decode(stream):
            if seen in wanted:
                image = frame.to_image()
                turned = frame.rotation % 360
                results.append(use(image.rotate(turned, expand=True) if turned else image))
            seen += 1
    return results, seen


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Video files are decoded by PyAV, which is not installed: `pip install 'tgol_trainer[video]'`. Lists of "
            "frames and arrays need no decoder."
        ) from error
    return av
