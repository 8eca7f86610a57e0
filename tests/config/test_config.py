"""TGOLConfig: the paper's defaults, what is refused and how it is worded, flags and YAML files."""

import dataclasses
import json
import typing
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments
from trl import ScriptArguments, TrlParser

from tgol_trainer import TGOLConfig
from tgol_trainer.config import CHANGED_DEFAULTS
from tgol_trainer.config.method import _ACTS_WITH

INHERITED = {item.name: item for item in dataclasses.fields(TrainingArguments)}
FIELDS = {item.name: item for item in dataclasses.fields(TGOLConfig)}
OWN = sorted(set(FIELDS) - set(INHERITED))
HINTS = typing.get_type_hints(TGOLConfig)
LITERALS = {name: typing.get_args(HINTS[name]) for name in OWN if typing.get_origin(HINTS[name]) is typing.Literal}


@pytest.fixture
def make(tmp_path):
    def build(**settings):
        return TGOLConfig(**{"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, **settings})

    return build


@pytest.fixture
def parse(tmp_path):
    """What `tgol train` makes of flags, and of a YAML file if there is one."""

    def run(*flags, yaml=None):
        arguments = ["--output_dir", str(tmp_path), "--report_to", "none", "--use_cpu", "true", *flags]
        if yaml is not None:
            (tmp_path / "run.yaml").write_text(yaml)
            arguments += ["--config", str(tmp_path / "run.yaml")]
        return TrlParser((ScriptArguments, TGOLConfig)).parse_args_and_config(arguments)[1]

    return run


# ---- Defaults ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 1.0),
        ("temperature", 0.001),
        ("confidence_scale", 5.0),
        ("threshold_percentile", 50.0),
        ("threshold", None),
        ("num_train_epochs", 1.0),
        ("max_steps", -1),
        ("score_normalization", "none"),
        ("reference_update", "never"),
        ("full_finetuning", False),
    ],
)
def test_the_method_has_the_papers_defaults(make, name, value):
    assert getattr(make(), name) == value


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1e-4),
        ({"full_finetuning": True}, 1e-5),
        ({"learning_rate": 3e-4}, 3e-4),
        ({"learning_rate": 3e-4, "full_finetuning": True}, 3e-4),
        ({"learning_rate": 5e-5}, 5e-5),  # the default of TrainingArguments, given on purpose
        ({"learning_rate": 0.0}, 0.0),
    ],
)
def test_the_learning_rate_suits_lora_or_full_weights_unless_given(make, settings, expected):
    assert make(**settings).learning_rate == expected


def default_of(item):
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def test_changed_defaults_lists_exactly_the_fields_whose_default_differs_and_says_why():
    differing = {name for name, item in INHERITED.items() if default_of(item) != default_of(FIELDS[name])}
    assert set(CHANGED_DEFAULTS) == differing
    assert len(differing) > 4
    for name, reason in CHANGED_DEFAULTS.items():
        assert len(reason) > 10, name


def test_every_own_field_and_every_changed_default_has_one_help_text_which_is_also_in_the_docstring():
    assert len(OWN) > 15
    for name in [*OWN, *CHANGED_DEFAULTS]:
        text = FIELDS[name].metadata.get("help", "")
        assert len(text) > 20, name
        lines = TGOLConfig.__doc__.splitlines()
        heads = [number for number, line in enumerate(lines) if line.startswith(f"    {name} (")]
        assert len(heads) == 1, name
        assert lines[heads[0] + 1].strip() == text, name


def test_the_docstring_gives_the_defaults_that_the_fields_have():
    for name in OWN:
        # Not the type: HfArgumentParser replaces the fields' type names by types once it has parsed.
        (head,) = [line for line in TGOLConfig.__doc__.splitlines() if line.startswith(f"    {name} (`")]
        assert head.endswith(f"`, *optional*, defaults to `{default_of(FIELDS[name])!r}`):")


@pytest.mark.parametrize(("settings", "expected"), [({}, 42), ({"seed": 7}, 7), ({"seed": 7, "data_seed": 3}, 3)])
def test_the_order_of_rows_follows_the_seed_unless_given(make, settings, expected):
    assert make(**settings).data_seed == expected


