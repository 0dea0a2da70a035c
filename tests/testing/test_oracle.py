"""The oracle is right: against finite differences on every model of the zoo, and where PyTorch itself is wrong."""

from __future__ import annotations

import math
import warnings

import oracle_losses
import pytest
import torch
from assertions import assert_exact, assert_exact_gradients, assert_within_budget, relative_error
from torch import nn
from torch.nn import functional as F
from zoo import ENTRIES

import aajr_kernels as aajr
from aajr_kernels.testing import oracle


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------- finite differences of the penalty
@pytest.mark.parametrize("name", ENTRIES)
def test_gradients_agree_with_finite_differences_of_the_loss(name):
    """<gradient, d> for one random d over every parameter, x and v, against values of the loss alone."""
    subject = ENTRIES[name]().double()
    v = normal(1, *subject.x.shape)
    with oracle.oracle_mode():
        shape = subject.tensor(subject.x).shape
    probe = 0.1 * normal(*shape, seed=1)
    if subject.mask is not None:
        # A padding row may have nothing to attend to. Eager attention then adds the dtype's minimum to every score,
        # which absorbs them: the function is flat in floating point, and its derivative is not.
        probe = probe * subject.mask[..., None]
    options = dict(metric=subject.metric, probe=probe, mask=subject.mask)
    gradients = oracle_losses.loss_and_gradients(
        subject.tensor, subject.x, v, subject.parameters, **options
    ).gradients

    leaves = {**subject.parameters, "x": subject.x, "v": v}
    scales = {key: max(leaf.detach().std(correction=0).item(), 0.1) for key, leaf in leaves.items()}
    directions = {
        key: scales[key] * normal(*leaf.shape, seed=i) for i, (key, leaf) in enumerate(leaves.items())
    }
    # a small step: two of the models have kinks (ReLU) that a larger one crosses
    slope = oracle.finite_difference(
        lambda: oracle_losses.loss_of(subject.tensor, subject.x, v, **options).loss,
        leaves,
        directions,
        step=1e-5,
    )
    expected = sum((g * directions[key]).sum().item() for key, g in gradients.items() if g is not None)
    assert slope == pytest.approx(expected, rel=1e-7)
    assert {key for key, g in gradients.items() if g is None} == set(ENTRIES[name].idle)


@pytest.mark.parametrize(
    "name", ["llama-sdpa-pad_left", "gemma2-eager", "bert-eager", "mixtral-sdpa-grouped_mm"]
)
def test_tangents_agree_with_finite_differences_of_the_values(name):
    subject = ENTRIES[name]().double()
    v = normal(3, *subject.x.shape)
    outcome = oracle_losses.loss_of(subject.tensor, subject.x, v, metric="l2")
    for direction, tangent in zip(v, outcome.tangents, strict=True):
        difference = oracle_losses.tangent_by_differences(subject.tensor, subject.x, direction, step=1e-4)
        assert_exact(difference, tangent, tolerance=1e-8)


# --------------------------------------------------------------------------------------- the metrics' meaning
def test_fisher_is_the_curvature_of_the_divergence_and_probs_the_jacobian_of_softmax():
    z, z_tan, t = normal(5, 11), normal(2, 5, 11, seed=1), 1e-4
    p, moved = z.log_softmax(-1), (z + t * z_tan).log_softmax(-1)
    divergence = (p.exp() * (p - moved)).sum(-1)
    assert_exact(oracle.metric_values(z, z_tan, "fisher"), 2 * divergence / t**2, tolerance=1e-3)
    jacobian = torch.stack([torch.func.jvp(lambda z: z.softmax(-1), (z,), (tan,))[1] for tan in z_tan])
    assert_exact(oracle.metric_values(z, z_tan, "probs"), jacobian.square().sum(-1), tolerance=1e-14)
    assert_exact(oracle.metric_values(z, z_tan, "logits"), z_tan.square().sum(-1), tolerance=1e-15)


