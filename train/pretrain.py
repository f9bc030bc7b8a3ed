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
from train.faults import SpikeError, naming_lost_ranks
from train.loop import train


def pretrain(raw: dict) -> int:
    """One run from its resolved config; returns the process's exit status.

    0 is the end of the run; 128 + n, as a shell has it, a stop by signal n; 1 an error, which is
    told in one sentence.
    """
    try:
        run = check_config(raw)
        check_resume(run)
        ranks = start_process_group(run.device, run.parallel.sequence)
        run.accumulation(ranks.world_size)
        data_path = prepare(run.raw["data"], run.raw["tokenizer"], run.output_dir / "data")
        check_same_data(run.folder, fingerprint(data_path))
        with naming_lost_ranks():
            stopped = train(run, data_path, ranks)
    except (ValueError, OSError, SpikeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    dist.destroy_process_group()
    return 128 + stopped if stopped else 0


@hydra.main(version_base=None, config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    sys.exit(pretrain(OmegaConf.to_container(config, resolve=True)))


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    main()
