"""What the families of videos share: frames, sizes, and the lines of a card that make a video."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tgol_trainer.likelihoods import RowGenerators

from .base import ModelFamily
from .flow import FlowFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class VideoFamily(ModelFamily):
    """
    A pipeline of videos, whose autoencoder keeps the first frame and joins each group of those that follow to one.

    Raises:
        ValueError: for a number of frames that the autoencoder would cut.
    """

    pipeline_tag = "text-to-video"

    default_size: tuple[int, int]
    """(height, width) in pixels that the pipeline generates by default."""

    default_frames: int
    """Frames that the pipeline generates by default."""

    frames_per_second: int
    """Frame rate of the model's own videos."""

    frames_argument = "num_frames"
    """What the pipeline calls the number of frames."""

    @classmethod
    def frame_rate(cls, pipeline: DiffusionPipeline) -> int:
        """Return the frame rate of this pipeline's videos, where a family's models differ."""
        return cls.frames_per_second

    @property
    def frames_joined(self) -> int:
        """Frames of the video for each latent frame after the first."""
        return self.pipeline.vae_scale_factor_temporal

    def check_pipeline(self) -> None:
        """Refuse a missing component, and a number of frames that the autoencoder would cut."""
        super().check_pipeline()
        self.frames_per_second = self.frame_rate(self.pipeline)
        self.num_frames = self.settings.num_frames or self.default_frames
        step = self.frames_joined
        below = (self.num_frames - 1) // step * step + 1
        if below != self.num_frames:
            raise ValueError(
                f"`num_frames` is {self.num_frames}; it must be {step}·k + 1, since the autoencoder joins {step} "
                f"frames to one and would drop the rest. Nearest are {below} and {below + step}."
            )

    @property
    def native_size(self) -> tuple[int, int]:
        """The pipeline's default; the transformer itself has no size."""
        return self.default_size

    def probe_pixels(self, rows: RowGenerators) -> torch.Tensor:
        """Pixels (1, 3, F, H, W) of the smallest clip with more than one latent frame and one token a frame."""
        frames, side = self.frames_joined + 1, 2 * self.resolution_multiple
        return rows.normal("probe", torch.empty(1, 3, frames, side, side)).clamp(-1, 1)

    def _drawn(self) -> dict[str, int]:
        frames = self.settings.num_frames
        return {**super()._drawn(), **({} if frames is None else {self.frames_argument: frames})}

    def _image_lines(self, prompt: str) -> list[str]:
        return [
            f'frames = pipe(prompt={prompt!r}{self.call_text}, output_type="pil").frames[0]',
            "try:",
            "    from diffusers.utils import export_to_video",
            "",
            "    # Needs two more packages: pip install imageio imageio-ffmpeg",
            f'    export_to_video(frames, "sample.mp4", fps={self.frames_per_second})',
            "except ImportError:  # without them, an image for each frame",
            "    for number, frame in enumerate(frames):",
            '        frame.save(f"sample_{number:03}.png")',
        ]


class VideoFlowFamily(VideoFamily, FlowFamily):
    """A pipeline of videos whose transformer predicts the velocity."""
