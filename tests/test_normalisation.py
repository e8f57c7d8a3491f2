"""Running statistics: one lane is torch's own update, many lanes are the pooled batch, on any ranks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rkdo_dist.batch_norm import BatchStatistics
from rkdo_dist.exchange.group import tree_sum
from tests.ranks import exact_all_reduce, run_ranks

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5, momentum=momentum),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 7),
        nn.BatchNorm1d(7, momentum=momentum),
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in module.named_buffers()}


def step(module: nn.Module, statistics: BatchStatistics, lanes: list[Tensor]) -> None:
    sums = []
    for lane in lanes:
        with statistics.collecting():
            module(lane)
        sums.append(statistics.take())
    statistics.update(tree_sum(torch.stack(sums)))


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_lane_is_torchs_own_update(momentum: float | None, dtype: torch.dtype) -> None:
    ours, plain = network(momentum).to(dtype), network(momentum).to(dtype)
    statistics = BatchStatistics(ours)
    assert statistics.size == 3 * (5 + 7)
    for i in range(4):
        torch.manual_seed(i)
        images = torch.randn(6, 3, 8, 8, dtype=dtype) * (i + 1) + i
        with statistics.collecting():
            out = ours(images)
            sums = statistics.take()
        assert torch.equal(out, plain(images))
        statistics.update(sums)
    tolerance = 2e-7 if dtype == torch.float32 else 1e-14
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=tolerance, atol=tolerance)
    assert ours[1].num_batches_tracked == 4


@pytest.mark.parametrize("sizes", [[4, 4], [4, 4, 4, 4], [2, 9, 3, 5]])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_many_lanes_are_the_pooled_batch(sizes: list[int], offset: float) -> None:
    """One layer over L lanes moves as torch moves it for one forward over all rows together."""
    torch.manual_seed(0)
    lanes = [torch.randn(n, 5, 3, 3) * (i + 1) + i + offset for i, n in enumerate(sizes)]
    ours, plain = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    step(ours, BatchStatistics(ours), lanes)
    plain(torch.cat(lanes))
    torch.testing.assert_close(ours.running_mean, plain.running_mean, rtol=1e-6, atol=1e-6)
    # A lane's mean is known to float32: at 1000 standard deviations from zero that is 1e-4 of the variance.
    torch.testing.assert_close(ours.running_var, plain.running_var, rtol=1e-6 if not offset else 3e-4, atol=0)
    assert ours.num_batches_tracked == plain.num_batches_tracked == 1


def test_controls_plain_torch_and_the_mean_of_variances_are_wrong() -> None:
    """Lanes of alike elements, as the pixels of a channel are: variance within lanes misses most of it."""
    torch.manual_seed(0)
    base = torch.randn(64, 5, 1, 1)
    rows = base + 0.1 * torch.randn(64, 5, 4, 4)
    lanes = list(rows.split(4))
    pooled, plain, averaged = (nn.BatchNorm2d(5, momentum=1.0) for _ in range(3))
    step(pooled, BatchStatistics(pooled), lanes)
    for lane in lanes:
        plain(lane)
    within = torch.stack([lane.transpose(0, 1).flatten(1).var(dim=1) for lane in lanes]).mean(dim=0)
    averaged.running_mean.copy_(pooled.running_mean)
    averaged.running_var.copy_(within)
    modules = {"pooled": pooled, "averaged": averaged, "plain": plain}
    spread = {name: module.eval()(rows).var().item() for name, module in modules.items()}
    trained = torch.cat([nn.BatchNorm2d(5)(lane) for lane in lanes]).var().item()
    assert abs(spread["pooled"] - trained) < 0.02  # what the layers above were trained with
    assert spread["averaged"] > 1.2 * trained
    assert plain.num_batches_tracked == 16  # and it remembers the last lane only
    assert abs(spread["plain"] - trained) > 0.1


def lanes_of_step(i: int) -> list[Tensor]:
    return list(torch.randn(4, 6, 3, 8, 8, generator=torch.Generator().manual_seed(i)))


def run_rank(rank: int, world: int) -> list[np.ndarray]:
    module = network()
    statistics = BatchStatistics(module)
    for i in range(3):
        sums = []
        for lane in lanes_of_step(i)[rank * 4 // world : (rank + 1) * 4 // world]:
            with statistics.collecting():
                module(lane)
            sums.append(statistics.take())
        statistics.update(exact_all_reduce(tree_sum(torch.stack(sums))))
    return [b.numpy() for b in module.buffers()]


def test_the_world_size_changes_no_bit() -> None:
    module = network()
    statistics = BatchStatistics(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    try:
        for i in range(3):
            step(module, statistics, lanes_of_step(i))
    finally:
        torch.set_num_threads(threads)
    expected = [b.numpy() for b in module.buffers()]
    for world in (2, 4):
        for buffers in run_ranks(run_rank, world):
            assert all(np.array_equal(a, b) for a, b in zip(buffers, expected, strict=True))


def test_the_repeated_forward_leaves_no_trace_and_gives_the_same_output() -> None:
    module = network()
    statistics = BatchStatistics(module)
    before = state(module)
    images = torch.randn(6, 3, 8, 8)
    with statistics.collecting():
        first = module(images)
    with statistics.discarding():
        second = module(images)
    assert torch.equal(first, second)
    after = state(module)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [m.momentum for m in module if isinstance(m, nn.modules.batchnorm._BatchNorm)] == [0.1, 0.1]
    assert statistics.take().shape == (statistics.size,)


def test_activations_of_all_lanes_can_be_kept_for_the_backward() -> None:
    """Autograd saves the buffers of each forward; writing to them before its backward would be an error."""
    module = network()
    statistics = BatchStatistics(module)
    outputs, sums = [], []
    for lane in lanes_of_step(0):
        with statistics.collecting():
            outputs.append(module(lane))
            sums.append(statistics.take())
    statistics.update(tree_sum(torch.stack(sums)))
    sum((o * o.detach().cos()).sum() for o in outputs).backward()
    kept = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    for lane in lanes_of_step(0):
        with statistics.discarding():
            out = module(lane)
        (out * out.detach().cos()).sum().backward()
    for a, p in zip(kept, module.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-5)


def test_untracked_and_frozen_batch_norms_are_left_alone() -> None:
    module = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    module[1].eval()
    statistics = BatchStatistics(module)
    assert statistics.size == 3 * 8
    before = state(module[1])
    step(module, statistics, [torch.randn(8, 4) + 3, torch.randn(8, 4)])
    assert all(torch.equal(v, before[k]) for k, v in state(module[1]).items())
    assert module[2].num_batches_tracked == 1
    module.eval()
    step(module, statistics, [torch.randn(8, 4)])
    assert module[2].num_batches_tracked == 1


def test_a_module_without_batch_norm_has_nothing_to_combine() -> None:
    module = nn.Linear(3, 3)
    statistics = BatchStatistics(module)
    assert statistics.size == 0
    step(module, statistics, [torch.randn(2, 3)])


def test_misuse_is_refused_and_leaves_the_module_whole() -> None:
    module = network()
    statistics = BatchStatistics(module)
    images = torch.randn(6, 3, 8, 8)
    before = state(module)
    with pytest.raises(RuntimeError, match="nothing to take"):
        statistics.take()
    with pytest.raises(RuntimeError, match="ran twice"), statistics.collecting():
        [module(images) for _ in range(2)]
    with pytest.raises(RuntimeError, match="nothing to take"):
        statistics.take()
    with pytest.raises(RuntimeError, match="nested"), statistics.collecting(), statistics.discarding():
        pass
    with pytest.raises(RuntimeError), statistics.collecting():
        module(torch.randn(6, 4, 8, 8))
    with pytest.raises(ValueError, match="shape"):
        statistics.update(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        BatchStatistics(nn.Sequential(nn.SyncBatchNorm(3)))
    assert all(torch.equal(v, before[k]) for k, v in state(module).items())
    module(images)  # plain training works as before
    assert module[1].num_batches_tracked == 1


def test_a_teachers_forward_is_normalised_by_its_own_batch_and_leaves_no_trace() -> None:
    """As torch in training, lane by lane, with dropout off; frozen batch norms keep their running statistics."""

    class Frozen(nn.Sequential):
        def train(self, mode: bool = True) -> nn.Sequential:
            super().train(mode)
            self[1].eval()
            return self

    lanes = list(torch.randn(2, 6, 3, 8, 8))
    for kind in (nn.Sequential, Frozen):
        module = kind(*network(), nn.Dropout(0.9))
        for training in (True, False):
            module.train(training)
            before, statistics = state(module), BatchStatistics(module)
            plain = copy.deepcopy(module).train()
            plain[-1].eval()
            wanted = [plain(lane) for lane in lanes]
            with statistics.evaluating():
                got = [module(lane) for lane in lanes]
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            assert not torch.equal(got[0], copy.deepcopy(module).eval()(lanes[0]))  # the control
            assert all(torch.equal(value, before[name]) for name, value in state(module).items())
            assert module.training == training