def test_mean_counts_tangents_times_units():
    q, mask = normal(3, 2, 4), torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert_exact(oracle.mean_over_units(q, mask), q[:, mask].mean(), tolerance=1e-15)


# ---------------------------------------------------------------------------------------- hand-written layers
def _layers():
    w, b = 1 + normal(6, seed=2), normal(6, seed=3)
    image_w, mean, var = normal(4, seed=5), normal(4, seed=6), 0.5 + normal(4, seed=7) ** 2
    mask = normal(5, 7, seed=8) > -0.3
    mask[:, 0] = True
    kv = normal(2, 2, 7, 6, seed=9)
    return {
        "layer_norm": ((3, 6), lambda x: F.layer_norm(x, (6,), w, b, 1e-5)),
        "layer_norm_two_axes": ((2, 3, 6), lambda x: F.layer_norm(x, (3, 6))),
        "torch.layer_norm": ((3, 6), lambda x: torch.layer_norm(x, (6,), w, None, 1e-3)),
        "rms_norm": ((3, 6), lambda x: F.rms_norm(x, (6,), w)),
        "group_norm": ((3, 4, 5), lambda x: F.group_norm(x, 2, image_w, image_w + 1)),
        "instance_norm": ((3, 4, 5), lambda x: F.instance_norm(x, weight=image_w)),
        "batch_norm_training": ((3, 4, 5), lambda x: F.batch_norm(x, None, None, image_w, training=True)),
        "batch_norm_eval": ((3, 4, 5), lambda x: F.batch_norm(x, mean, var, image_w, image_w - 1)),
        "torch.batch_norm": (
            (3, 4),
            lambda x: torch.batch_norm(x, image_w, None, None, None, True, 0.1, 1e-5, False),
        ),
        "attention": ((2, 4, 5, 6), lambda x: F.scaled_dot_product_attention(x, x, x.flip(-1))),
        "attention_causal": ((2, 4, 5, 6), lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)),
        "attention_boolean": (
            (2, 4, 5, 6),
            lambda x: F.scaled_dot_product_attention(x, kv, kv, mask, scale=0.7, enable_gqa=True),
        ),
        "attention_bias": (
            (2, 2, 5, 6),
            lambda x: F.scaled_dot_product_attention(
                x, kv, kv, normal(5, 7).masked_fill(~mask, -math.inf) + x.mean((0, 1, 3))[:, None]
            ),
        ),
    }


@pytest.mark.parametrize("name", _layers())
def test_hand_written_layers_agree_with_torch(name):
    """Values and tangents; torch's own are right there, it is the gradient of the tangent that is not."""
    shape, layer = _layers()[name]
    x, v = normal(*shape), normal(*shape, seed=1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = torch.func.jvp(layer, (x,), (v,))
    with oracle.oracle_mode():
        actual = torch.func.jvp(layer, (x,), (v,))
    assert_exact(actual[0], expected[0], "value", tolerance=1e-13)
    assert_exact(actual[1], expected[1], "tangent", tolerance=1e-13)
    assert expected[1].norm() > 0.01


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_an_empty_attention_row_is_zero_with_zero_gradients(kind):
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[1] = False
    if kind == "additive":
        mask = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, -math.inf)

    def layer(x):
        return F.scaled_dot_product_attention(x, x, x, mask)

    outcome = oracle_losses.loss_and_gradients(
        layer, normal(1, 2, 5, 4), normal(1, 1, 2, 5, 4), {}, metric="l2"
    )
    assert outcome.primal[..., 1, :].eq(0).all()
    assert outcome.tangents[..., 1, :].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in outcome.gradients.values())


def test_grouped_mm_agrees_with_torch():
    a, b = normal(7, 8).float(), normal(3, 8, 4).float()
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)
    expected = F.grouped_mm(a, b, offs=offsets)
    with oracle.oracle_mode(float64=False):
        assert_exact(F.grouped_mm(a, b, offs=offsets), expected, tolerance=1e-6)


