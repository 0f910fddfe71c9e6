"""The ServerApp: FedAvg of aligned models, evaluated on the server."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result

from fl_rebasin.flower import ReBasinStrategy
from rebasin_digits.task import PIXELS, build_model, evaluate, test_part

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; write `metrics.json` if `out` is set."""
    config: dict[str, Any] = dict(context.run_config)
    torch.manual_seed(config["seed"])
    model = build_model(config["hidden-units"])
    held_out = test_part(config["seed"])

    def evaluate_globally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({**evaluate(model, held_out)})

    strategy = ReBasinStrategy(
        FedAvg(
            fraction_train=config["fraction-train"],
            fraction_evaluate=0.0,
            min_train_nodes=config["min-nodes"],
            min_available_nodes=config["min-nodes"],
        ),
        model=build_model(config["hidden-units"]),
        example_inputs=torch.zeros(2, PIXELS),
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate_globally,
    )
    if config["out"]:
        write_metrics(Path(config["out"]), result)


def write_metrics(folder: Path, result: Result) -> None:
    """Write the metrics of all rounds to `metrics.json`, completely or not at all."""
    metrics = {
        "evaluate": {n: dict(record) for n, record in result.evaluate_metrics_serverapp.items()},
        "train": {n: dict(record) for n, record in result.train_metrics_clientapp.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"metrics.json.{os.getpid()}"
    partial.write_text(json.dumps(metrics, indent=2) + "\n")
    partial.replace(folder / "metrics.json")
