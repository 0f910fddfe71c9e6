"""Five clients train on MNIST once, apart, through Flower; their models are merged.

Four settings: small clients (5,000 images in all) with IID, Dirichlet 0.5 and Dirichlet 0.1 splits,
each client from initial weights of its own; and five full-size models, each trained on all of
MNIST, as in the MergeMany experiment of Git Re-Basin.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import experiment.quiet  # noqa: F401
from experiment.cli import Parser, check_seeds, check_writable, run_program
from experiment.data import load_mnist
from experiment.methods import METHODS, chosen_methods
from experiment.report import print_table, summarise, versions, wide, write_json
from experiment.settings import Settings
from experiment.simulate import simulate
from experiment.training import Recipe
from rich.console import Console

SETTINGS = {"iid": "iid", "dirichlet-0.5": "dirichlet:0.5", "dirichlet-0.1": "dirichlet:0.1"}
MERGE_MANY = "merge-many-5"
SMALL = Recipe(3e-3, 3e-3, batch_size=50, flip=False)
FULL = Recipe(1e-3, 1e-3, batch_size=500, flip=False)


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), metavar="DIR",
        help="folder of MNIST; downloaded if it is not there (default: data)")  # fmt: skip
    add("--out", type=Path, default=Path("results-mnist"), metavar="DIR",
        help="folder for results.json and flower.log (default: results-mnist)")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0], metavar="S",
        help="one repetition each (default: 0)")  # fmt: skip
    add("--settings", nargs="+", choices=[*SETTINGS, MERGE_MANY], default=[*SETTINGS, MERGE_MANY],
        help="which of the settings (default: all)")  # fmt: skip
    add("--methods", nargs="+", default=["all"], metavar="M",
        help="rows of the table beside naive averaging and rebasin: "
        f"{', '.join(METHODS)} (default: all)")  # fmt: skip
    return parser.parse_args(argv)


def settings_of(name: str, options: argparse.Namespace) -> Settings:
    """Return the experiment of a setting."""
    small = Settings(
        dataset="mnist",
        data_dir=options.data_dir.absolute(),
        split=SETTINGS.get(name, "all"),
        clients=5,
        init="different",
        rounds=1,
        epochs=30,
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
    return replace(
        small, epochs=30, model="mlp", width=512, images=0, recipe=FULL, statistics_images=20_000
    )


def run(argv: list[str]) -> None:
    """Do everything; raise `UserError` for a wrong input before anything is written."""
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
        log_file = options.out / f"flower-{name}.log"
        found = [
            {"setting": name, **each} for each in simulate(settings, dataset, console, log_file)
        ]
        runs += found
        summary[name] = summarise(found)
        config = asdict(settings)
        print_table(
            wide(console),
            {"dataset": f"mnist {name}", "note": "", "config": config, "summary": summary[name]},
        )
    config = asdict(replace(experiments[options.settings[0]], data_dir=Path()))
    del config["data_dir"]
    write_json(
        options.out / "results.json",
        {
            "dataset": "mnist",
            "note": "",
            "command": shlex.join(["python", "simulations/one_shot_mnist.py", *argv]),
            "versions": environment,
            "config": config,
            "runs": runs,
            "summary": summary,
        },
    )
    console.print(f"written: {options.out}/results.json, flower-SETTING.log")


def main() -> None:
    """Run as a program."""
    run_program(run)


if __name__ == "__main__":
    main()
