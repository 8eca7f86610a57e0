"""Small video files for the tests, written by PyAV."""

import io

import av
import numpy as np

WIDTH, HEIGHT = 48, 32


def frames_of(count=12, seed=0):
    """(F, H, W, 3) uint8: smooth images, of which the n-th is 15·n brighter than a fixed ramp."""
    ramp = np.linspace(0, 60, WIDTH)[None, :, None] + np.zeros((HEIGHT, 1, 3)) + 10 * seed
    return np.stack([ramp + 15 * number for number in range(count)]).astype(np.uint8)


def write(target, frames, kind="mp4", rate=16, **options):
    """Write these frames to a path or a buffer; `options` are those of the container."""
    with av.open(target, "w", format=kind, options=options) as container:
        stream = container.add_stream("libvpx-vp9" if kind == "webm" else "mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 10**6
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def encoded(frames, kind="mp4", rate=16):
    """The bytes of a file of these frames."""
    buffer = io.BytesIO()
    write(buffer, frames, kind, rate)
    return buffer.getvalue()
