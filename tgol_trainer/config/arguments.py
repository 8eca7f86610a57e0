"""`TGOLConfig`: one dataclass on `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants
from transformers import TrainingArguments

from tgol_trainer._secrets import is_secret

from .checks import check_folder, check_ranges, is_asked_for
from .method import MethodArguments, check_choices, default_of
from .recipes import recipe_fields
from .resolution import read_resolution

LORA_LEARNING_RATE = 1e-4
FULL_LEARNING_RATE = 1e-5


@dataclass
class TGOLConfig(MethodArguments, TrainingArguments):  # noqa: D101 - made from the fields' help below
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Defaults of TrainingArguments that differ here; `CHANGED_DEFAULTS` says why, and a test holds the list.
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Peak learning rate of AdamW. None: 1e-4 for LoRA, and 1e-5 for full fine-tuning (the paper's "
            "value for batches of 128). LoRA takes ten times that because a low-rank update needs larger steps."
        },
    )
    num_train_epochs: float = field(
        default=1.0, metadata={"help": "Passes over the data; the paper makes one (78 updates for 10,000 prompts)."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Updates between two log lines; below 1, a share of all."}
    )
    logging_first_step: bool = field(
        default=True, metadata={"help": "Log the first update: its loss must equal mean(w)·ln 2."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Hide NaN losses from the log. False: a NaN stops training and names its likely cause."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: prompt, image and score are not arguments of a denoiser."}
    )
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Drop the last incomplete training batch. Evaluation always keeps it."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Passed to DistributedDataParallel. False is right: every adapter weight takes part in each step."
        },
    )

    # Of newer transformers; declared here so that settings files name it with every supported version.
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute the denoiser's activations in the backward pass. Saves memory, slows steps. None: "
            "`tgol train` does so where `tgol plan` says that one GPU needs it."
        },
    )

    # Model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Passed to `DiffusionPipeline.from_pretrained`, such as dtype and revision."},
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a LoRA adapter to continue training. None: train a new one."},
    )
    reference: Literal["base", "initial"] = field(
        default="base",
        metadata={
            "help": "'base': log-ratios are measured against the base model. 'initial': against the adapter of "
            "`adapter_name_or_path`, of which a frozen copy is kept."
        },
    )
    full_finetuning: bool = field(
        default=False,
        metadata={
            "help": "Train every weight of the denoiser instead of an adapter. The reference is then a frozen copy."
        },
    )

    group_offload: bool = field(
        default=False,
        metadata={
            "help": "Keep the weights of the frozen denoiser's blocks on the CPU; each is copied to the device while "
            "it runs, the next one ahead of time. Changes no number; LoRA, recomputed activations."
        },
    )
    storage_dtype: Literal["float8_e4m3fn", "float8_e5m2"] | None = field(
        default=None,
        metadata={
            "help": "Keep the matrices of those blocks in 8 bits and cast them to their own dtype while the block "
            "runs (diffusers' layerwise casting). The reference is then the rounded base model."
        },
    )

    vae_tiling: bool = field(
        default=False,
        metadata={
            "help": "Encode and decode images that are larger than the autoencoder's tile in tiles, for images too "
            "large for it. Gives other latents; the cache keeps them apart."
        },
    )
    text_encoders_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Load text encoders other than CLIP in NF4 (bitsandbytes), for those that are larger than the "
            "device. Embeddings are rounded, for policy and reference alike."
        },
    )

    allow_bad_base: bool = field(
        default=False,
        metadata={
            "help": "Train a base model that predicts something else than its scheduler says, such as noise where "
            "`prediction_type` is 'v_prediction'. False: that is an error before the first step."
        },
    )

    # Data
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompts (str)."})
    prompt_syntax: Literal["keep", "strip"] = field(
        default="keep",
        metadata={
            "help": "'strip': take what other programs read as instructions out of the prompts, such as (word:1.3), "
            "<lora:name:1>, BREAK and negative prompts, and train on the plain text."
        },
    )
    image_column: str = field(default="image", metadata={"help": "Column with the images."})
    video_column: str = field(
        default="video", metadata={"help": "Column with the videos. Video models read it instead of the images."}
    )
    score_column: str = field(
        default="score", metadata={"help": "Column with one real number per image; higher is better."}
    )
    resolution: int | str | None = field(
        default=None,
        metadata={
            "help": "Size in pixels that images and frames are resized and cropped to: one side, or height and width "
            "as in '480x832'. None: the model's own size."
        },
    )
    aspect_buckets: bool = field(
        default=True,
        metadata={
            "help": "Train images of other shapes at sizes of their own shape with about as many pixels as "
            "`resolution`. False: cut all images to `resolution`, as images of streams are."
        },
    )
    num_frames: int | None = field(
        default=None,
        metadata={
            "help": "Frames taken of each video, evenly spaced; video models only. Wan takes 4·k + 1. None: as many "
            "as the pipeline generates by default (Wan 2.1: 81)."
        },
    )
    expert: Literal["high_noise", "low_noise"] | None = field(
        default=None,
        metadata={
            "help": "Which of the two transformers of Wan 2.2 A14B is trained: 'high_noise' (default there) or "
            "'low_noise'. A run trains one."
        },
    )
    random_flip: bool = field(default=False, metadata={"help": "Mirror each image with probability one half."})
    caption_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of training an image with the empty prompt, for policy and reference alike."},
    )
    latent_sampling: Literal["sample", "mode"] = field(
        default="sample",
        metadata={
            "help": "Latents of an image: 'sample' draws from the posterior at each step, 'mode' takes its mode."
        },
    )
    timestep_sampling: Literal["family", "uniform", "logit_normal", "shifted"] = field(
        default="family",
        metadata={
            "help": "How flow-matching models draw times. 'family': SD3 logit-normal, others uniform. 'shifted': "
            "uniform on the noise levels that the pipeline samples with at the size of the image, more of them high "
            "for large images. Other models do not use it."
        },
    )
    train_guidance: float | None = field(
        default=None,
        metadata={
            "help": "Guidance value that guidance-distilled models get in both passes. By default 3.5 (FLUX.1-dev, "
            "FLUX.2 dev), 6 (HunyuanVideo)."
        },
    )
    on_bad_sample: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "Rows that cannot be trained on: 'raise' stops before training, 'skip' logs their number."},
    )
    cache: bool = field(
        default=True,
        metadata={
            "help": "Encode images and prompts once, before the first step, and keep the result on disk. False: at "
            "each step. A stream is always encoded at each step."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of that cache, which runs share. None: `tgol_trainer` in the Hugging Face cache."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that check the images before training."}
    )

    # Numbers that are not finite
    on_nan: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "A loss or gradient of NaN or infinity: 'raise' stops and names the cause, 'skip' leaves that "
            "update out."
        },
    )
    max_skipped_updates: int = field(
        default=10, metadata={"help": "Updates that `on_nan='skip'` may leave out in a run before it stops."}
    )

    # Resuming
    allow_changed: list[str] | None = field(
        default=None,
        metadata={
            "help": "Settings that may differ from those of the checkpoint that is resumed, by name, or 'all'. None: "
            "a change of what decides the result is refused by name."
        },
    )

    # Sharing
    share_formats: list[str] | None = field(
        default=None,
        metadata={
            "help": "Programs for which the adapter is saved at the end, and pushed: 'diffusers', and 'comfyui' for a "
            "second file beside it. None: both where the model has names in ComfyUI."
        },
    )
    hub_gated: Literal["auto", "manual"] | None = field(
        default=None,
        metadata={
            "help": "Gate the Hub repository: visitors share contact details first. 'auto' admits all who do, "
            "'manual' those you accept. None: leave it as it is."
        },
    )

    @classmethod
    def from_recipe(cls, recipe: str, **fields: Any) -> TGOLConfig:
        """
        Make a configuration from a recipe of the method.

        Args:
            recipe (`str`): A name of `RECIPES`.
            fields (`Any`): Other fields; they override those of the recipe.

        Raises:
            ValueError: for an unknown recipe, and where a field is not valid.
        """
        return cls(**{**recipe_fields(recipe), **fields})

    def __post_init__(self) -> None:
        self.output_dir = getattr(self, "output_dir", None) or "tgol_output"
        if self.learning_rate is None:
            self.learning_rate = FULL_LEARNING_RATE if self.full_finetuning else LORA_LEARNING_RATE
        if getattr(self, "data_seed", None) is None:
            # Without it accelerate seeds the order of rows from the global generator's state.
            self.data_seed = self.seed
        # TrainingArguments turns None into False.
        self.checkpointing_given = self.activation_checkpointing is not None or bool(self.gradient_checkpointing)
        super().__post_init__()
        # accelerate's dispatcher sends batches from rank 0, which streams of several processes do not need.
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False
        self.pipeline_kwargs  # noqa: B018 - refuses text that is not a JSON object
        self.resolution = read_resolution(self.resolution)
        self._check_ranges()
        self._check_combinations()
        self._check_storage()

    def to_dict(self) -> dict[str, Any]:
        """Like `TrainingArguments.to_dict`, with secrets in `model_init_kwargs` masked and dtypes as text."""
        given, self.model_init_kwargs = self.model_init_kwargs, None
        try:
            values = super().to_dict()
        finally:
            self.model_init_kwargs = given
        return {**values, "model_init_kwargs": _as_text(given)}

    def __str__(self) -> str:
        lines = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{lines})"

    # The dataclass' own would show the tokens.
    __repr__ = __str__

    @property
    def cache_folder(self) -> Path:
        """`cache_dir`, or its default."""
        return Path(self.cache_dir or Path(constants.HF_HOME, "tgol_trainer")).expanduser()

    @property
    def pipeline_kwargs(self) -> dict[str, Any]:
        """`model_init_kwargs` as a dictionary, empty if there are none."""
        if isinstance(self.model_init_kwargs, str):
            raise ValueError(f"`model_init_kwargs` is not a JSON object: {self.model_init_kwargs!r}.")
        return dict(self.model_init_kwargs or {})

    def _check_ranges(self) -> None:
        check_ranges(self)
        check_folder(self.output_dir)
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"`caption_dropout` must be at least 0 and at most 1, got {self.caption_dropout}.")
        if self.hub_gated not in (None, "auto", "manual"):
            raise ValueError(f"`hub_gated` must be auto or manual, or left out, got {self.hub_gated!r}.")
        if self.storage_dtype not in (None, "float8_e4m3fn", "float8_e5m2"):
            raise ValueError(
                f"`storage_dtype` must be float8_e4m3fn or float8_e5m2, or left out, got {self.storage_dtype!r}."
            )
        for name in ("num_frames", "dataset_num_proc"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.max_skipped_updates < 0:
            raise ValueError(f"`max_skipped_updates` must be at least 0, got {self.max_skipped_updates}.")
        if self.share_formats is not None and (
            "diffusers" not in self.share_formats or set(self.share_formats) - {"diffusers", "comfyui"}
        ):
            raise ValueError(
                f"`share_formats` must be diffusers, or diffusers and comfyui, got {self.share_formats!r}. The run "
                "goes on from the file of diffusers."
            )
        check_choices(self, TGOLConfig)
        self.check_method(self.per_device_train_batch_size)

    def _check_combinations(self) -> None:
        if self.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint=True` ends a run as if it were complete, and its processes out of step. "
                "`tgol train` saves on SIGTERM by itself; in Python, hand in `saving.stopping.StopOnSignal()`."
            )
        if self.threshold_update == "epoch" and self.dataloader_persistent_workers:
            raise ValueError(
                "`dataloader_persistent_workers=True` keeps the labels of the first epoch in the workers, while "
                "`threshold_update='epoch'` makes new ones. Set one of the two back."
            )
        if self.cache_dir and not self.cache:
            raise ValueError("`cache_dir` has no effect with `cache=False`: leave one out.")
        if self.precompute_ref_log_probs and not self.cache:
            raise ValueError("`precompute_ref_log_probs` needs the cache of images and prompts: leave `cache` True.")
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns=True` would drop prompt, image and score, which are not arguments of the "
                "denoiser. Leave it False. Columns that are not needed are ignored."
            )
        if self.score_columns:
            if self.score_column != "score":
                raise ValueError("`score_column` and `score_columns` both name the scores: leave one out.")
            for role in ("prompt_column", "image_column", "video_column", "group_column"):
                if getattr(self, role) in self.score_columns:
                    raise ValueError(f"`score_columns` names {getattr(self, role)!r}, which is the `{role}`.")
        if self.full_finetuning and self.adapter_name_or_path:
            raise ValueError("`full_finetuning=True` trains no adapter: leave out `adapter_name_or_path`.")
        if self.target_drift is not None and (self.full_finetuning or self.reference == "initial"):
            raise ValueError(
                "`target_drift` scales an adapter whose scale 0 is the reference: leave `full_finetuning` False and "
                "`reference` 'base'."
            )
        if self.target_drift is not None and self.reference_update == "epoch":
            raise ValueError(
                "`target_drift` is counted from the base model, and `reference_update='epoch'` moves the reference: "
                "leave one out."
            )
        if self.reference == "initial" and not self.adapter_name_or_path:
            raise ValueError("`reference='initial'` means the adapter of `adapter_name_or_path`, which is not given.")
        if self.reference == "initial" and self.reference_update == "epoch":
            raise ValueError(
                "`reference='initial'` and `reference_update='epoch'` both set the reference: choose one."
            )

    def _check_storage(self) -> None:
        """Refuse what does not go with stored blocks, and recompute activations with them."""
        name = "group_offload" if self.group_offload else "storage_dtype"
        if not (self.group_offload or self.storage_dtype):
            return
        for other, reason in (
            ("full_finetuning", "which trains the weights that would be stored"),
            ("torch_compile", "which does not see that weights come and go"),
            ("fsdp", "which shards them"),
            ("deepspeed", "which shards them"),
        ):
            if is_asked_for(self, other):
                raise ValueError(f"`{name}` does not go with `{other}`, {reason}: leave one out.")
        if self.checkpointing_given and not self.activation_checkpointing:
            raise ValueError(
                f"`{name}` needs `activation_checkpointing`: without it every block's weights stay on the device "
                "until the backward pass. Leave out `activation_checkpointing=False`."
            )
        self.activation_checkpointing = True
        self.gradient_checkpointing: bool | None = True


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: f"<{name.upper()}>" if is_secret(name) else _as_text(item) for name, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value).removeprefix("torch.")


CHANGED_DEFAULTS: dict[str, str] = {
    "learning_rate": "5e-5 is neither the paper's value nor one for LoRA",
    "num_train_epochs": "the paper makes one pass",
    "logging_steps": "a run of the paper has 78 updates",
    "logging_first_step": "the first loss is a self-test of data, reference and loss",
    "logging_nan_inf_filter": "a NaN must not hide",
    "remove_unused_columns": "the columns are not the network's arguments",
    "dataloader_drop_last": "78 updates of 128 for 10,000 rows",
    "ddp_find_unused_parameters": "no adapter weight is ever unused",
}
"""Fields of TrainingArguments with another default here, and why."""


def _docstring() -> str:
    """One text for `help()` and `--help`: the fields' own help."""
    inherited = {item.name for item in fields(TrainingArguments)}
    lines = [
        "Configuration of [`TGOLTrainer`]; every field of `transformers.TrainingArguments` as well.",
        "",
        "Args:",
    ]
    for item in fields(TGOLConfig):
        if item.name in inherited and item.name not in CHANGED_DEFAULTS:
            continue
        lines += [
            f"    {item.name} (`{item.type}`, *optional*, defaults to `{default_of(item)!r}`):",
            f"        {item.metadata['help']}",
        ]
    return "\n".join(lines)


TGOLConfig.__doc__ = _docstring()
