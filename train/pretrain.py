"""Pretrain a decoder: python train/pretrain.py +experiment=quickstart

Prepares the data if that has not been done, trains, and leaves everything in outputs/<name>.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import hydra
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from data.config import command_line
from data.prepare import prepare
from data.stages import fingerprint
from train.checkpoint import check_resume, check_same_data
from train.config import check_config
from train.engine import start_process_group
from train.loop import train


@hydra.main(version_base=None, config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    try:
        run = check_config(OmegaConf.to_container(config, resolve=True))
        check_resume(run.folder, run.train.resume, run.raw)
        device, rank, world_size = start_process_group(run.device)
        run.accumulation(world_size)
        data_path = prepare(run.raw["data"], run.raw["tokenizer"], run.output_dir / "data")
        check_same_data(run.folder, fingerprint(data_path))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    train(run, data_path, device, rank, world_size)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