# -------------------------------------------------------------------------------------------- float64 is kept
def test_casts_to_low_dtypes_become_float64():
    x = normal(3, 4)
    positions = torch.arange(3)
    with oracle.KeepFloat64():
        results = {
            "to": x.to(torch.float32),
            "to_keyword": x.to(dtype=torch.bfloat16),
            "float": x.float(),
            "half": x.half(),
            "integer.float": positions.float(),
            "type": x.type(torch.float32),
            "type_name": x.type("torch.FloatTensor"),
            "softmax": F.softmax(x, -1, dtype=torch.float32),
            "method_softmax": x.softmax(-1, dtype=torch.float32),
            "sum": x.sum(-1, dtype=torch.float32),
            "new": torch.zeros(3, dtype=torch.float32),
            "default": torch.zeros(3),
            "literal": torch.tensor([1.0]),
        }
        assert x.to(torch.int64).dtype == torch.int64
    assert {name: y.dtype for name, y in results.items()} == dict.fromkeys(results, torch.float64)
    assert torch.equal(results["to"], x)
    assert torch.zeros(1).dtype == torch.float32


class Wrapper:
    """A tensor-like class whose methods torch does not see."""

    def __init__(self, x):
        self.x = x

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func(*(arg.x if isinstance(arg, Wrapper) else arg for arg in args), **(kwargs or {}))

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "x"), name)


for _name in (*oracle._DTYPE_METHODS, "float", "half", "bfloat16", "double"):
    setattr(
        Wrapper, _name, lambda self, *args, _name=_name, **kwargs: getattr(self.x, _name)(*args, **kwargs)
    )


def test_casts_of_tensor_like_classes_are_kept_too_and_restored():
    x, method = Wrapper(normal(3)), Wrapper.to
    with oracle.KeepFloat64(Wrapper):
        assert (
            x.to(torch.float32).dtype == x.float().dtype == x.sum(dtype=torch.float16).dtype == torch.float64
        )
        assert F.softmax(x, -1, dtype=torch.float32).dtype == torch.float64
    assert Wrapper.to is method
    assert x.to(torch.float32).dtype == x.float().dtype == torch.float32


def test_a_float64_llama_needs_it():
    """Its RMS norm and rotary embedding cast to float32: without the mode the values differ at 1e-8."""
    subject = ENTRIES["llama-sdpa"]().double()
    with oracle.KeepFloat64():
        exact = subject.tensor(subject.x)
    assert 1e-9 < relative_error(subject.tensor(subject.x), exact) < 1e-5


# ------------------------------------------------------------------------------------- where PyTorch is wrong
def _norm_problem(kind):
    """A norm between two linear maps, so that its gradient has somewhere to go."""
    first, second = normal(6, 6, seed=4), normal(6, 5, seed=5)
    weight, bias = 1 + 0.3 * normal(6, seed=6), normal(6, seed=7)

    def func(x):
        h = x @ first
        if kind == "layer_norm":
            h = F.layer_norm(h, (6,), weight, bias)
        else:
            h = F.batch_norm(h, None, None, weight, bias, training=True)
        return torch.tanh(h) @ second

    return func, {"first": first, "weight": weight, "bias": bias}


@pytest.fixture(params=("layer_norm", "batch_norm"))
def norm_problem(request):
    func, leaves = _norm_problem(request.param)
    x, v = normal(7, 6), normal(7, 6, seed=1)
    directions = {name: normal(*leaf.shape, seed=20) for name, leaf in leaves.items()}
    # the penalty from values of the function alone: neither the oracle nor a derivative of torch takes part
    by_differences = oracle.finite_difference(
        lambda: oracle_losses.tangent_by_differences(func, x, v).square().sum(-1).mean(), leaves, directions
    )
    for leaf in leaves.values():
        leaf.requires_grad_()

    def slope(gradients):
        return sum((gradients[name] * direction).sum().item() for name, direction in directions.items())

    return func, x, v, leaves, slope, by_differences