# ---- What is refused ----


@pytest.mark.parametrize("name", sorted(LITERALS))
def test_a_choice_refuses_any_other_value_and_lists_the_allowed_ones(make, name):
    assert len(LITERALS) > 4
    with pytest.raises(ValueError, match=f"^`{name}` must be one of") as refused:
        make(**{name: "something else"})
    assert f"must be one of {', '.join(LITERALS[name])}, got 'something else'" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in sorted(LITERALS.items()) for value in values if value != FIELDS[name].default],
)
def test_a_choice_takes_each_of_its_values(make, name, value):
    needed = {
        "initial": {"adapter_name_or_path": "somewhere"},
        "tgol_pairs": {"group_size": 4},
        "dpo": {"group_size": 4},
        "score_combination": {"score_columns": ["a", "b"]},
        "group_statistic": {"threshold_strategy": "group"},
    }
    others = needed.get(value, {}) | needed.get(name, {})
    assert getattr(make(**{name: value}, **others), name) == value


# A field that acts only beside another: a value that is not its default, and settings beside which it acts.
CONDITIONAL = {
    "threshold_percentile": (30.0, {}),
    "group_column": ("domain", {"group_size": 4}),
    "group_statistic": ("mean", {"threshold_strategy": "group"}),
    "oracle_beta": (0.1, {"threshold_strategy": "oracle"}),
    "reference_samples": (True, {"threshold_strategy": "oracle"}),
    "threshold_window": (8, {"threshold_strategy": "running"}),
    "weight_form": ("abs", {}),
    "normalize_weights": (True, {}),
    "confidence_scale": (2.0, {}),
    "desirable_weight": (2.0, {"loss_type": "kto"}),
    "undesirable_weight": (2.0, {"loss_type": "kto"}),
    "reference_update": ("epoch", {}),
    "precompute_ref_log_probs": (True, {}),
    "target_drift": (0.01, {}),
    "num_ref_draws": (2, {"precompute_ref_log_probs": True}),
    "csft_suffixes": (["a", "b"], {"loss_type": "csft"}),
    "anchor": (0.1, {"loss_type": "tgol_anchored"}),
    "value_baseline": (True, {"loss_type": "tgol_anchored"}),
    "nft_mix": (0.5, {"loss_type": "nft"}),
}
WITHOUT_EFFECT = {"threshold_percentile": {"threshold": 0.5}, "confidence_scale": {"weight_form": "abs"}}


