"""Random pipelines of videos, as in `tests/tiny.py`."""

from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

from tests.tiny import seeded, wan


def wan_22_a14b(seed: int = 0) -> WanPipeline:
    """[`wan`] with a second transformer for times below 875."""
    pipeline = wan(seed)
    with seeded(seed + 1):
        pipeline.register_modules(transformer_2=WanTransformer3DModel(**pipeline.transformer.config).eval())
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def wan_22_5b(seed: int = 0) -> WanPipeline:
    """[`wan`] with a time for each token, and the autoencoder of Wan 2.2 5B: a quarter of each side, then patches."""
    pipeline = wan(seed)
    sizes = {"dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True], "is_residual": True}
    with seeded(seed):
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=16,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=8,
            **sizes,
        )
    pipeline.register_to_config(expand_timesteps=True)
    parts = {**pipeline.components, "vae": vae.eval()}
    return WanPipeline(**parts, expand_timesteps=True)
