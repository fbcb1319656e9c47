"""Gates: range, limits, formulas and what they refuse."""

import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from sb3_agpo.agpo.gates import (
    ConstantGate,
    DisagreementGate,
    Gate,
    InverseVarianceGate,
    MagnitudeGate,
    VarianceSwitch,
    batch_variance,
)

GATES: list[Gate] = [ConstantGate(0.3), DisagreementGate(), MagnitudeGate(), VarianceSwitch(), InverseVarianceGate()]
every_gate = pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)

#: all orders of magnitude that float32 has, and what is no number at all
numbers = st.floats(width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30])
pairs = st.integers(1, 3).flatmap(lambda nu: st.lists(st.tuples(*[numbers] * (2 * nu)), min_size=1, max_size=5))


def gradients(seed: int, n: int = 6, nu: int = 2) -> tuple[th.Tensor, th.Tensor]:
    """Analytic and critic gradients, ``(n, nu)`` each."""
    generator = th.Generator().manual_seed(seed)
    return tuple(th.randn(n, nu, generator=generator, dtype=th.float64) for _ in range(2))  # type: ignore[return-value]


@every_gate
@settings(max_examples=200, deadline=None)
@given(rows=pairs)
def test_weights_lie_between_zero_and_one_whatever_the_gradients(gate: Gate, rows: list[tuple[float, ...]]) -> None:
    analytic, critic = th.tensor(rows).chunk(2, -1)
    weights = gate(analytic, critic, 0)
    assert weights.shape == (len(rows),) and weights.dtype == analytic.dtype
    assert ((weights >= 0.0) & (weights <= 1.0)).all()  # False for NaN


@every_gate
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_dtype_and_device_follow_the_gradients(gate: Gate, dtype: th.dtype) -> None:
    analytic, critic = (gradient.to(dtype) for gradient in gradients(0))
    assert gate(analytic, critic, 3).dtype == dtype


@pytest.mark.parametrize("gate", GATES[1:], ids=lambda gate: type(gate).__name__)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), exponent=st.floats(-15.0, 15.0))
def test_weights_have_no_unit(gate: Gate, seed: int, exponent: float) -> None:
    analytic, critic = (gradient.float() for gradient in gradients(seed))
    factor = 10.0**exponent
    th.testing.assert_close(gate(factor * analytic, factor * critic, 0), gate(analytic, critic, 0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_constant(weight: float) -> None:
    assert ConstantGate(weight)(*gradients(0), 0).tolist() == [weight] * 6


def test_disagreement_by_hand() -> None:
    critic = th.tensor([[1.0, 0.0], [0.0, -1.0], [2.0, 0.0]])  # mean square 2
    analytic = th.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, -4.0]])  # squared distances 0, 9, 25
    assert DisagreementGate(8.0)(analytic, critic, 0).tolist() == pytest.approx([1.0, 16.0 / 25.0, 16.0 / 41.0])
    assert DisagreementGate(0.5)(analytic, critic, 0).tolist() == pytest.approx([1.0, 0.1, 1.0 / 26.0])


def test_disagreement_limits() -> None:
    analytic, critic = gradients(1)
    gate = DisagreementGate()
    assert gate(critic, critic, 0).tolist() == [1.0] * 6
    assert gate(critic + 1e-9 * analytic, critic, 0).min() > 1.0 - 1e-12
    assert gate(critic + 1e9 * analytic, critic, 0).max() < 1e-12
    distances = [gate(critic + size * analytic, critic, 0) for size in (0.1, 1.0, 10.0, 100.0)]
    assert all((near > far).all() for near, far in pairwise(distances))


def test_disagreement_with_a_critic_that_says_nothing() -> None:
    zero = th.zeros(2, 2)
    assert DisagreementGate()(th.tensor([[0.0, 0.0], [1e-3, 0.0]]), zero, 0).tolist() == [1.0, 0.0]


def test_one_bad_sample_leaves_the_others_alone() -> None:
    analytic, critic = gradients(2)
    expected = DisagreementGate()(analytic, critic, 0)
    for value in (th.inf, -th.inf, th.nan, 1e200):
        analytic[4, 1] = value
        weights = DisagreementGate()(analytic, critic, 0)
        assert weights[4] == 0.0
        assert th.equal(weights[[0, 1, 2, 3, 5]], expected[[0, 1, 2, 3, 5]])


def test_magnitude_by_hand() -> None:
    critic = th.tensor([[1.0, 0.0], [0.0, -1.0], [2.0, 0.0]])  # squares 1, 1, 4, mean 2
    analytic = th.tensor([[1.0, 0.0], [0.0, 3.0], [5.0, -5.0]])  # squares 1, 9, 50
    assert MagnitudeGate(4.0, 1.0)(analytic, critic, 0).tolist() == pytest.approx([12 / 15, 12 / 23, 24 / 76])
    assert MagnitudeGate(1.0, 1.0)(analytic, critic, 0).tolist() == pytest.approx([3 / 6, 3 / 14, 6 / 58])