def test_every_conditional_field_is_listed_here():
    assert set(CONDITIONAL) == set(_ACTS_WITH)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_a_field_without_effect_is_refused_and_taken_where_it_acts(make, name):
    value, beside = CONDITIONAL[name]
    assert getattr(make(**{name: value}, **beside), name) == value
    with_sft = ("weight_form", "normalize", "desirable", "undesirable", "reference", "precompute", "target")
    unweighted = {"loss_type": "sft"} if name.startswith(with_sft) and name != "reference_samples" else {}
    with pytest.raises(ValueError, match=f"^`{name}=.*` has no effect here: it acts only with"):
        make(**{name: value}, **WITHOUT_EFFECT.get(name, unweighted))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "good", "bad", "wanted"),
    [
        ("beta", [1e-9, 5000], [0, -1, NAN, INF], "larger than 0 and finite"),
        ("anchor", [0.25], [0, -1, NAN, INF], "larger than 0 and finite"),
        ("temperature", [1e-9, 10], [0, -0.001, NAN, INF], "larger than 0 and finite"),
        ("confidence_scale", [0, 100], [-0.1, NAN, INF], "at least 0 and finite"),
        ("threshold_percentile", [0, 50, 100], [-0.1, 100.1, NAN, INF], "at least 0 and at most 100"),
        ("caption_dropout", [0, 0.1, 1], [-0.1, 1.1, NAN, INF], "at least 0 and at most 1"),
        ("threshold", [-3.0, 0.0, 3], [NAN, INF, -INF], "finite"),
        ("resolution", [1, 512, None], [0, -512], "at least 1"),
        ("dataset_num_proc", [1, None], [0, -1], "at least 1"),
        ("max_threshold_samples", [2, None], [0, -1], "at least 1"),
        ("per_device_train_batch_size", [1], [0, -2], "at least 1"),
        ("per_device_eval_batch_size", [1], [0], "at least 1"),
        ("gradient_accumulation_steps", [1], [0, -1], "at least 1"),
        ("seed", [0, 2**32 - 1], [-1, 2**32], "at least 0 and below 2**32"),
        ("data_seed", [0, 2**32 - 1], [-1, 2**32], "at least 0 and below 2**32"),
        ("learning_rate", [0.0, 1.0], [-1e-4, NAN, INF], "at least 0 and finite"),
        ("weight_decay", [0.0], [-0.1, NAN, INF], "at least 0 and finite"),
        ("max_grad_norm", [0.0], [-1.0, NAN], "at least 0 and finite"),
        ("adam_beta1", [0.0, 0.9], [1.0, -0.1, NAN], "at least 0 and below 1"),
        ("adam_epsilon", [0.0], [-1e-8, NAN], "at least 0 and finite"),
        ("dataloader_num_workers", [0, 1], [-1], "at least 0 and finite"),
        ("max_steps", [-1, 1], [0, -2], "at least 1, or -1 for as many updates as `num_train_epochs` asks for"),
        ("num_train_epochs", [0.5], [0.0, -1.0, NAN], "larger than 0 and finite"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range(make, name, good, bad, wanted):
    for value in good:
        assert getattr(make(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError) as refused:
            make(**{name: value})
        assert str(refused.value).startswith(f"`{name}` must be {wanted}")
        assert str(refused.value).endswith(f", got {value}.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": __file__}, "is a file. Name another folder"),
        ({"output_dir": f"{__file__}/below"}, "is a file. Name another folder"),
        ({"remove_unused_columns": True}, "would drop prompt, image and score"),
        (
            {"full_finetuning": True, "adapter_name_or_path": "x"},
            "trains no adapter: leave out `adapter_name_or_path`",
        ),
        ({"reference": "initial"}, "means the adapter of `adapter_name_or_path`, which is not given"),
        (
            {"reference": "initial", "adapter_name_or_path": "x", "reference_update": "epoch"},
            "both set the reference: choose one",
        ),
        ({"threshold": 0.0, "threshold_update": "epoch"}, "A fixed `threshold` has nothing to estimate"),
        ({"model_init_kwargs": "bfloat16"}, "`model_init_kwargs` is not a JSON object: 'bfloat16'"),
        (
            {
                "threshold_update": "epoch",
                "dataloader_persistent_workers": True,
                "dataloader_num_workers": 1,
            },
            "`dataloader_persistent_workers=True` keeps the labels of the first epoch",
        ),
    ],
)
def test_a_combination_that_would_train_something_else_is_refused_and_each_half_alone_is_not(make, settings, message):
    with pytest.raises(ValueError) as refused:
        make(**settings)
    assert message in str(refused.value)
    if len(settings) == 1:
        return
    for left_out in settings:
        rest = {name: value for name, value in settings.items() if name != left_out}
        if left_out == "adapter_name_or_path" and rest.get("reference") == "initial":
            continue  # refused for a reason of its own, above
        if left_out == "dataloader_num_workers":
            continue  # torch, not this library, asks for a worker that persists
        make(**rest)


# ---- Flags and files ----


def test_flags_and_a_yaml_file_are_parsed_and_flags_win(parse):
    args = parse("--beta", "3.5", yaml="beta: 2.0\ntemperature: 0.01\nreference_update: epoch\nrandom_flip: true\n")
    assert (args.beta, args.temperature, args.reference_update, args.random_flip) == (3.5, 0.01, "epoch", True)


def test_a_flag_wins_over_the_file_wherever_it_stands(parse, tmp_path):
    (tmp_path / "first.yaml").write_text("beta: 2.0\ndataloader_drop_last: false\n")
    args = parse("--config", str(tmp_path / "first.yaml"), "--beta", "1.0", "--dataloader_drop_last", "true")
    assert (args.beta, args.dataloader_drop_last) == (1.0, True)


