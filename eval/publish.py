"""Results as a view in W&B, under the settings of the run that was scored."""

from __future__ import annotations

import os
from pathlib import Path

from eval.records import run_folder
from model.checkpoint import Checkpoint


def publish(checkpoint: Checkpoint, name: str, metrics: dict, image: Path | None = None) -> None:
    """Log numbers and a picture to a W&B run "<run>/<name>" in the group <run>.

    Mode and project are those of the training run (config group log); a run without that group, a
    missing server or key never stops an evaluation: the files have everything.
    """
    log = checkpoint.config.get("log", {"wandb": "disabled"})
    mode = log["wandb"]
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return
    try:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        folder = run_folder(checkpoint)
        run = wandb.init(
            project=log["wandb_project"], name=f"{folder.name}/{name}", group=folder.name,
            job_type="eval", dir=str(folder), mode=mode,
        )  # fmt: skip
        images = {name: wandb.Image(str(image))} if image else {}
        run.log(metrics | images, step=checkpoint.step)
        run.finish()
    except Exception as error:
        print(f"W&B took no results ({error}); the files have them.", flush=True)
