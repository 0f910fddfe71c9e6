"""Clients train on disjoint parts of CIFAR-100 through Flower; their models are merged.

Compares permutation-aligned merging (`ReBasinStrategy`) with naive averaging (`FedAvg`) on the
very same client models, beside the controls: each client, the better client with its label prior
taken out, ensembles, and one model on all the data.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import experiment.quiet  # noqa: F401
from experiment.cli import Parser, check_seeds, check_writable, run_program
from experiment.data import DATASET_CHOICES, Dataset, load_dataset
from experiment.errors import UserError
from experiment.methods import METHODS, chosen_methods
from experiment.models import DEFAULT_WIDTHS
from experiment.presets import DEFAULT_NORMS, LEARNING_RATES, PRESETS
from experiment.report import (
    draw_interpolation,
    print_rounds,
    print_table,
    summarise,
    versions,
    wide,
    write_json,
)
from experiment.seeding import client_indices, shared_model
from experiment.settings import Settings
from experiment.simulate import simulate
from rich.console import Console


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--preset",
        choices=["quick", "paper"],
        default="quick",
        help="quick: a small conv net, minutes on two cores; paper: ResNet-20 with LayerNorm, "
        "wide, for a GPU (default: quick)",
    )
    add(
        "--dataset",
        choices=DATASET_CHOICES,
        default="auto",
        help="auto: CIFAR-100 from --data-dir, else downloaded, else scikit-learn's digits",
    )
    add(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of cifar-100-python (default: data)",
    )
    add(
        "--out",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="folder for results.json, interpolation.png, flower.log (default: results)",
    )
    add(
        "--split",
        default="20-80",
        help="20-80, 50-50 (class-disjoint), iid or dirichlet:ALPHA (default: 20-80)",
    )
    add("--clients", type=int, default=2, metavar="N", help="number of clients (default: 2)")
    add(
        "--init",
        choices=["different", "shared"],
        default="different",
        help="whether clients start from weights of their own (default: different)",
    )
    add(
        "--rounds",
        type=int,
        default=1,
        metavar="R",
        help="1: one shot; more: ordinary rounds from the merged model (default: 1)",
    )
    add("--epochs", type=int, metavar="E", help="local epochs of the first round")
    add("--round-epochs", type=int, metavar="E", help="local epochs of each later round")
    add("--model", choices=list(DEFAULT_WIDTHS), help="architecture")
    add("--norm", choices=["batch", "layer", "group", "none"], help="normalisation layers")
    add(
        "--width",
        type=int,
        metavar="W",
        help="channels of the first stage (conv), multiplier (resnet20), hidden units (mlp)",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="S",
        help="one repetition each (default: 0)",
    )
    add(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="at most N training images a client (default: 0, all)",
    )
    add(
        "--methods",
        nargs="+",
        default=[],
        metavar="M",
        help="rows of the table beside naive averaging and rebasin: all, or some of "
        f"{', '.join(METHODS)} (default: none)",
    )
    add(
        "--no-oracle",
        dest="oracle",
        action="store_false",
        help="do not train one model on all the data",
    )
    return parser.parse_args(argv)  # fmt: skip


def check_numbers(options: argparse.Namespace) -> None:
    """Raise `UserError` for a number that makes no sense."""
    for name, least in (
        ("clients", 2), ("rounds", 1), ("epochs", 1), ("round_epochs", 1), ("width", 1),
        ("limit", 0),
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} is too small: give at least {least}")
    check_seeds(options.seeds)


def choose(options: argparse.Namespace, dataset: Dataset) -> Settings:
    """Fill in what the user left to the preset, and check that model and split are possible."""
    own = preset = PRESETS[options.preset, dataset.name]
    if options.model not in (None, own.model):
        # A preset's width and norm are meant for its own model.
        preset = replace(
            preset, model=options.model, norm=DEFAULT_NORMS[options.model],
            width=DEFAULT_WIDTHS[options.model],
        )  # fmt: skip
    said = {
        name: getattr(options, name)
        for name in ("epochs", "round_epochs", "norm", "width")
        if getattr(options, name) is not None
    }
    preset = replace(preset, **said)
    if (preset.model, preset.norm) != (own.model, own.norm):
        rate = LEARNING_RATES[preset.norm]
        recipe = replace(own.recipe, learning_rate=rate, round_learning_rate=rate / 10)
        preset = replace(preset, recipe=recipe)
    settings = Settings(
        dataset=dataset.name,
        data_dir=options.data_dir.absolute(),
        split=options.split,
        clients=options.clients,
        init=options.init,
        rounds=options.rounds,
        seeds=tuple(options.seeds),
        images=0,
        limit=options.limit,
        oracle=options.oracle,
        methods=chosen_methods(options.methods),
        **vars(preset),
    )
    for seed in settings.seeds:
        client_indices(settings, dataset, seed)
    shared_model(settings, dataset, settings.seeds[0])
    return settings


def run(argv: list[str]) -> None:
    """Do everything; raise `UserError` for a wrong input before anything is written."""
    console = Console()
    options = parse(argv)
    check_numbers(options)
    dataset = load_dataset(options.dataset, options.data_dir)
    if dataset.note:
        # Not as markup: the reason may hold brackets.
        console.print(dataset.note, style="bold yellow", markup=False, soft_wrap=True)
    settings = choose(options, dataset)
    check_writable(options.out)
    console.print(
        f"{dataset.name}, {len(dataset.train_labels)} training images; {settings.clients} clients, "
        f"split {settings.split}, {settings.init} init; {settings.model} {settings.width}, "
        f"{settings.norm} norm; {settings.epochs} epochs; seeds {list(settings.seeds)}",
        soft_wrap=True,
    )
    environment = versions()
    runs = simulate(settings, dataset, console, options.out / "flower.log")
    config = asdict(replace(settings, data_dir=Path())) | {"preset": options.preset}
    del config["data_dir"]
    results = {
        "dataset": dataset.name,
        "note": dataset.note,
        "command": shlex.join(["python", "simulations/cifar100_split.py", *argv]),
        "versions": environment,
        "config": config,
        "runs": runs,
        "summary": summarise(runs),
    }
    write_json(options.out / "results.json", results)
    draw_interpolation(options.out / "interpolation.png", results)
    print_table(wide(console), results)
    if settings.rounds > 1:
        print_rounds(wide(console), runs)
    console.print(f"written: {options.out}/results.json, interpolation.png, flower.log")


def main() -> None:
    """Run as a program."""
    run_program(run)


if __name__ == "__main__":
    main()
