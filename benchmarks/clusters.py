"""Merge clients that are aligned in groups: does a merge get stuck, and does the order matter?

    python benchmarks/clusters.py --data-dir DIR [--orders N] [--out DIR]

The clients of a group continue from one MNIST net (3 x 512) for an epoch, each on its own data; the
nets of different groups are independent. The table shows the test accuracy and the loss of the
merged model, the mean cosine of the clients to it, and the spread of that cosine over N random
orders of the clients (largest minus smallest, relative to the largest). Results are written to
`clusters.json` and `clusters.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import torch
from machine import versions
from nets import NETS, State, images_of, state_of, train_epoch
from output import markdown_table, report, script_parser, versions_line, write_json
from torch import Tensor
from torch.nn import functional as F

from fl_rebasin import PermutationSpec, derive_spec, merge_many
from fl_rebasin.matching.many import Method
from fl_rebasin.state_dicts import average

NAME = "MLP 3x512"
GROUPS = ((2, 2), (3, 2), (2, 2, 2))
IMAGES = 10_000


def continued(state: State, images: Tensor, labels: Tensor, seed: int) -> State:
    """Return a net after one more epoch on a random part of the images."""
    generator = torch.Generator().manual_seed(seed)
    model = NETS[NAME].build()
    model.load_state_dict(state)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    batches = torch.randperm(len(images), generator=generator)[:IMAGES].split(500)
    train_epoch(model, optimizer, images, labels, batches)
    return {key: value.clone() for key, value in model.state_dict().items()}


def evaluate(state: State, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the accuracy and the loss of a net."""
    model = NETS[NAME].build()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(images)
    accuracy = float((logits.argmax(1) == labels).float().mean())
    return accuracy, float(F.cross_entropy(logits, labels))


def spread(spec: PermutationSpec, clients: list[State], orders: int) -> float | None:
    """Return the relative spread of the merge's similarity over random orders of the clients."""
    found = []
    for seed in range(orders):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(clients), generator=generator).tolist()
        found.append(merge_many(spec, [clients[place] for place in order]).similarity)
    return (max(found) - min(found)) / max(found) if found else None


def measure(data: Path, orders: int) -> list[dict[str, Any]]:
    """Return the rows of the table."""
    images, labels = images_of("mnist", data, 60_000)
    test_images, test_labels = images_of("mnist", data, 10_000, train=False)
    spec = derive_spec(NETS[NAME].build(), torch.zeros(NETS[NAME].shape))
    nets = [state_of(NAME, seed, data) for seed in range(max(map(len, GROUPS)))]
    rows = []
    for sizes in GROUPS:
        clients = [
            continued(net, images, labels, 10 * group + client)
            for group, (net, size) in enumerate(zip(nets, sizes, strict=False))
            for client in range(size)
        ]
        row: dict[str, Any] = {"groups": "+".join(map(str, sizes))}
        row["clients"] = [evaluate(client, test_images, test_labels) for client in clients]
        row["naive"] = evaluate(average(clients, None), test_images, test_labels)
        for method in get_args(Method):
            merge = merge_many(spec, clients, method=method)
            measured = evaluate(merge.state_dict, test_images, test_labels)
            row[method] = (*measured, merge.similarity)
            print(f"{row['groups']}, {method}: {row[method]}", file=sys.stderr)
        row["spread"] = spread(spec, clients, orders)
        rows.append(row)
    return rows


def page(rows: list[dict[str, Any]], used: dict[str, str], orders: int) -> str:
    """Return the rows as a Markdown page."""
    methods = get_args(Method)
    headings = ["groups", "clients", "naive", *methods, f"joint: spread over {orders} orders"]
    cells = []
    for row in rows:
        accuracies = [100 * accuracy for accuracy, _ in row["clients"]]
        cells.append(
            [
                row["groups"],
                f"{min(accuracies):.2f} to {max(accuracies):.2f}",
                f"{100 * row['naive'][0]:.2f} / {row['naive'][1]:.3f}",
                *(
                    f"{100 * row[method][0]:.2f} / {row[method][1]:.3f} / {row[method][2]:.4f}"
                    for method in methods
                ),
                "" if row["spread"] is None else f"{100 * row['spread']:.3f} %",
            ]
        )
    explanation = (
        "Accuracy in % / loss / mean cosine to the merged model. Made by\n"
        "`python benchmarks/clusters.py --data-dir DIR`."
    )
    return report(
        "Merging clients that are aligned in groups",
        explanation,
        markdown_table(headings, cells),
        [versions_line(used)],
    )


def main() -> None:
    """Run as a program."""
    parser = script_parser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--orders", type=int, default=20, metavar="N")
    options = parser.parse_args()
    rows = measure(options.data_dir, options.orders)
    used = versions("torch", "lapx", "numpy")
    write_json(options.out / "clusters.json", {"rows": rows, "versions": used})
    text = page(rows, used, options.orders)
    (options.out / "clusters.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
