"""A stand-in for Meissonic, whose code is its authors': the names and call signatures of theirs, own contents.

What a family relies on is the same: token ids in and logits out, `img_ids` and `txt_ids` that must match the grid
inside, one timestep a row, attention modules without the `head_dim` that diffusers' processor reads, gradient
checkpointing by a flag in train mode, and a pipeline without LoRA methods that takes one generator.
"""

import json
from pathlib import Path

import torch
from diffusers import AmusedScheduler, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxPosEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModelWithProjection, CLIPTokenizer


class Block(nn.Module):
    """Attention over text and image together, then a small network; scaled by the conditioning."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.norm, self.scale = nn.LayerNorm(width), nn.Linear(width, width)
        self.attn = Attention(
            query_dim=width,
            dim_head=head_dim,
            heads=heads,
            out_dim=width,
            bias=True,
            processor=FluxAttnProcessor(),
            qk_norm="rms_norm",
            eps=1e-6,
            pre_only=True,
        )
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, states: torch.Tensor, temb: torch.Tensor, rotary: tuple[torch.Tensor, ...]) -> torch.Tensor:
        states = states + self.attn(self.norm(states) * (1 + self.scale(temb)[:, None]), image_rotary_emb=rotary)
        return states + self.mlp(states)


class Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        num_layers: int = 2,
        attention_head_dim: int = 16,
        num_attention_heads: int = 2,
        joint_attention_dim: int = 32,
        pooled_projection_dim: int = 32,
        axes_dims_rope: tuple[int, ...] = (4, 4, 8),
        vocab_size: int = 34,
        codebook_size: int = 32,
        sample_size: int = 8,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.embed = nn.Embedding(vocab_size, width)
        self.context = nn.Linear(joint_attention_dim, width)
        self.condition = nn.Linear(pooled_projection_dim + 5 * 8 + 16, width)
        self.down = nn.Conv2d(width, width, 2, stride=2) if downsample else nn.Identity()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2) if upsample else nn.Identity()
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=list(axes_dims_rope))
        self.blocks = nn.ModuleList(Block(num_attention_heads, attention_head_dim) for _ in range(num_layers))
        self.logits = nn.Conv2d(width, codebook_size, 1)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        guidance: torch.Tensor | None = None,
        return_dict: bool = True,
        micro_conds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sizes = get_timestep_embedding(micro_conds.flatten(), 8).reshape(len(hidden_states), -1)
        time = get_timestep_embedding(timestep.float(), 16)
        temb = self.condition(torch.cat([pooled_projections, sizes, time], dim=1).to(self.dtype))
        grid = self.down(self.embed(hidden_states).permute(0, 3, 1, 2))
        height, width = grid.shape[-2:]
        text = self.context(encoder_hidden_states)
        states = torch.cat([text, grid.flatten(2).transpose(1, 2)], dim=1)
        rotary = self.pos_embed(torch.cat([txt_ids, img_ids], dim=0))
        for block in self.blocks:
            if self.training and self.gradient_checkpointing:
                states = checkpoint(block, states, temb, rotary, use_reentrant=False)
            else:
                states = block(states, temb, rotary)
        grid = states[:, text.shape[1] :].transpose(1, 2).unflatten(2, (height, width))
        return self.logits(self.up(grid))


class Scheduler(AmusedScheduler):
    pass


class Pipeline(DiffusionPipeline):
    def __init__(
        self,
        vqvae: VQModel,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModelWithProjection,
        transformer: Transformer2DModel,
        scheduler: Scheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            vqvae=vqvae, tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, scheduler=scheduler
        )
        self.vae_scale_factor = 2 ** (len(self.vqvae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: list[str] | str,
        height: int | None = 16,
        width: int | None = 16,
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        encoded = self.text_encoder(tokens.input_ids, output_hidden_states=True)
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        inner = [side // 2 if self.transformer.config.downsample else side for side in size]
        latents = torch.full((len(prompts), *size), self.scheduler.config.mask_token_id)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            logits = self.transformer(
                hidden_states=latents,
                encoder_hidden_states=encoded.hidden_states[-2],
                pooled_projections=encoded.text_embeds,
                micro_conds=torch.tensor([[width, height, 0.0, 0.0, 6.0]]).expand(len(prompts), -1),
                img_ids=torch.stack(
                    torch.meshgrid(torch.zeros(1), *[torch.arange(float(side)) for side in inner], indexing="ij"), -1
                ).reshape(-1, 3),
                txt_ids=torch.zeros(encoded.hidden_states[-2].shape[1], 3),
                timestep=timestep.expand(len(prompts)),
            )
            latents = self.scheduler.step(logits, timestep, latents, generator=generator).prev_sample
        shape = (len(prompts), *size, self.vqvae.config.latent_channels)
        images = self.vqvae.decode(latents, force_not_quantize=True, shape=shape).sample.clip(0, 1)
        return ImagePipelineOutput(self.image_processor.postprocess(images, output_type))


def as_published(pipeline: Pipeline, folder: Path) -> Path:
    """Write the stand-in as its authors' Hub repository has it: classes from `src`."""
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer": ["src.transformer", "Transformer2DModel"], "scheduler": ["src.scheduler", "Scheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
