"""SkyReels V2, text to video."""

from __future__ import annotations

from importlib.util import find_spec

from .wan import WanFamily


class SkyReelsV2Family(WanFamily):
    """
    `SkyReelsV2Pipeline`: as Wan 2.1, at 544×960 and 24 frames a second, with a shift of 8 in its scheduler.

    Raises:
        ValueError: without ftfy, which the pipeline uses on prompts and does not ask for; and as for Wan.
    """

    default_size, default_frames, frames_per_second = (544, 960), 97, 24  # of `SkyReelsV2Pipeline.__call__`

    def check_pipeline(self) -> None:
        """Refuse what Wan refuses, and a machine without ftfy."""
        if find_spec("ftfy") is None:
            raise ValueError("SkyReelsV2Pipeline cleans prompts with ftfy, which is not installed: pip install ftfy.")
        super().check_pipeline()
