"""Five clients train on MNIST once through Flower; the server merges their models.

Four settings: small clients (5,000 images in all, each client from its own initial weights) with
IID, Dirichlet 0.5 and Dirichlet 0.1 splits; and five full-size models, each trained on all of
MNIST, as in the MergeMany experiment of Git Re-Basin.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from typing import Any

import experiment.quiet  # noqa: F401
from experiment.cli import Parser, add_shared_options, check_seeds, check_writable, run_program
from experiment.data import load_mnist
from experiment.methods import chosen_methods
from experiment.results import config_of, summarise, versions, write_json
from experiment.settings import Settings
from experiment.simulate import simulate
from experiment.tables import print_table, wide
from experiment.training import Recipe
from rich.console import Console

SPLITS = {"iid": "iid", "dirichlet-0.5": "dirichlet:0.5", "dirichlet-0.1": "dirichlet:0.1"}
MERGE_MANY = "merge-many-5"
EPOCHS = 30
SMALL = Recipe(3e-3, 3e-3, batch_size=50, flip=False)
FULL = Recipe(1e-3, 1e-3, batch_size=500, flip=False)


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=[*SPLITS, MERGE_MANY],
        default=[*SPLITS, MERGE_MANY],
        help="settings to run (default: all)",
    )
    add_shared_options(parser, data="MNIST", out="results-mnist", methods="all")
    return parser.parse_args(argv)


def settings_of(name: str, options: argparse.Namespace) -> Settings:
    """Return the experiment of a named setting."""
    small = Settings(
        dataset="mnist",
        data_dir=options.data_dir.absolute(),
        split=SPLITS.get(name, "all"),
        clients=5,
        init="different",
        rounds=1,
        epochs=EPOCHS,
        round_epochs=1,
        model="mlp2",
        width=128,
        norm="none",
        seeds=tuple(options.seeds),
        images=5000,
        limit=0,
        oracle=False,
        methods=chosen_methods(options.methods),
        recipe=SMALL,
        curve_images=1000,
    )
    if name != MERGE_MANY:
        return small
    return replace(small, model="mlp", width=512, images=0, recipe=FULL, statistics_images=20_000)


def run(argv: list[str]) -> None:
    """Run all settings; raise `UserError` for invalid input before anything is written."""
    console = Console()
    options = parse(argv)
    check_seeds(options.seeds)
    experiments = {name: settings_of(name, options) for name in options.settings}
    dataset = load_mnist(options.data_dir)
    check_writable(options.out)
    environment = versions()
    runs: list[dict[str, Any]] = []
    summary = {}
    for name, settings in experiments.items():
        console.print(f"{name}: {settings.model} {settings.width}, {settings.epochs} epochs")
        found = simulate(settings, dataset, console, options.out / f"flower-{name}.log")
        runs += [{"setting": name, **each} for each in found]
        summary[name] = summarise(found)
        table = {"config": config_of(settings), "summary": summary[name]}
        print_table(wide(console), {"dataset": f"mnist {name}", "note": "", **table})
    results = {
        "dataset": "mnist",
        "note": "",
        "command": shlex.join(["python", "simulations/one_shot_mnist.py", *argv]),
        "versions": environment,
        "config": config_of(experiments[options.settings[0]]),
        "runs": runs,
        "summary": summary,
    }
    write_json(options.out / "results.json", results)
    console.print(f"wrote {options.out}/results.json, flower-SETTING.log")


def main() -> None:
    """Run as a program."""
    run_program(run)


if __name__ == "__main__":
    main()
