"""The noise convention: endpoints, inverses, and one random stream per sample."""

import pytest
import torch

from mofo import flow
from mofo.flow import SampleStreams


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_time_zero_is_data_and_time_one_is_noise() -> None:
    x = tokens(2, 3, 4)
    x_t, v = flow.corrupt(x, torch.tensor([0.0, 1.0]), SampleStreams(0, range(2)))
    noise = v + x
    torch.testing.assert_close(x_t[0], x[0], rtol=0, atol=0)
    torch.testing.assert_close(x_t[1], noise[1])


def test_clean_undoes_corrupt_at_any_time() -> None:
    x, t = tokens(5, 3, 4), torch.tensor([0.0, 0.01, 0.5, 0.9, 1.0])
    x_t, v = flow.corrupt(x, t, SampleStreams(0, range(5)))
    torch.testing.assert_close(flow.clean(x_t, v, t), x)


def test_an_euler_step_along_the_true_velocity_lands_on_the_line() -> None:
    x, noise = tokens(2, 3, 4), tokens(2, 6, 4)[:, 3:]
    t, s = torch.tensor(0.8), torch.tensor(0.3)
    stepped = flow.step(flow.mix(x, noise, t.expand(2)), noise - x, t, s)
    torch.testing.assert_close(stepped, flow.mix(x, noise, s.expand(2)))


def test_velocity_of_the_true_data_is_the_velocity_and_held_close_to_data() -> None:
    x, t = tokens(3, 3, 4), torch.tensor([1.0, flow.MIN_TIME, 0.01])
    x_t, v = flow.corrupt(x, t, SampleStreams(0, range(3)))
    got = flow.velocity(x_t, x, t)
    torch.testing.assert_close(got[:2], v[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[2], v[2] * 0.01 / flow.MIN_TIME, rtol=1e-4, atol=1e-5)


def draws(streams: SampleStreams) -> list[torch.Tensor]:
    return [streams.uniform(), streams.normal((3, 2)), streams.normal()]


def test_a_sample_draws_the_same_alone_and_in_any_batch() -> None:
    together = draws(SampleStreams(7, [5, 0, 10**13]))
    alone = draws(SampleStreams(7, torch.tensor([10**13])))
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[2:], one, rtol=0, atol=0)


@pytest.mark.parametrize(("seed", "position"), [(0, 1), (1, 0), (1, 1)])
def test_another_seed_or_position_is_another_stream(seed: int, position: int) -> None:
    here, there = SampleStreams(0, [0]).normal((4,)), SampleStreams(seed, [position]).normal((4,))
    assert not (here == there).any()


def test_streams_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draws(SampleStreams(0, range(3)))
    assert (torch.get_rng_state() == before).all()


def test_a_typed_seed_is_the_generator_of_that_seed() -> None:
    [got] = SampleStreams.from_seeds([5]).normal((3, 2))
    expected = torch.randn(3, 2, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
