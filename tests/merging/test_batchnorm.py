"""BatchNorm statistics against direct computation on all the data."""

import pytest
import torch
from helpers import assert_same, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_rebasin import recalibrate_batchnorm
from fl_rebasin.merging.batchnorm import batchnorm_statistics, pool_statistics, with_statistics


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12, 4),
            nn.BatchNorm1d(4),
        )


def images(count: int, seed: int) -> Tensor:
    return 3 + 2 * torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_one_batch_gives_what_pytorch_gives() -> None:
    """Oracle: PyTorch's own running statistics with momentum 1 after one training pass."""
    model, batch = net(), images(16, seed=1)
    expected = net()
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    expected.train()(batch)
    found = recalibrate_batchnorm(model, model.state_dict(), [batch])
    for key, value in expected.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["1.running_mean"], model.state_dict()["1.running_mean"])


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5))
def test_pooled_batches_are_all_the_data_at_once(sizes: list[int]) -> None:
    """However the data are cut, by batch or by client. For the first layer this is exact."""
    batches = [images(size, seed) for seed, size in enumerate(sizes)]
    everything = net()[0](torch.cat(batches)).transpose(0, 1).flatten(1).double()
    model = net()
    for pooled in (
        batchnorm_statistics(model, batches),
        pool_statistics([batchnorm_statistics(model, [batch]) for batch in batches]),
    ):
        assert pooled["1"].count == everything.shape[1]
        torch.testing.assert_close(pooled["1"].mean, everything.mean(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            pooled["1"].variance, everything.var(1, correction=0), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(training: bool) -> None:
    model = net().train(training)
    model[1].momentum = 0.3
    before, modes = state_of(model), [module.training for module in model.modules()]
    recalibrate_batchnorm(model, model.state_dict(), [images(4, seed=1), images(4, seed=2)])
    assert_same(state_of(model), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert model[1].momentum == 0.3
    assert not model[1]._forward_hooks


def test_dropout_is_off_and_labels_are_not_looked_at() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2)).train()
    data = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    found = recalibrate_batchnorm(model, model.state_dict(), [(data, "label")])
    assert found["1.running_mean"].tolist() == [2.0, 7.0]
    assert found["1.running_var"].tolist() == [2.0, 8.0]  # unbiased


def test_a_model_without_batchnorm_is_returned_as_it_is() -> None:
    model = nn.Linear(2, 2)
    assert_same(
        recalibrate_batchnorm(model, model.state_dict(), []), state_of(model), rtol=0, atol=0
    )


def test_a_layer_without_running_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    assert list(recalibrate_batchnorm(model, model.state_dict(), [])) == ["0.weight", "0.bias"]


def test_no_data_and_diverged_data_are_named() -> None:
    with pytest.raises(ValueError, match="no batch of two"):
        recalibrate_batchnorm(net(), net().state_dict(), [])
    with pytest.raises(ValueError, match="1: the activations hold NaN"):
        recalibrate_batchnorm(net(), net().state_dict(), [images(4, 0) * float("nan")])


def test_statistics_go_where_they_belong_and_dtypes_stay() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    statistics = batchnorm_statistics(model, [torch.tensor([[1.0, 2.0], [3.0, 6.0]]).double()])
    state = model.half().state_dict()
    new = with_statistics(state, statistics)
    assert new["0.running_mean"].dtype == torch.float16
    assert new["0.running_mean"].tolist() == [2.0, 4.0]
    assert state["0.running_mean"].tolist() == [0.0, 0.0]


def test_a_layer_with_two_names_is_written_under_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.BatchNorm1d(2)
            self.other = self.one

        def forward(self, inputs: Tensor) -> Tensor:
            return self.other(inputs)

    model = Shared()
    found = recalibrate_batchnorm(
        model, model.state_dict(), [torch.tensor([[1.0, 2.0], [3.0, 6.0]])]
    )
    for name in ("one", "other"):
        assert found[f"{name}.running_mean"].tolist() == [2.0, 4.0]


def test_a_last_batch_of_one_sample_is_left_out() -> None:
    pair, single = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([[9.0, 9.0]])
    model = nn.Sequential(nn.BatchNorm1d(2))
    found = recalibrate_batchnorm(model, model.state_dict(), [pair, single])
    assert found["0.running_mean"].tolist() == [2.0, 4.0]
