"""Clients that are aligned in groups: is a merge stuck where it began, and does the order matter?

    python benchmarks/clusters.py --data-dir DIR [--orders N]

The clients of a group go on for an epoch from one MNIST net (3 x 512), each with data of its own;
the nets of the groups have nothing in common. The table gives the test accuracy and the loss of
the merged model, the mean cosine of the clients to it, and for N random orders of the clients how
far that differs (largest minus smallest, as a share). Results go to `results/clusters.json` and
`results/clusters.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from machine import versions
from nets import NETS, State, images_of, state_of
from torch import Tensor
from torch.nn import functional as F

from fl_rebasin import derive_spec, merge_many
from fl_rebasin.matching.many import Method
from fl_rebasin.state_dicts import average

NAME = "MLP 3x512"
GROUPS = ((2, 2), (3, 2), (2, 2, 2))
IMAGES = 10_000


def go_on(state: State, images: Tensor, labels: Tensor, seed: int) -> State:
    """Return a net after an epoch more on some of the images."""
    generator = torch.Generator().manual_seed(seed)
    model = NETS[NAME].build()
    model.load_state_dict(state)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for batch in torch.randperm(len(images), generator=generator)[:IMAGES].split(500):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def judge(state: State, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return accuracy and loss of a net."""
    model = NETS[NAME].build()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(images)
    right = float((logits.argmax(1) == labels).float().mean())
    return right, float(F.cross_entropy(logits, labels))


def measure(data: Path, orders: int) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    images, labels = images_of("mnist", data, 60_000)
    seen = images_of("mnist", data, 10_000, train=False)
    spec = derive_spec(NETS[NAME].build(), torch.zeros(NETS[NAME].shape))
    nets = [state_of(NAME, seed, data) for seed in range(max(map(len, GROUPS)))]
    rows = []
    for sizes in GROUPS:
        clients = [
            go_on(net, images, labels, 10 * place + other)
            for place, (net, size) in enumerate(zip(nets, sizes, strict=False))
            for other in range(size)
        ]
        row: dict[str, Any] = {"groups": "+".join(map(str, sizes))}
        row["clients"] = [judge(client, *seen) for client in clients]
        row["naive"] = judge(average(clients, None), *seen)
        for method in get_args(Method):
            merge = merge_many(spec, clients, method=method)
            row[method] = (*judge(merge.state_dict, *seen), merge.similarity)
            print(f"{row['groups']}, {method}: {row[method]}", file=sys.stderr)
        reached = []
        for seed in range(orders):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(clients), generator=generator).tolist()
            reached.append(merge_many(spec, [clients[place] for place in order]).similarity)
        row["spread"] = (max(reached) - min(reached)) / max(reached) if reached else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], used: dict[str, str], orders: int) -> str:
    """Return the rows as a table."""
    lines = [
        "# Clients that are aligned in groups",
        "",
        "Accuracy in % / loss / mean cosine to the merged model. Made by `python",
        "benchmarks/clusters.py --data-dir DIR`.",
        "",
        f"| groups | clients | naive | {' | '.join(get_args(Method))} "
        f"| joint: spread over {orders} orders |",
        "|---|---|---|" + "---|" * (len(get_args(Method)) + 1),
    ]
    for row in rows:
        cells = [
            f"{100 * min(right for right, _ in row['clients']):.2f} to "
            f"{100 * max(right for right, _ in row['clients']):.2f}",
            f"{100 * row['naive'][0]:.2f} / {row['naive'][1]:.3f}",
            *(
                f"{100 * row[method][0]:.2f} / {row[method][1]:.3f} / {row[method][2]:.4f}"
                for method in get_args(Method)
            ),
            "" if row["spread"] is None else f"{100 * row['spread']:.3f} %",
        ]
        lines.append(f"| {row['groups']} | {' | '.join(cells)} |")
    note = ", ".join(f"{name} {value}" for name, value in used.items())
    return "\n".join([*lines, "", note, ""])


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--orders", type=int, default=20, metavar="N")
    options = parser.parse_args()
    rows = measure(options.data_dir, options.orders)
    used = versions("torch", "lapx", "numpy")
    path = Path(__file__).parent / "results" / "clusters.json"
    path.write_text(json.dumps({"rows": rows, "versions": used}, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows, used, options.orders))
    print(table(rows, used, options.orders))


if __name__ == "__main__":
    main()
