"""How the training images are divided among the clients, and the class parts for accuracy."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from experiment.errors import UserError

# A larger ALPHA gives equal parts to six digits; a far larger one overflows.
LARGEST_ALPHA = 1e6


@dataclass(frozen=True)
class Split:
    """A split rule, parsed from its name.

    Attributes:
        kind: "iid", "disjoint" (no class in common), "percent", "dirichlet" or "all".
        value: For "percent", the percentage of the images of the first half of the classes that
            goes to the even clients; for "dirichlet", ALPHA; otherwise 0.
    """

    kind: Literal["iid", "disjoint", "percent", "dirichlet", "all"]
    value: float = 0.0


def parse_split(split: str) -> Split:
    """Parse `iid`, `50-50`, `A-B` (or `A/B`) with A + B = 100, `dirichlet:ALPHA` or `all`.

    Raises:
        UserError: The split is unknown, or its percentages or ALPHA are invalid.
    """
    if split == "iid":
        return Split("iid")
    if split == "all":
        return Split("all")
    if split.startswith("dirichlet:"):
        return Split("dirichlet", _alpha(split))
    if percentages := re.fullmatch(r"([0-9]{1,3})[-/]([0-9]{1,3})", split):
        first, second = (int(text) for text in percentages.groups())
        if first + second != 100:
            raise UserError(
                f"split {split!r} adds up to {first + second}, not 100: use, for example, 20-80"
            )
        if first in (0, 100):
            raise UserError(f"split {split!r}: use 50-50 for clients without a class in common")
        return Split("disjoint") if first == 50 else Split("percent", first)
    raise UserError(
        f"unknown split {split!r}: use 20-80 (or another A-B with A + B = 100), "
        "50-50 (no class in common), iid, dirichlet:ALPHA or all (every client has all images)"
    )


def _alpha(split: str) -> float:
    try:
        alpha = float(split.removeprefix("dirichlet:"))
    except ValueError:
        alpha = float("nan")
    if not 0 < alpha <= LARGEST_ALPHA:
        raise UserError(
            f"split {split!r}: ALPHA must be above 0 and at most {LARGEST_ALPHA:g}, "
            "for example dirichlet:0.5"
        )
    return alpha


def split_indices(
    labels: NDArray[np.int64],
    split: str,
    num_clients: int,
    num_classes: int,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Divide the images among the clients; each image goes to one client, except with `all`.

    - `A-B`, the two-site rule of Git Re-Basin (Ainsworth et al., 2023) and REPAIR (Jordan et al.,
      2023): client 0 gets A % of the images of the first half of the classes and B % of the
      images of the second half; client 1 gets the rest. With more clients, the even clients share
      client 0's images equally, and the odd clients share client 1's.
    - `50-50`: no class in common; each client gets one contiguous range of classes.
    - `iid`: random parts of equal size.
    - `all`: every client gets all images.
    - `dirichlet:ALPHA`: the shares of each class are drawn from a symmetric Dirichlet distribution
      (Hsu et al., 2019); the smaller ALPHA is, the fewer clients share a class.

    Args:
        labels: Class of each image, shape (N,), values 0 to num_classes - 1.
        split: The rule, as above.
        num_clients: Number of clients, at least 2.
        num_classes: Number of classes.
        rng: The only source of randomness.

    Returns:
        For each client, the indices of its images in ascending order.

    Raises:
        UserError: The rule is invalid, there are fewer than 2 clients, there are too many clients
            for the images or classes, or a client would get no images.
    """
    rule = parse_split(split)
    if num_clients < 2:
        raise UserError(f"{num_clients} client(s) cannot be merged: use at least 2 clients")
    if num_clients > len(labels):
        raise UserError(
            f"{num_clients} clients cannot share {len(labels)} images: use fewer clients"
        )
    if rule.kind == "iid":
        parts = _equal_parts(np.arange(len(labels)), num_clients, rng)
    elif rule.kind == "all":
        parts = [np.arange(len(labels))] * num_clients
    elif rule.kind == "disjoint":
        parts = _disjoint_parts(labels, num_clients, num_classes)
    elif rule.kind == "percent":
        parts = _percent_parts(labels, rule.value, num_clients, num_classes, rng)
    else:
        parts = _dirichlet_parts(labels, rule.value, num_clients, rng)
    for client, part in enumerate(parts):
        if len(part) == 0:
            raise UserError(
                f"split {split!r} leaves client {client} of {num_clients} without images: "
                "use fewer clients or, with dirichlet, a larger ALPHA"
            )
    return [np.sort(part) for part in parts]


def evaluation_parts(split: str, num_classes: int) -> dict[str, NDArray[np.int64]]:
    """Return the class parts whose accuracies are reported separately: the two halves.

    Args:
        split: The rule; see `split_indices`.
        num_classes: Number of classes, at least 2.

    Returns:
        The classes of each part by name, such as "classes 0-49".

    Raises:
        UserError: The rule is invalid.
    """
    parse_split(split)
    return {f"classes {half[0]}-{half[-1]}": half for half in _class_parts(num_classes, 2)}


def _class_parts(num_classes: int, num_parts: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.arange(num_classes), num_parts)


def _equal_parts(
    indices: NDArray[np.int64], num_parts: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    return np.array_split(rng.permutation(indices), num_parts)


def _disjoint_parts(
    labels: NDArray[np.int64], num_clients: int, num_classes: int
) -> list[NDArray[np.int64]]:
    if num_clients > num_classes:
        raise UserError(
            f"split '50-50' gives each client its own classes, and {num_clients} clients cannot "
            f"share {num_classes} classes: use at most {num_classes} clients"
        )
    parts = _class_parts(num_classes, num_clients)
    return [np.flatnonzero(np.isin(labels, part)) for part in parts]


def _percent_parts(
    labels: NDArray[np.int64],
    percent: float,
    num_clients: int,
    num_classes: int,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    first_half, second_half = (
        rng.permutation(np.flatnonzero(np.isin(labels, half)))
        for half in _class_parts(num_classes, 2)
    )
    first_cut = round(len(first_half) * percent / 100)
    second_cut = round(len(second_half) * (100 - percent) / 100)
    even = np.concatenate([first_half[:first_cut], second_half[:second_cut]])
    odd = np.concatenate([first_half[first_cut:], second_half[second_cut:]])
    even_parts = _equal_parts(even, (num_clients + 1) // 2, rng)
    odd_parts = _equal_parts(odd, num_clients // 2, rng)
    return [(odd_parts if client % 2 else even_parts)[client // 2] for client in range(num_clients)]


def _dirichlet_parts(
    labels: NDArray[np.int64], alpha: float, num_clients: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    pieces: list[list[NDArray[np.int64]]] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        proportions = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.rint(np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        pieces.append(np.split(members, cuts))
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]
