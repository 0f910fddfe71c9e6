"""One seed from start to end: federation, controls, measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from experiment.data import Dataset
from experiment.evaluation import curve, debiased, ensemble, measure
from experiment.progress import progress_writer
from experiment.recorder import ModelState
from experiment.seeding import client_parts, derived_seed, shared_model
from experiment.server import run_federation
from experiment.settings import Settings
from experiment.splits import evaluation_parts
from experiment.training import predict, train
from fl_rebasin.metrics import LAMBDAS


def compare(
    settings: Settings, dataset: Dataset, grid: Grid, seed: int, progress: Path
) -> dict[str, Any]:
    """Run and measure everything for one seed.

    Args:
        settings: The experiment.
        dataset: Its data.
        grid: Flower's grid.
        seed: The seed.
        progress: Folder for the state of the progress bars.

    Returns:
        One entry of `runs` in `results.json`; `curves` holds the interpolations.
    """
    parts = evaluation_parts(settings.split, dataset.num_classes)
    model = shared_model(settings, dataset, seed)

    def logits_of(state: ModelState) -> Tensor:
        model.cpu().load_state_dict(state)
        return predict(model, dataset, dataset.test_images)

    def measure_state(state: ModelState) -> dict[str, Any]:
        return measure(logits_of(state), dataset, parts)

    federation = run_federation(settings, dataset, grid, seed, measure_state)

    indices = [trained for trained, _ in client_parts(settings, dataset, seed)]
    counts = [
        torch.bincount(dataset.train_labels[index], minlength=dataset.num_classes)
        for index in map(torch.from_numpy, indices)
    ]
    logits = [logits_of(state) for state in federation.clients]
    methods = {f"client-{i}": measure(each, dataset, parts) for i, each in enumerate(logits)}
    # The strongest control: the corrected client that is best on the test set.
    methods["best-client-debiased"] = max(
        (measure(debiased(*pair), dataset, parts) for pair in zip(logits, counts, strict=True)),
        key=lambda row: row["joint_accuracy"],
    )
    last = federation.rounds[-1]
    for name, state in federation.merged.items():
        # What goes on from round to round has been measured already.
        known = {key: value for key, value in last.get(name, {}).items() if key != "train"}
        methods[name] = known or measure_state(state)
    probable, mean = ensemble(logits, [len(index) for index in indices])
    methods["ensemble-prob"] = measure(probable, dataset, parts)
    methods["ensemble-logit"] = measure(mean, dataset, parts)
    if settings.oracle:
        index = torch.cat([torch.from_numpy(part) for part in indices])
        oracle = shared_model(settings, dataset, seed)
        train(
            oracle,
            dataset,
            dataset.train_images[index],
            dataset.train_labels[index],
            recipe=settings.recipe,
            first_round=True,
            epochs=settings.epochs,
            seed=derived_seed(seed, "train oracle"),
            on_step=progress_writer(progress, f"seed {seed} one model on all the data"),
        )
        methods["oracle"] = measure(predict(oracle, dataset, dataset.test_images), dataset, parts)

    lines = {"naive": federation.clients[:2], "rebasin": federation.aligned[:2]}
    write = progress_writer(progress, f"seed {seed} interpolation")
    curves: dict[str, Any] = {}
    # Without BatchNorm there is nothing to re-estimate, and the second curve is the first.
    variants = (False, True) if settings.norm == "batch" else (False,)
    total, done = len(lines) * len(variants) * LAMBDAS, 0

    def on_point() -> None:
        nonlocal done
        done += 1
        write(done, total)

    for name, (left, right) in lines.items():
        for recalibrate in variants:
            curves[name + ("+bn" if recalibrate else "")] = curve(
                model,
                dataset,
                left,
                right,
                recalibrate=recalibrate,
                images=settings.curve_images,
                seed=derived_seed(seed, "curve"),
                on_point=on_point,
            )
        curves.setdefault(f"{name}+bn", curves[name])
    for name, measured in curves.items():
        methods[name]["loss_barrier"] = measured["loss"]
        methods[name]["accuracy_barrier"] = measured["accuracy"]
    return {
        "seed": seed,
        "images": [len(index) for index in indices],
        "methods": methods,
        "barrier": {
            name: {"loss": measured["loss"], "accuracy": measured["accuracy"]}
            for name, measured in curves.items()
        },
        "rounds": federation.rounds,
        "curves": curves,
    }
