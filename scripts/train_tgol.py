"""
Train an adapter with threshold-guided optimization; the same program as `tgol train`.

One GPU, flags:

    python scripts/train_tgol.py \
        --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --dataset_name path/to/folder_with_metadata_jsonl \
        --output_dir sd15-tgol

Several GPUs, settings from a file:

    accelerate launch scripts/train_tgol.py --config scripts/configs/shapes.yaml

Two processes on a CPU (`accelerate launch --cpu --num_processes 2` would start one):

    torchrun --nproc_per_node 2 scripts/train_tgol.py --config scripts/configs/shapes.yaml --use_cpu true
"""

import sys

if __name__ == "__main__":
    from tgol_trainer.cli.train import main

    sys.exit(main())
