"""Layers beyond what the sweep's table covers: state, masks, in-place forms, errors, low precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rules.check import check
from torch import Tensor, nn

import aajr_kernels as aajr
from aajr_kernels import UnsupportedOperation, dual


def made(*shape: int, k: int = 2, dtype: torch.dtype = torch.float64) -> aajr.Dual:
    return dual(torch.randn(*shape, dtype=dtype), torch.randn(k, *shape, dtype=dtype))


# -- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 5), (2, 4, 3, 2)])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_batch_norm_updates_its_statistics_once_and_as_torch(
    shape: tuple[int, ...], momentum: float | None
) -> None:
    layer = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    plain, ours = layer(4, momentum=momentum).double(), layer(4, momentum=momentum).double()
    for _ in range(2):
        x = made(*shape)
        expected = plain(x.primal)
        torch.testing.assert_close(ours(x).primal, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running_mean, plain.running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.running_var, plain.running_var, rtol=1e-12, atol=1e-14)
        assert ours.num_batches_tracked == plain.num_batches_tracked
    plain.eval(), ours.eval()
    torch.testing.assert_close(ours(x).primal, plain(x.primal), rtol=1e-12, atol=1e-12)


def test_batch_norm_in_training_with_its_statistics_is_exact() -> None:
    def fn(x: Tensor, weight: Tensor) -> Tensor:
        return F.batch_norm(x, torch.zeros(4).double(), torch.ones(4).double(), weight, training=True)

    check(fn, (torch.randn(3, 4, 2).double(), torch.randn(4).double()), 3, duals=(0, 1), upstream=False)


def test_instance_norm_updates_its_statistics_as_torch() -> None:
    plain = nn.InstanceNorm1d(4, affine=True, track_running_stats=True).double()
    ours = nn.InstanceNorm1d(4, affine=True, track_running_stats=True).double()
    x = made(3, 4, 5)
    torch.testing.assert_close(ours(x).primal, plain(x.primal), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.running_mean, plain.running_mean)
    torch.testing.assert_close(ours.running_var, plain.running_var)
    assert ours(made(4, 5)).shape == (4, 5)  # without a batch axis


def test_norm_modules_are_exact() -> None:
    x = torch.randn(3, 4, 5).double()
    for layer in (
        nn.LayerNorm(5),
        nn.RMSNorm(5),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4).eval(),
        nn.SyncBatchNorm(4).eval(),
    ):
        layer = layer.double()
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        check(layer, (x,), 2, upstream=False)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: F.group_norm(x, 3), "num_groups"),
        (lambda x: F.batch_norm(x[:1, :, 0], None, None, training=True), "more than one value per channel"),
        (lambda x: F.batch_norm(x, None, None), "running_mean and running_var"),
        (lambda x: F.instance_norm(x[..., :1]), "more than one value"),
        (lambda x: F.instance_norm(x, use_input_stats=False), "running_mean and running_var"),
        (lambda x: F.dropout(x, 1.5), "between 0 and 1"),
        (lambda x: F.glu(x[..., :3]), "even size"),
    ],
)
def test_errors_name_the_argument(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(made(3, 4, 5))  # type: ignore[operator]


# -- embedding ------------------------------------------------------------------------------------------------------


def test_embedding_of_a_dual_table_drops_the_gradient_of_the_padding_row() -> None:
    weight, v = torch.randn(5, 3).double().requires_grad_(), torch.randn(2, 5, 3).double().requires_grad_()
    ids = torch.tensor([[0, 1], [4, 0]])
    y = F.embedding(ids, dual(weight, v), padding_idx=0)
    torch.testing.assert_close(y.tangents, v[:, ids])
    (y.primal.sum() + y.tangents.sum()).backward()
    assert (weight.grad[0] == 0).all() and (v.grad[:, 0] == 0).all()
    assert (weight.grad[[1, 4]] == 1).all() and (v.grad[:, [1, 4]] == 1).all()


def test_embedding_refuses_what_it_cannot_do() -> None:
    ids, table = torch.tensor([1]), made(4, 3)
    with pytest.raises(UnsupportedOperation, match="max_norm"):
        F.embedding(ids, table, max_norm=1.0)
    with pytest.raises(TypeError, match="integer indices"):
        F.embedding(made(3), table)
    with pytest.raises(UnsupportedOperation, match="embedding_bag"):
        F.embedding_bag(ids[None], table, mode="max")


# -- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [F.dropout, F.dropout2d, torch.dropout, nn.Dropout(0.4)])
@pytest.mark.parametrize("k", [1, 3])
def test_dropout_takes_one_mask_and_torchs_own(function: object, k: int) -> None:
    x = made(3, 4, 5, 2, k=k)
    args = (0.4, True) if function is torch.dropout else (() if isinstance(function, nn.Module) else (0.4,))
    torch.manual_seed(5)
    y = function(x, *args)  # type: ignore[operator]
    torch.manual_seed(5)
    expected = function(x.primal, *args)  # type: ignore[operator]
    torch.testing.assert_close(y.primal, expected, rtol=1e-15, atol=0)
    mask = expected != 0
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(y.tangents, x.tangents * mask / 0.6)


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout", "dropout"])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_at_the_ends(name: str, p: float) -> None:
    x = made(3, 4, 5)
    torch.manual_seed(1)
    y = getattr(F, name)(x, p, True)
    torch.manual_seed(1)
    torch.testing.assert_close(y.primal, getattr(F, name)(x.primal, p, True))
    assert y.tangents.isfinite().all()
    assert getattr(F, name)(x, p, False).stacked is x.stacked


def test_native_dropout_returns_its_mask() -> None:
    x = made(6, 7)
    y, mask = torch.native_dropout(x, 0.5, True)
    torch.testing.assert_close(y.tangents, x.tangents * mask * 2)


# -- activations ----------------------------------------------------------------------------------------------------

INPLACE = [
    F.relu,
    F.silu,
    F.mish,
    F.elu,
    F.selu,
    F.celu,
    F.leaky_relu,
    F.relu6,
    F.hardtanh,
    F.hardswish,
    F.hardsigmoid,
]


@pytest.mark.parametrize("function", [*INPLACE, torch.relu_, torch.tanh_, torch.sigmoid_, F.elu_, F.dropout])
def test_in_place_forms_write_their_input(function: object) -> None:
    kwargs = {"inplace": True} if function in INPLACE or function is F.dropout else {}
    source = torch.randn(3, 4).double().requires_grad_()
    x = dual(source, torch.randn(3, 4).double()) * 2
    torch.manual_seed(2)
    out_of_place = {
        torch.relu_: torch.relu,
        torch.tanh_: torch.tanh,
        torch.sigmoid_: torch.sigmoid,
        F.elu_: F.elu,
    }
    expected = out_of_place.get(function, function)(x * 1)  # type: ignore[operator]
    torch.manual_seed(2)
    y = function(x, **kwargs)  # type: ignore[operator]
    assert y is x
    torch.testing.assert_close(y.stacked, expected.stacked)
    (gradient,) = torch.autograd.grad(y.stacked.square().sum(), source, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(expected.stacked.square().sum(), source)
    torch.testing.assert_close(gradient, expected_gradient)


def test_activation_modules_are_exact() -> None:
    x = torch.randn(3, 4).double()
    for layer in (
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(inplace=True),
        nn.PReLU(4).double(),
        nn.Softplus(2.0),
        nn.GLU(),
        nn.Tanh(),
    ):
        check(lambda z, f=layer: f(z * 1), (x,), 2, upstream=False)


@pytest.mark.parametrize(
    "function", [F.gelu, F.elu, F.softplus, F.mish, lambda x: F.layer_norm(x, (4,)), F.hardswish]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_its_dtype(function: object, dtype: torch.dtype) -> None:
    x = made(3, 4)
    low = dual(x.primal.to(dtype), x.tangents.to(dtype))
    y, exact = function(low), function(x)  # type: ignore[operator]
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.stacked.double(), exact.stacked, rtol=8 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps
    )


# -- convolution, pooling, losses -----------------------------------------------------------------------------------


def test_convolution_under_autocast_follows_torch() -> None:
    layer, x = nn.Conv1d(4, 6, 3), made(2, 4, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), layer(x.primal)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y.primal, expected, rtol=0.02, atol=0.02)


def test_vision_stem_is_exact() -> None:
    stem = nn.Sequential(
        nn.Conv2d(3, 4, 2, 2),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    check(stem.double().eval(), (torch.randn(2, 3, 6, 6).double(),), 3, upstream=False)


def test_max_pool_returns_plain_indices() -> None:
    x = made(2, 3, 6)
    y, indices = F.max_pool1d(x, 2, return_indices=True)
    expected, expected_indices = F.max_pool1d(x.primal, 2, return_indices=True)
    assert torch.equal(indices, expected_indices) and torch.equal(y.primal, expected)
    torch.testing.assert_close(y.tangents, x.tangents.gather(-1, indices.expand(2, *indices.shape)))


def test_losses_with_every_target_ignored_are_as_in_torch() -> None:
    x, target = made(3, 4), torch.full((3,), -100)
    assert F.cross_entropy(x, target).primal.isnan()
    y = F.cross_entropy(x, target, reduction="sum")
    assert y.primal == 0 and (y.tangents == 0).all()


def test_losses_refuse_dual_weights() -> None:
    x, target = made(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(UnsupportedOperation, match="weight"):
        F.cross_entropy(x, target, weight=made(4))
    with pytest.raises(UnsupportedOperation, match="weight"):
        F.nll_loss(x, target, weight=made(4))


def test_linear_cross_entropy_is_exact() -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no F.linear_cross_entropy")
    target = torch.tensor([1, 0, 4])
    args = (torch.randn(3, 4).double(), torch.randn(5, 4).double())
    check(lambda x, w: F.linear_cross_entropy(x, w, target), args, 2, duals=(0, 1))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo
@pytest.mark.parametrize(
    "layer",
    [
        nn.ELU(0.7),
        nn.CELU(0.7, inplace=True),
        nn.LeakyReLU(0.2),
        nn.Hardtanh(-0.5, 0.5),
        nn.RReLU(inplace=True).eval(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_torch_compile_gives_the_argument_inplace_by_position(layer: nn.Module) -> None:
    """The builtins have another argument in its place: the scale of ELU, for example."""

    def parts(x: Tensor, v: Tensor) -> Tensor:
        return layer(dual(x, v) * 1).stacked

    x, v = torch.randn(2, 5), torch.randn(2, 5)
    torch.compiler.reset()
    compiled = torch.compile(parts, backend="eager", fullgraph=True)(x, v)
    torch.testing.assert_close(compiled, parts(x, v))
