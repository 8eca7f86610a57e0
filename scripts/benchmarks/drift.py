"""
Run the drift alarm on healthy and on over-trained runs of the shapes model.

    python scripts/benchmarks/drift.py --output_dir drift

Every run trains background darkness on the same images, with a seed of its own for training and for what is sampled.
It prints what was found at each sampling. Over-trained means 30 times the learning rate.
"""

import argparse
import math
import tempfile
from pathlib import Path

RATES = {"healthy": 2e-4, "over-trained": 6e-3}
SAMPLINGS = 3


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, help="folder of the runs (default: a temporary one)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=60, help="updates of 16 images (default: %(default)s)")
    parser.add_argument("--num_images", type=int, default=360, help="training images (default: %(default)s)")
    args = parser.parse_args()
    from peft import LoraConfig

    from tgol_trainer import TGOLConfig, TGOLTrainer
    from tgol_trainer.cli.quickstart import TARGET_MODULES, Quickstart
    from tgol_trainer.sampling import DriftAlarm, SampleCallback, SampleSettings
    from tgol_trainer.shapes import PROMPTS, background_darkness, colour_faithfulness, load_pipeline

    folder = args.output_dir or Path(tempfile.mkdtemp())
    dataset = Quickstart(folder, num_images=args.num_images).sample_dataset(load_pipeline())
    for seed in range(args.seeds):
        for kind, rate in RATES.items():
            sampler = SampleCallback(
                list(PROMPTS),
                [background_darkness, colour_faithfulness],
                steps=math.ceil(args.updates / SAMPLINGS),
                seeds=(100 + seed,),
                settings=SampleSettings(guidance_scale=1.5, num_inference_steps=15),
            )
            config = TGOLConfig(
                output_dir=str(folder / f"{kind}-{seed}"),
                score_column="background_darkness",
                per_device_train_batch_size=16,
                per_device_eval_batch_size=24,
                max_steps=args.updates,
                learning_rate=rate,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                seed=seed,
            )
            lora = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=TARGET_MODULES)
            trainer = TGOLTrainer(load_pipeline(), config, dataset, peft_config=lora, callbacks=[sampler])
            trainer.train()
            for line in trainer.state.log_history:
                drift = {key: value for key, value in line.items() if key.startswith("drift/")}
                if drift and line["step"]:
                    shown = ", ".join(f"{key.removeprefix('drift/')} {value:.2f}" for key, value in drift.items())
                    found = ", ".join(DriftAlarm().findings(drift)) or "nothing"
                    print(f"{kind}, seed {seed}, step {line['step']}: {shown}. Found: {found}.", flush=True)


if __name__ == "__main__":
    main()
