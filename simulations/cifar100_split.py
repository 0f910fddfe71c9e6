"""Clients train on disjoint parts of CIFAR-100 through Flower; the server merges their models.

Compares permutation-aligned merging (`ReBasinStrategy`) with naive averaging (`FedAvg`) of the
same client models. Controls: each client, the best client without its label prior, ensembles of
the clients, and one model trained on all the data.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace

import experiment.quiet  # noqa: F401
from experiment.cli import Parser, add_shared_options, check_seeds, check_writable, run_program
from experiment.data import DATASET_CHOICES, Dataset, load_dataset
from experiment.errors import UserError
from experiment.methods import chosen_methods
from experiment.models import DEFAULT_WIDTHS
from experiment.plot import draw_interpolation
from experiment.presets import DEFAULT_NORMS, LEARNING_RATES, PRESETS, Preset
from experiment.results import config_of, summarise, versions, write_json
from experiment.seeding import client_indices, shared_model
from experiment.settings import Settings
from experiment.simulate import simulate
from experiment.tables import print_rounds, print_table, wide
from rich.console import Console


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    _add_experiment_options(parser)
    _add_training_options(parser)
    add_shared_options(parser, data="cifar-100-python", out="results", methods="none")
    return parser.parse_args(argv)


def _add_experiment_options(parser: Parser) -> None:
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
        help="auto: CIFAR-100 if it can be found or downloaded, otherwise scikit-learn's digits",
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
        help="whether each client starts from its own random weights (default: different)",
    )
    add(
        "--rounds",
        type=int,
        default=1,
        metavar="R",
        help="1: one shot; more: ordinary rounds that start from the merged model (default: 1)",
    )
    add(
        "--limit",
        type=int,
        default=0,
        metavar="N",
        help="maximum number of training images per client (default: 0, all)",
    )
    add(
        "--no-oracle",
        dest="oracle",
        action="store_false",
        help="skip the model that is trained on all the data",
    )


def _add_training_options(parser: Parser) -> None:
    """Add the options whose defaults depend on the preset."""
    add = parser.add_argument
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


def check_numbers(options: argparse.Namespace) -> None:
    """Raise `UserError` for a number that is out of range."""
    least = {"clients": 2, "rounds": 1, "epochs": 1, "round_epochs": 1, "width": 1, "limit": 0}
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and value < minimum:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value} is too small: it must be at least {minimum}")
    check_seeds(options.seeds)


def choose_preset(options: argparse.Namespace, dataset: Dataset) -> Preset:
    """Return the preset with the user's choices in place of its own."""
    original = preset = PRESETS[options.preset, dataset.name]
    if options.model not in (None, original.model):
        # The preset's width and norm suit its own model only.
        preset = replace(
            preset,
            model=options.model,
            norm=DEFAULT_NORMS[options.model],
            width=DEFAULT_WIDTHS[options.model],
        )
    names = ("epochs", "round_epochs", "norm", "width")
    chosen = {name: getattr(options, name) for name in names}
    preset = replace(preset, **{name: value for name, value in chosen.items() if value is not None})
    if (preset.model, preset.norm) != (original.model, original.norm):
        rate = LEARNING_RATES[preset.norm]
        recipe = replace(original.recipe, learning_rate=rate, round_learning_rate=rate / 10)
        preset = replace(preset, recipe=recipe)
    return preset


def choose(options: argparse.Namespace, dataset: Dataset) -> Settings:
    """Complete the settings; raise `UserError` if the model or the split is impossible."""
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
        **vars(choose_preset(options, dataset)),
    )
    for seed in settings.seeds:
        client_indices(settings, dataset, seed)
    shared_model(settings, dataset, settings.seeds[0])
    return settings


def run(argv: list[str]) -> None:
    """Run the experiment; raise `UserError` for invalid input before anything is written."""
    console = Console()
    options = parse(argv)
    check_numbers(options)
    dataset = load_dataset(options.dataset, options.data_dir)
    if dataset.note:
        # Without markup, because the reason may contain brackets.
        console.print(dataset.note, style="bold yellow", markup=False, soft_wrap=True)
    settings = choose(options, dataset)
    check_writable(options.out)
    console.print(
        f"{dataset.name}, {len(dataset.train_labels)} training images; {settings.clients} clients, "
        f"split {settings.split}, {settings.init} init; {settings.model} {settings.width}, "
        f"norm {settings.norm}; {settings.epochs} epochs; seeds {list(settings.seeds)}",
        soft_wrap=True,
    )
    # Before the long simulation, so that they describe the code that runs.
    environment = versions()
    runs = simulate(settings, dataset, console, options.out / "flower.log")
    results = {
        "dataset": dataset.name,
        "note": dataset.note,
        "command": shlex.join(["python", "simulations/cifar100_split.py", *argv]),
        "versions": environment,
        "config": config_of(settings) | {"preset": options.preset},
        "runs": runs,
        "summary": summarise(runs),
    }
    write_json(options.out / "results.json", results)
    draw_interpolation(options.out / "interpolation.png", results)
    print_table(wide(console), results)
    if settings.rounds > 1:
        print_rounds(wide(console), runs)
    console.print(f"wrote {options.out}/results.json, interpolation.png, flower.log")


def main() -> None:
    """Run as a program."""
    run_program(run)


if __name__ == "__main__":
    main()
