"""What several test modules need: which cases are slow, encoded videos, adapters that have moved."""

import io

import av
import pytest
import torch

from tgol_trainer import adapters


def quick(cases, *kept):
    """Parameters of which all but those kept are slow tests.

    For claims about code that all cases share: the fast tests run them on representatives, `-m slow` on the rest.

    Args:
        cases: values, or tuples of values, for `pytest.mark.parametrize`.
        kept: those that stay fast, each as in `cases`.
    """
    unknown = [case for case in kept if case not in cases]
    if unknown:
        raise ValueError(f"not among the cases: {unknown}")
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[] if case in kept else [pytest.mark.slow])
        for case in cases
    ]


def encoded(frames, kind="mp4", rate=16):
    """Bytes of a video file of frames (F, H, W, 3) uint8; lossy."""
    codec = {"mp4": "mpeg4", "webm": "libvpx-vp9", "avi": "mpeg4"}[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = (
            frames.shape[2],
            frames.shape[1],
            "yuv420p",
            10**6,
        )
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def randomize(model, scale=0.1):
    """Move the weights of the policy's adapter, as training would."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and f".{adapters.POLICY}" in name:
            parameter.data = parameter.data + scale * torch.randn(parameter.shape, generator=generator)