def test_stock_pytorch_is_wrong(norm_problem):
    func, x, v, leaves, slope, by_differences = norm_problem
    _, tangent = torch.func.jvp(func, (x,), (v,))
    # the tangent itself is right, its gradient is not
    assert_exact(tangent, oracle_losses.tangent_by_differences(func, x, v), "tangent", tolerance=1e-9)
    stock = slope(oracle_losses.gradients_of(tangent.square().sum(-1).mean(), leaves))
    if math.isclose(stock, by_differences, rel_tol=1e-6):
        pytest.skip(f"torch {torch.__version__} differentiates this tangent correctly")
    assert abs(stock - by_differences) > 0.01 * abs(by_differences)


def test_the_oracle_is_right(norm_problem):
    func, x, v, leaves, slope, by_differences = norm_problem
    gradients = oracle_losses.loss_and_gradients(func, x, v[None], leaves, metric="l2").gradients
    assert slope(gradients) == pytest.approx(by_differences, rel=1e-6)


def test_the_package_is_right(norm_problem):
    func, x, v, leaves, slope, by_differences = norm_problem
    exact = oracle_losses.loss_and_gradients(func, x, v[None], leaves, metric="l2").gradients
    y = func(aajr.dual(x, v))
    gradients = oracle_losses.gradients_of(y.tangent.square().sum(-1).mean(), leaves)
    assert_exact_gradients(gradients, {name: exact[name] for name in leaves}, tolerance=1e-12)
    assert slope(gradients) == pytest.approx(by_differences, rel=1e-6)


def test_running_statistics_of_batch_norm_are_updated_by_the_primal_alone():
    norm, plain = nn.BatchNorm1d(6).double(), nn.BatchNorm1d(6).double()
    x, v = normal(7, 6), normal(7, 6, seed=1)
    norm(aajr.dual(x, v))
    plain(x)
    assert_exact(norm.running_mean, plain.running_mean, tolerance=1e-14)
    assert_exact(norm.running_var, plain.running_var, tolerance=1e-14)
    assert norm.num_batches_tracked == 1


# ------------------------------------------------------------------------------------------------ the budgets
def test_budget_is_twice_the_eager_error_plus_ulps():
    exact = normal(100)
    eager = exact.float() * (1 + 1e-5)
    assert assert_within_budget(exact.float() * (1 + 1.9e-5), eager, exact) < 1
    with pytest.raises(AssertionError, match=r"^logits: error .* is above the budget .* = 2 x eager error"):
        assert_within_budget(exact.float() * (1 + 3e-5), eager, exact, "logits")
    with pytest.raises(AssertionError, match="budget"):
        assert_within_budget(torch.full((100,), math.nan), eager, exact)


def test_a_gradient_that_vanishes_identically_is_measured_against_the_others():
    """Rounding noise in place of an exact zero passes, an error of the size of other gradients' rounding does not."""
    exact = {"w": normal(8, 8), "key.bias": 1e-17 * normal(8)}
    noise = {"w": exact["w"], "key.bias": 1e-13 * normal(8)}
    assert assert_exact_gradients(noise, exact) < 1e-12
    with pytest.raises(AssertionError, match=r"1 of 2 gradients failed:\n  key.bias: relative error"):
        assert_exact_gradients({**noise, "key.bias": 1e-9 * normal(8)}, exact)


def test_gradient_comparison_names_every_failure():
    exact = {"w": normal(4, 4), "b": normal(4), "unused": None}
    assert assert_exact_gradients(dict(exact), exact) == 0
    with pytest.raises(AssertionError, match=r"2 of 3 gradients failed:\n  w: relative .*\n  b: relative "):
        assert_exact_gradients({"w": 1.1 * exact["w"], "b": -exact["b"], "unused": None}, exact)
    with pytest.raises(AssertionError, match="w: no gradient"):
        assert_exact_gradients({**exact, "w": None}, exact)
    with pytest.raises(AssertionError, match="unused: a gradient where"):
        assert_exact_gradients({**exact, "unused": normal(2)}, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(torch.full((2,), math.nan), torch.ones(2)) == math.inf
