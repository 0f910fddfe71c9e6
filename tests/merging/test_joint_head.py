"""The joint head against scikit-learn's logistic regression on all data in one place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from fl_rebasin import JointHead, fit_joint_head
from fl_rebasin.merging.joint_head.head_sums import HELD_BACK_EVERY
from fl_rebasin.merging.joint_head.solver import PENALTY

State = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def net(classes: int = 4, *, bias: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, classes, bias=bias))


def clouds(sizes: list[list[int]], seed: int = 0) -> list[list[Batch]]:
    """Clients with so many examples of each class, in batches of 50, in random order."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(len(sizes[0]), 3, generator=generator)
    data = []
    for counts in sizes:
        labels = torch.cat([torch.full((count,), k) for k, count in enumerate(counts)])
        labels = labels[torch.randperm(len(labels), generator=generator)]
        inputs = centres[labels] + torch.randn(len(labels), 3, generator=generator)
        data.append(list(zip(inputs.split(50), labels.split(50), strict=True)))
    return data


def features(model: nn.Module, data: list[list[Batch]]) -> tuple[Tensor, Tensor]:
    """Features and labels of the examples that are fitted, not those held back."""
    kept = []
    for batches in data:
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        fitted = torch.arange(len(labels)) % HELD_BACK_EVERY != HELD_BACK_EVERY - 1
        kept.append((inputs[fitted], labels[fitted]))
    inputs, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    with torch.no_grad():
        return model[:-1](inputs), labels  # type: ignore[index]


def mean_loss(state: State, x: Tensor, y: Tensor) -> float:
    bias = state.get("2.bias", torch.zeros(len(state["2.weight"])))
    return float(F.cross_entropy(x @ state["2.weight"].T + bias, y))


UNEVEN = [[120, 80, 0, 0], [0, 30, 150, 20]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, 4])
def test_many_messages_reach_the_optimum_of_scikit_learn(classes: int, bias: bool) -> None:
    model, data = net(classes, bias=bias), clouds([counts[:classes] for counts in UNEVEN])
    x, y = features(model, data)
    square = float(x.double().square().mean())
    oracle = LogisticRegression(
        C=1 / (PENALTY * square * len(y)), fit_intercept=bias, tol=1e-8, max_iter=5000
    ).fit(x.double().numpy(), y.numpy())
    probabilities = oracle.predict_proba(x.double().numpy())
    best = -float(np.log(probabilities[np.arange(len(y)), y.numpy()]).mean())
    method = JointHead(messages=200)
    finished = [fit_joint_head(model, model.state_dict(), data, method)]
    assert mean_loss(model.state_dict(), x, y) > best + 0.1
    # The head with the least held-back loss is taken, which is not quite the last one.
    assert best - 1e-6 < mean_loss(finished[0], x, y) < best + 0.05


def test_ten_messages_bring_most_of_the_gain() -> None:
    model, data = net(), clouds(UNEVEN)
    x, y = features(model, data)
    start = mean_loss(model.state_dict(), x, y)
    few = mean_loss(fit_joint_head(model, model.state_dict(), data), x, y)
    many = mean_loss(fit_joint_head(model, model.state_dict(), data, JointHead(200)), x, y)
    assert start - few > 0.95 * (start - many)


@pytest.mark.parametrize("bias", [True, False])
def test_a_start_worse_than_no_features_costs_one_message(bias: bool) -> None:
    """From such a head the search starts from the label prior instead."""
    model, data = net(bias=bias), clouds(UNEVEN)
    x, y = features(model, data)
    bad = {
        key: 40 * value if key == "2.weight" else value for key, value in model.state_dict().items()
    }
    zero = {**bad, "2.weight": torch.zeros_like(bad["2.weight"])}
    assert mean_loss(bad, x, y) > mean_loss(zero, x, y)
    few = mean_loss(fit_joint_head(model, bad, data, JointHead(11)), x, y)
    many = mean_loss(fit_joint_head(model, bad, data, JointHead(200)), x, y)
    assert few - many < 0.1 * (math.log(4) - many)


def test_data_of_clients_count_as_if_they_were_in_one_place() -> None:
    model = net()
    (together,) = clouds([[100, 100, 100, 100]])
    # Parts of whole tens hold back the same examples.
    apart = [together[:2], together[2:3], together[3:]]
    whole = fit_joint_head(model, model.state_dict(), [together])
    parts = fit_joint_head(model, model.state_dict(), apart)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-5)


def test_only_the_last_layer_changes_and_rows_without_examples_stay() -> None:
    model, data = net(5), clouds([[60, 60, 0, 60, 0], [0, 60, 0, 60, 0]])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = fit_joint_head(model, before, data)
    assert list(found) == list(before)
    for key in ("0.weight", "0.bias"):
        assert torch.equal(found[key], before[key])
    changed = (found["2.weight"] != before["2.weight"]).any(1)
    assert changed.tolist() == [True, True, False, True, False]
    assert (found["2.bias"] != before["2.bias"]).tolist() == changed.tolist()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_held_back_loss_stops_the_head_from_overfitting() -> None:
    """With labels that mean nothing the best head is close to the class frequencies."""
    model = net(3)
    ((batches),) = clouds([[20, 20, 20]])
    generator = torch.Generator().manual_seed(1)
    noise = [(x, torch.randint(3, (len(x),), generator=generator)) for x, _ in batches]
    test = torch.cat([x for x, _ in clouds([[200, 200, 200]], seed=3)[0]])
    found = fit_joint_head(model, model.state_dict(), [noise], JointHead(100))
    model.load_state_dict(found)
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(model(test), torch.full((len(test),), k))) for k in range(3)
        ]
    assert sum(losses) / 3 < 1.5


LABELS: dict[str, tuple[Any, str]] = {
    "no-labels": (torch.zeros(20, 3), "needs batches of inputs and labels"),
    "floats": ((torch.zeros(20, 3), torch.zeros(20)), "one class number for each example"),
    "multi-label": ((torch.zeros(20, 3), torch.ones(20, 4).long()), "one class number for each"),
    "too-large": ((torch.zeros(20, 3), torch.full((20,), 4)), "from 0 to 3"),
    "negative": ((torch.zeros(20, 3), torch.full((20,), -1)), "from 0 to 3"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_not_class_numbers_are_refused(case: str) -> None:
    batch, words = LABELS[case]
    model = net()
    with pytest.raises(ValueError, match=words):
        fit_joint_head(model, model.state_dict(), [[batch]])


def test_no_data_are_refused() -> None:
    for data in ([], [[]]):
        with pytest.raises(ValueError, match="no example to fit the head on"):
            fit_joint_head(net(), net().state_dict(), data)


def test_a_model_that_ends_in_something_else_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"the joint head is skipped: .* output of a linear layer"):
        fit_joint_head(model, model.state_dict(), clouds(UNEVEN))


@pytest.mark.parametrize("messages", [0, 1, -3, 2.5, True, "10"])
def test_messages_must_be_a_number_of_two_or_more(messages: Any) -> None:
    with pytest.raises(ValueError, match="messages must be an integer of 2 or more, got"):
        JointHead(messages=messages)
