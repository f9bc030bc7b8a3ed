"""Any task of EleutherAI's lm-evaluation-harness on a checkpoint.

    python eval/harness.py checkpoint=outputs/quickstart tasks=[hellaswag,arc_easy]

Needs pip install lm_eval, which is not in requirements.txt. Most tasks download their data; tasks of
your own are YAML files in include_path and may read local JSON (the harness' guide to new tasks).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository root

import json
from dataclasses import asdict, dataclass

import hydra
from omegaconf import DictConfig

from data.config import command_line, from_config, resolve_path
from data.tokenizer import end_of_text_id
from eval.entry import open_checkpoint, stoppable
from eval.lm import DecoderLM
from eval.publish import publish
from eval.records import run_folder
from model.checkpoint import Checkpoint


@dataclass(frozen=True)
class HarnessSettings:
    """conf/harness.yaml"""

    tasks: list[str]
    num_fewshot: int | None
    limit: int | None
    max_length: int | None
    document_start: bool
    include_path: str | None
    metadata: dict | None


def run_harness(checkpoint: Checkpoint, settings: HarnessSettings) -> dict:
    """lm_eval's results of a checkpoint; also in eval/harness/<checkpoint name>.json of its run.

    Raises ValueError with one sentence if lm_eval is not installed or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from eval.harness_model import HarnessLM
    except ModuleNotFoundError as error:
        raise ValueError(
            f"This evaluation needs a package that is not installed ({error.name}): "
            "python -m pip install lm_eval"
        ) from None
    include = str(resolve_path(settings.include_path)) if settings.include_path else None
    manager = TaskManager(include_path=include, metadata=settings.metadata)
    unknown = [task for task in settings.tasks if task not in manager.all_tasks]
    if unknown or not settings.tasks:
        raise ValueError(
            f"tasks={settings.tasks}: lm_eval has no task {', '.join(unknown) or 'to run'}; "
            "`lm_eval ls tasks` lists them, and include_path=folder adds your own."
        )
    max_length = settings.max_length or checkpoint.config["train"]["seq_len"]
    lm = DecoderLM(checkpoint.model, {end_of_text_id(checkpoint.tokenizer)})
    results = simple_evaluate(
        model=HarnessLM(lm, checkpoint.tokenizer, max_length, settings.document_start),
        tasks=settings.tasks, num_fewshot=settings.num_fewshot, limit=settings.limit,
        task_manager=manager, bootstrap_iters=0,
    )  # fmt: skip
    kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples")}
    kept |= {"step": checkpoint.step, "settings": asdict(settings)}
    path = run_folder(checkpoint) / "eval" / "harness" / f"{checkpoint.path.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1, default=str))
    return kept


def scores(results: dict) -> dict[str, float]:
    """task/metric -> value, without lm_eval's standard errors and names of filters."""
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, row in results["results"].items()
        for metric, value in row.items()
        if isinstance(value, int | float) and "stderr" not in metric and "," in metric
    }


@hydra.main(version_base=None, config_path="../conf", config_name="harness")
def main(config: DictConfig) -> None:
    try:
        checkpoint, config = open_checkpoint(config)
        settings = from_config(HarnessSettings, config)
        print(f"harness     {checkpoint.path}")
        results = scores(run_harness(checkpoint, settings))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    for name, value in results.items():
        print(f"{name:<40}{value:>10.4f}")
    publish(checkpoint, "harness", {f"harness/{name}": value for name, value in results.items()})
    print(f"file        {run_folder(checkpoint) / 'eval' / 'harness' / checkpoint.path.name}.json")


if __name__ == "__main__":
    sys.argv[1:] = command_line(sys.argv[1:])
    with stoppable("the same command begins again"):
        main()