def test_magnitude_with_a_critic_that_is_too_flat() -> None:
    """A simulator whose gradients are all larger is measured by their own median, up to a limit; a rough sample stands out."""
    critic = th.ones(5, 1)  # mean square 1
    for size, unit in ((0.5, 1.0), (2.0, 4.0), (3.0, 9.0), (30.0, 9.0)):
        analytic = size * th.tensor([[1.0], [1.0], [-1.0], [1.0], [100.0]])
        expected = [8 / (8 + (size * x) ** 2 / unit + 1) for x in (1, 1, 1, 1, 100)]
        assert MagnitudeGate(4.0, 3.0)(analytic, critic, 0).tolist() == pytest.approx(expected)


def test_magnitude_gates_of_before_weigh_as_before() -> None:
    analytic, critic = gradients(0)
    old = MagnitudeGate(4.0, 1.0)
    saved = pickle.loads(pickle.dumps(old))
    del saved.flatness
    assert th.equal(saved(3.0 * analytic, critic, 0), old(3.0 * analytic, critic, 0))


def test_magnitude_distrusts_whichever_is_the_outlier() -> None:
    analytic, critic = gradients(1)
    gate = MagnitudeGate()
    assert gate(1e9 * analytic, critic, 0).max() < 1e-12
    assert gate(analytic, 0.0 * critic, 0).tolist() == [0.0] * 6  # nothing to compare with
    assert gate(0.0 * analytic, 0.0 * critic, 0).tolist() == pytest.approx([0.8] * 6)
    outlier = critic.clone()
    outlier[2] *= 1e6
    weights = gate(analytic, outlier, 0)
    assert weights[2] > 0.8 and weights[2] == weights.max()
    # The mixture stays of the critic's order, however rough the simulator
    for size in (1.0, 1e3, 1e6):
        weight = gate(size * analytic, critic, 0).unsqueeze(-1)
        assert (weight * size * analytic).norm(dim=-1).max() < 4.0 * critic.norm(dim=-1).max()


def test_variance_gates_use_the_batch() -> None:
    """The whole batch of a window step gets one weight, from the spread of the gradients and not from their size."""
    analytic, critic = gradients(3)
    variance, critic_variance = (float(((g - g.mean(0)) ** 2).sum() / len(g)) for g in (analytic, critic))
    assert batch_variance(analytic).item() == pytest.approx(variance)
    assert InverseVarianceGate()(analytic, critic, 0).tolist() == pytest.approx(
        [1.0 / variance / (1.0 / variance + 1.0 / critic_variance)] * 6
    )
    ratio = variance / critic_variance
    assert VarianceSwitch(1.01 * ratio)(analytic, critic, 0).tolist() == [1.0] * 6
    assert VarianceSwitch(0.99 * ratio)(analytic, critic, 0).tolist() == [0.0] * 6
    shifted = analytic + 100.0
    for gate in (InverseVarianceGate(), VarianceSwitch(1.01 * ratio)):
        th.testing.assert_close(gate(shifted, critic, 0), gate(analytic, critic, 0))


def test_variance_gates_in_the_limits() -> None:
    analytic, critic = gradients(4)
    constant = th.ones_like(critic)
    for rough, smooth, weight in ((1e9 * analytic, critic, 0.0), (constant, critic, 1.0), (analytic, constant, 0.0)):
        assert VarianceSwitch()(rough, smooth, 0).tolist() == [weight] * 6
        assert InverseVarianceGate()(rough, smooth, 0).tolist() == pytest.approx([weight] * 6, abs=1e-12)


def test_variance_gates_without_any_variance() -> None:
    one = th.tensor([[3.0, -2.0]])
    assert VarianceSwitch()(one, -one, 0).tolist() == [1.0]
    assert InverseVarianceGate()(one, -one, 0).tolist() == [0.5]


def test_variance_gates_distrust_what_overflows() -> None:
    analytic = th.tensor([[1e30], [-1e30]])
    for gate in (VarianceSwitch(), InverseVarianceGate()):
        assert gate(analytic, th.tensor([[1.0], [2.0]]), 0).tolist() == [0.0, 0.0]
        assert gate(analytic, analytic, 0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("preference", [0.0, -4.0, float("nan"), float("inf")])
def test_magnitude_gate_refuses(preference: float) -> None:
    with pytest.raises(ValueError, match=r"`preference` must be positive and finite, got .*; usual values are"):
        MagnitudeGate(preference)


@pytest.mark.parametrize("flatness", [0.5, -1.0, float("nan"), float("inf")])
def test_magnitude_gate_refuses_flatness(flatness: float) -> None:
    with pytest.raises(ValueError, match=r"`flatness` must be finite and at least 1, got .*; usual values are 1 to 10"):
        MagnitudeGate(4.0, flatness)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_constant_gate_refuses(weight: float) -> None:
    with pytest.raises(ValueError, match=r"`weight` must lie in \[0, 1\], got .*; 0 is the critic alone, 1 the simulator"):
        ConstantGate(weight)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("gate,name", [(DisagreementGate, "tolerance"), (VarianceSwitch, "ratio")])
def test_scales_refuse(gate: Callable[[float], Gate], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be positive and finite, got {value!r}; usual values are 1 to 100"):
        gate(value)


def test_gate_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Gate()  # type: ignore[abstract]
