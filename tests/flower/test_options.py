"""Options: each invalid one is refused when it is given, with its value and a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from zoo import ZOO

from fl_rebasin.flower import (
    ActivationMatching,
    BatchNorm,
    ClassAwareHead,
    Guard,
    LeastSquares,
    Limits,
    ReBasinStrategy,
    RegMean,
    Repair,
    StraightThrough,
    WeightMatching,
)

NAN, INF = float("nan"), float("inf")


def made(**options: Any) -> ReBasinStrategy:
    entry = ZOO["mlp"]
    return ReBasinStrategy(model=entry.build(), example_inputs=entry.inputs(), **options)


A_LIST = "give a list of steps, such as [BatchNorm()]"
STEPS = "give finishing steps such as BatchNorm()"
WRONG_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "align-name": (
        {"align": "weights"},
        "align is 'weights': give an object such as WeightMatching()",
    ),
    "align-true": ({"align": True}, "align is True: give an object such as WeightMatching()"),
    "align-class": ({"align": ActivationMatching}, "give an object such as WeightMatching()"),
    "align-step": ({"align": BatchNorm()}, "align is BatchNorm(): give an object such as Weight"),
    "finish-name": ({"finish": "batchnorm"}, f"finish is 'batchnorm': {A_LIST}"),
    "finish-none": ({"finish": None}, f"finish is None: {A_LIST}"),
    "finish-step": ({"finish": BatchNorm()}, f"finish is BatchNorm(): {A_LIST}"),
    "finish-class": ({"finish": BatchNorm}, A_LIST),
    "finish-set": ({"finish": {BatchNorm()}}, f"finish is {{BatchNorm()}}: {A_LIST}"),
    "finish-names": ({"finish": ["batchnorm"]}, f"finish holds 'batchnorm': {STEPS}"),
    "finish-classes": ({"finish": [BatchNorm(), LeastSquares]}, STEPS),
    "finish-guard": ({"finish": [Guard()]}, f"finish holds Guard(): {STEPS}"),
    "finish-nested": ({"finish": [[BatchNorm()]]}, f"finish holds [BatchNorm()]: {STEPS}"),
    "guard-true": ({"guard": True}, "guard is True: give an object such as Guard()"),
    "guard-false": ({"guard": False}, "guard is False: give an object such as Guard()"),
    "guard-class": ({"guard": Guard}, "give an object such as Guard()"),
    "limits-number": ({"limits": 3}, "limits is 3: give an object such as Limits(min_replies=2)"),
    "limits-none": ({"limits": None}, "limits is None: give an object such as Limits("),
    "limits-class": ({"limits": Limits}, "give an object such as Limits(min_replies=2)"),
    "limits-mapping": ({"limits": {"min_replies": 2}}, "give an object such as Limits("),
    "no-such-option": ({"matching": "weights"}, "unexpected keyword argument 'matching'"),
}


@pytest.mark.parametrize("case", WRONG_KINDS)
def test_an_option_of_the_wrong_kind_is_refused(case: str) -> None:
    options, words = WRONG_KINDS[case]
    with pytest.raises(TypeError, match=re.escape(words)):
        made(**options)


METRIC = "give the name of the metric that lists a client's training examples of each class"
FEATURES = "give a positive integer, or use Repair() to rescale all layers"
RIDGE = "it must be finite and not negative"
RATE = "learning_rate must be positive and finite, got"
WRONG_VALUES: dict[str, tuple[Callable[[], object], str]] = {
    "to-joint": (
        lambda: WeightMatching(to="joint"),
        "unknown to='joint': use one of others, global",
    ),
    "to-none": (
        lambda: WeightMatching(to=None),
        "unknown to=None: use one of others, global",
    ),
    "epochs-zero": (lambda: StraightThrough(epochs=0), "epochs must be a positive integer, got 0"),
    "epochs-float": (lambda: StraightThrough(epochs=1.5), "a positive integer, got 1.5"),
    "epochs-true": (lambda: StraightThrough(epochs=True), "a positive integer, got True"),
    "rate-zero": (lambda: StraightThrough(learning_rate=0.0), f"{RATE} 0.0"),
    "rate-nan": (lambda: StraightThrough(learning_rate=NAN), f"{RATE} nan"),
    "rate-infinite": (lambda: StraightThrough(learning_rate=INF), f"{RATE} inf"),
    "rate-text": (lambda: StraightThrough(learning_rate="fast"), f"{RATE} 'fast'"),
    "replies-zero": (lambda: Limits(min_replies=0), "min_replies must be at least 1, got 0"),
    "replies-float": (lambda: Limits(min_replies=2.5), "min_replies must be an integer, got 2.5"),
    "replies-true": (lambda: Limits(min_replies=True), "min_replies must be an integer, got True"),
    "replies-text": (lambda: Limits(min_replies="2"), "min_replies must be an integer, got '2'"),
    "examples-zero": (
        lambda: Limits(max_examples=0),
        "max_examples must be positive and finite, got 0",
    ),
    "examples-infinite": (
        lambda: Limits(max_examples=INF),
        "max_examples must be positive and finite, got inf",
    ),
    "examples-nan": (
        lambda: Limits(max_examples=NAN),
        "max_examples must be positive and finite, got nan",
    ),
    "examples-none": (
        lambda: Limits(max_examples=None),
        "max_examples must be positive and finite, got None",
    ),
    "norm-zero": (
        lambda: Limits(max_update_norm=0.0),
        "max_update_norm must be positive, or None, got 0.0",
    ),
    "norm-nan": (
        lambda: Limits(max_update_norm=NAN),
        "max_update_norm must be positive, or None, got nan",
    ),
    "norm-text": (
        lambda: Limits(max_update_norm="3"),
        "max_update_norm must be positive, or None, got '3'",
    ),
    "head-without-name": (lambda: ClassAwareHead(""), f"label_counts is '': {METRIC}"),
    "head-none": (lambda: ClassAwareHead(None), f"label_counts is None: {METRIC}"),
    "head-number": (lambda: ClassAwareHead(3), f"label_counts is 3: {METRIC}"),
    "repair-without-name": (lambda: Repair(label_counts=""), f"label_counts is '': {METRIC}"),
    **{
        f"{method.name}-{case}": (lambda method=method, options=options: method(**options), words)
        for method in (LeastSquares, RegMean)
        for case, (options, words) in {
            "features-zero": ({"max_features": 0}, f"max_features is 0: {FEATURES}"),
            "features-negative": ({"max_features": -1}, f"max_features is -1: {FEATURES}"),
            "features-float": ({"max_features": 2.5}, f"max_features is 2.5: {FEATURES}"),
            "features-true": ({"max_features": True}, f"max_features is True: {FEATURES}"),
            "features-none": ({"max_features": None}, f"max_features is None: {FEATURES}"),
            "ridge-negative": ({"ridge": -1}, f"ridge is -1: {RIDGE}"),
            "ridge-nan": ({"ridge": NAN}, f"ridge is nan: {RIDGE}"),
            "ridge-infinite": ({"ridge": INF}, f"ridge is inf: {RIDGE}"),
            "ridge-text": ({"ridge": "weak"}, f"ridge is 'weak': {RIDGE}"),
            "without-name": ({"label_counts": ""}, f"label_counts is '': {METRIC}"),
            "no-name": ({"label_counts": ["labels"]}, f"label_counts is ['labels']: {METRIC}"),
        }.items()
    },
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_an_invalid_value_is_refused_when_the_object_is_made(case: str) -> None:
    make, words = WRONG_VALUES[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


VALID: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": lambda: {"align": None, "finish": [], "guard": None},
    "tuple": lambda: {"finish": (BatchNorm(), Repair(), ClassAwareHead("labels"))},
    "numpy-numbers": lambda: {
        "limits": Limits(max_examples=np.float32(9), max_update_norm=np.float64(2)),
        "finish": [LeastSquares(ridge=np.float32(0.1))],
    },
    "largest": lambda: {"limits": Limits(max_examples=1e300, max_update_norm=INF)},
    "smallest": lambda: {"finish": [RegMean(max_features=1, ridge=0)]},
    "same-step-twice": lambda: {"finish": [BatchNorm(), BatchNorm()]},
    "everything": lambda: {
        "align": StraightThrough(epochs=2, learning_rate=1),
        "finish": [LeastSquares(label_counts="labels")],
        "guard": Guard(),
        "limits": Limits(min_replies=2),
    },
}


@pytest.mark.parametrize("case", VALID)
def test_valid_options_are_kept(case: str) -> None:
    options = VALID[case]()
    strategy = made(**options)
    assert strategy.align == options.get("align", WeightMatching())
    assert strategy.finish == tuple(options.get("finish", [BatchNorm()]))
    assert strategy.guard == options.get("guard")
    assert strategy.limits == options.get("limits", Limits())


@pytest.mark.parametrize(
    "step",
    [
        ClassAwareHead("labels"),
        LeastSquares(label_counts="labels"),
        RegMean(label_counts="labels"),
        Repair(label_counts="labels"),
    ],
    ids=lambda step: step.name,
)
def test_label_counts_need_a_linear_last_layer(step: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with pytest.raises(ValueError, match="need a model that returns the output of a linear layer"):
        ReBasinStrategy(model=net, example_inputs=torch.zeros(1, 4), finish=[step])


def test_a_step_that_does_not_fit_the_model_is_refused_before_any_round() -> None:
    class Picky:
        name = "picky"
        needs_models = False

        def bind(self, model: nn.Module, example_inputs: Any) -> None:
            raise ValueError("picky needs a convolution")

    with pytest.raises(ValueError, match="picky needs a convolution"):
        made(finish=[Picky()])
