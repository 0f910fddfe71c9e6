"""Class-aware heads against the formula, class by class."""

import math
from typing import Any

import pytest
import torch
from helpers import assert_same, state_of
from torch import Tensor, nn
from torch.nn import functional as F

from fl_rebasin import class_aware_head
from fl_rebasin.merging.heads import last_layer, without_label_prior

State = dict[str, Tensor]
CLASSES = 4


def head(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.weight": torch.randn(3, 2, generator=generator),
        "head.weight": torch.randn(CLASSES, 3, generator=generator),
        "head.bias": torch.randn(CLASSES, generator=generator),
    }


def counted(*rows: list[float]) -> list[Tensor]:
    return [torch.tensor(row) for row in rows]


COUNTS = pytest.mark.parametrize(
    "counts",
    [
        counted([5, 0, 3, 1], [0, 7, 3, 1], [2, 0, 0, 100]),
        counted([5, 0, 3, 0], [0, 0, 3, 0], [2, 0, 0, 0]),  # Two classes that nobody has seen.
        counted([0, 0, 0, 0], [4, 3, 2, 1], [1, 1, 1, 1]),  # A model that has seen nothing.
        counted([0.25, 0.5, 0, 0], [0.125, 0, 0, 0], [0, 0, 0.3, 0]),  # Shares of examples.
    ],
)


@COUNTS
@pytest.mark.parametrize("bias", ["head.bias", None])
def test_each_class_is_decided_by_those_who_have_seen_it(
    counts: list[Tensor], bias: str | None
) -> None:
    merged, models = head(0), [head(seed) for seed in (1, 2, 3)]
    before = [{k: v.clone() for k, v in each.items()} for each in (merged, *models)]
    found = class_aware_head(merged, models, counts, "head.weight", bias)
    everybody = [sum(float(row[c]) for row in counts) for c in range(CLASSES)]
    for c in range(CLASSES):
        row, shift = torch.zeros(3), 0.0
        if everybody[c] == 0:
            row, shift = merged["head.weight"][c], float(merged["head.bias"][c])
        else:
            for model, own in zip(models, counts, strict=True):
                share = float(own[c]) / everybody[c]
                row = row + share * model["head.weight"][c]
                prior = (float(own[c]) + 1) / (float(own.sum()) + CLASSES)
                shift += share * (float(model["head.bias"][c]) - math.log(prior))
            shift += math.log((everybody[c] + 1) / (sum(everybody) + CLASSES))
        torch.testing.assert_close(found["head.weight"][c], row, rtol=1e-5, atol=1e-6)
        if bias is not None:
            assert float(found["head.bias"][c]) == pytest.approx(shift, rel=1e-5, abs=1e-6)
    if bias is None:
        assert torch.equal(found["head.bias"], merged["head.bias"])
    assert torch.equal(found["body.weight"], merged["body.weight"])
    assert list(found) == list(merged)
    for each, old in zip((merged, *models), before, strict=True):
        assert_same(each, old, rtol=0, atol=0)


def test_bayes_optimal_models_of_skewed_clients_make_the_optimal_model_of_all() -> None:
    """A model whose bias is its log prior loses it, and the merged one has that of all."""
    many = 1e9  # So that the one example added to each class does not count.
    shares = [torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.2, 0.6])]
    models = [{**head(1), "head.bias": share.log()} for share in shares]
    found = class_aware_head(
        head(0), models, [many * share for share in shares], "head.weight", "head.bias"
    )
    expected = ((shares[0] + shares[1]) / 2).log()
    torch.testing.assert_close(found["head.bias"], expected, rtol=1e-5, atol=1e-5)


def test_dtypes_stay_and_whole_numbers_will_do() -> None:
    merged = {key: value.half() for key, value in head(0).items()}
    models = [{key: value.half() for key, value in head(seed).items()} for seed in (1, 2)]
    counts = [torch.tensor([3, 0, 1, 2]), torch.tensor([1, 0, 1, 2])]
    found = class_aware_head(merged, models, counts, "head.weight", "head.bias")
    assert {value.dtype for value in found.values()} == {torch.float16}
    expected = (3 * models[0]["head.weight"][0].double() + models[1]["head.weight"][0]) / 4
    torch.testing.assert_close(found["head.weight"][0], expected.half())