def test_yaml_numbers_without_a_point_which_yaml_reads_as_text_are_numbers(parse):
    args = parse(yaml="learning_rate: 3e-4\ntemperature: 1e-3\n")
    assert (args.learning_rate, args.temperature) == (3e-4, 1e-3)


def test_a_file_can_switch_off_what_is_on_by_default(parse):
    args = parse(yaml="dataloader_drop_last: false\nlogging_first_step: false\n")
    assert (args.dataloader_drop_last, args.logging_first_step) == (False, False)
    assert parse("--no_dataloader_drop_last").dataloader_drop_last is False


@pytest.mark.parametrize(
    "given",
    [
        {"flags": ("--model_init_kwargs", '{"dtype": "bfloat16", "variant": "fp16"}')},
        {"yaml": "model_init_kwargs:\n  dtype: bfloat16\n  variant: fp16\n"},
        {"yaml": """model_init_kwargs: '{"dtype": "bfloat16", "variant": "fp16"}'\n"""},
    ],
    ids=["flag", "yaml", "json in yaml"],
)
def test_model_init_kwargs_are_json_on_the_command_line_and_a_mapping_in_a_file(parse, given):
    args = parse(*given.get("flags", ()), yaml=given.get("yaml"))
    assert args.model_init_kwargs == {"dtype": "bfloat16", "variant": "fp16"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), 1e-4),
        (("--full_finetuning", "true"), 1e-5),
        (("--learning_rate", "2e-4", "--full_finetuning"), 2e-4),
    ],
)
def test_the_learning_rate_of_the_command_line(parse, flags, expected):
    assert parse(*flags).learning_rate == expected


def test_a_file_with_a_key_that_nothing_knows_is_refused_by_its_name(parse):
    with pytest.raises(ValueError, match="betta"):
        parse(yaml="betta: 2.0\n")


def test_a_choice_in_a_file_is_checked_although_argparse_checks_flags_alone(parse):
    with pytest.raises(ValueError, match="`reference_update` must be one of never, epoch, got 'always'"):
        parse(yaml="reference_update: always\n")
    with pytest.raises(SystemExit):
        parse("--reference_update", "always")


def test_a_configuration_survives_json(make):
    args = make(model_init_kwargs={"dtype": "bfloat16"}, threshold=0.5)
    again = json.loads(args.to_json_string())
    assert (again["threshold"], again["model_init_kwargs"]) == (0.5, {"dtype": "bfloat16"})


# ---- Number of updates ----


def updates(args, rows):
    """The number of updates that Trainer plans for a dataset of so many rows; nothing is trained."""
    data = [{"x": torch.zeros(1)} for _ in range(rows)]
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=data)
    plan = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    return SimpleNamespace(
        epochs=plan[0], per_epoch=plan[1], rows_per_update=plan[4], total=plan[6], args=args, trainer=trainer
    )


@pytest.mark.parametrize(("batch", "accumulation"), [(128, 1), (64, 2), (32, 4)])
def test_10000_rows_at_a_batch_of_128_are_78_updates(make, batch, accumulation):
    """10,000 = 78·128 + 16: the paper's one pass, its last 16 rows left out."""
    args = make(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    plan = updates(args, 10_000)
    assert (plan.total, plan.rows_per_update, plan.epochs) == (78, 128, 1)


def test_without_drop_last_they_are_79(make):
    assert updates(make(per_device_train_batch_size=128, dataloader_drop_last=False), 10_000).total == 79


def test_writing_the_arguments_takes_dtypes_of_any_form_and_leaves_them_as_they_were(tmp_path):
    import torch

    given = {"dtype": {"default": torch.bfloat16, "vae": "float32"}, "variant": "fp16"}
    args = TGOLConfig(output_dir=str(tmp_path), model_init_kwargs=given)
    written = json.loads(args.to_json_string())["model_init_kwargs"]
    assert written == {"dtype": {"default": "bfloat16", "vae": "float32"}, "variant": "fp16"}
    assert given["dtype"]["default"] is torch.bfloat16
    plain = TGOLConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": torch.float16})
    assert plain.to_dict()["model_init_kwargs"] == {"dtype": "float16"}
    assert plain.pipeline_kwargs == {"dtype": torch.float16}