def test_versions_of_the_state_dict_stay_and_gradients_do_not() -> None:
    model = nn.Linear(3, CLASSES)
    merged, parameters = model.state_dict(), dict(model.named_parameters())
    found = class_aware_head(merged, [parameters], [torch.ones(CLASSES)], "weight", "bias")
    assert found._metadata == merged._metadata  # type: ignore[attr-defined]
    assert not any(value.requires_grad for value in found.values())
    model.load_state_dict(found)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (counted([1, 2, 3]), r"label counts of shape \(3,\) for 4 classes"),
        (counted([[1, 2, 3, 4]]), r"label counts of shape \(1, 4\) for 4 classes"),  # type: ignore[list-item]
        (counted([1, 2, -3, 4]), "must be finite and not negative"),
        (counted([1, 2, float("nan"), 4]), "must be finite and not negative"),
        (counted([1, 2, float("inf"), 4]), "must be finite and not negative"),
        (counted([0, 0, 0, 0]), "all label counts are 0"),
        (counted([1, 2, 3, 4], [1, 2, 3, 4]), "label counts of 2 models for 1 models"),
        ([], "label counts of 0 models for 1 models"),
    ],
)
def test_bad_counts_are_named(counts: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_aware_head(head(0), [head(1)], counts, "head.weight", "head.bias")


class Classifier(nn.Module):
    """A net that ends as it is told."""

    def __init__(self, end: Any, bias: bool = True) -> None:
        super().__init__()
        self.end = end
        self.body, self.side = nn.Linear(2, 5), nn.Linear(5, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3, bias=bias)

    def forward(self, inputs: Tensor, scale: float = 1.0) -> Any:
        hidden = torch.relu(self.body(inputs)) * scale
        side = self.side(hidden)
        return self.end(self.head(self.drop(hidden)), side)


def as_it_is(logits: Tensor, side: Tensor) -> Tensor:
    return logits


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 2), (torch.zeros(2, 2), 2.0), {"inputs": torch.zeros(2, 2)}]
)
def test_the_last_layer_is_that_whose_result_is_returned(inputs: Any) -> None:
    model = Classifier(as_it_is).train()
    before, chance = state_of(model), torch.get_rng_state()
    assert last_layer(model, inputs) == ("head.weight", "head.bias")
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), chance)
    assert_same(state_of(model), before, rtol=0, atol=0)
    assert last_layer(Classifier(as_it_is, bias=False), inputs) == ("head.weight", None)
    assert last_layer(nn.Linear(2, 3), torch.zeros(1, 2)) == ("weight", "bias")


@pytest.mark.parametrize(
    "end",
    [
        lambda logits, side: F.log_softmax(logits, 1),
        lambda logits, side: logits + side,
        lambda logits, side: (logits, side),
        lambda logits, side: logits.mul_(2),
        lambda logits, side: logits[:, :2],
    ],
)
def test_a_model_that_ends_otherwise_is_refused(end: Any) -> None:
    model = Classifier(end)
    with pytest.raises(ValueError, match="returns the output of a linear layer"):
        last_layer(model, torch.zeros(2, 2))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_last_layer_whose_weight_is_not_its_own_is_refused() -> None:
    tied = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="a weight of its own: 1 shares or computes its weight"):
        last_layer(tied, torch.zeros(2, dtype=torch.int64))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="a weight of its own: 0 shares or computes its weight"):
        last_layer(normed, torch.zeros(2, 4))


def test_a_model_without_its_prior_has_that_of_everybody_bounded_where_it_saw_nothing() -> None:
    state, counts = head(1), torch.tensor([100, 0, 200, 100])
    everybody = torch.tensor([100, 100, 200, 400])
    before = {key: value.clone() for key, value in state.items()}
    found = without_label_prior(state, counts, everybody, "head.bias")
    # A tenth of the mean count is added to each class: 10 of the model's, 20 of everybody's.
    own, all_ = torch.tensor([110, 10, 210, 110]) / 440, torch.tensor([120, 120, 220, 420]) / 880
    expected = state["head.bias"].double() + all_.double().log() - own.double().log()
    torch.testing.assert_close(found["head.bias"].double(), expected, rtol=1e-6, atol=1e-6)
    assert_same(
        {k: v for k, v in found.items() if k != "head.bias"},
        {k: v for k, v in before.items() if k != "head.bias"},
        rtol=0,
        atol=0,
    )
    assert_same(state, before, rtol=0, atol=0)
