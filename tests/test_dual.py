"""The number itself: construction, the tensor interface, copies and trees. Rules have their own tests."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import operator
import pickle

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from assertions import assert_exact

import aajr_kernels as aajr
from aajr_kernels import Dual, dual, is_dual, unpack
from aajr_kernels.dual import num_tangents, stack_of

K = pytest.mark.parametrize("k", [1, 3])


def pair(*shape: int, k: int = 1, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape, dtype=dtype), torch.randn((k, *shape), dtype=dtype)


def number(*shape: int, k: int = 1) -> Dual:
    return dual(*pair(*shape, k=k))


# -- construction -----------------------------------------------------------------------------------------------------


@K
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parts(shape, k, dtype):
    x, v = pair(*shape, k=k, dtype=dtype)
    d = dual(x, v)
    assert type(d) is Dual and is_dual(d) and not is_dual(x)
    assert torch.equal(d.primal, x) and torch.equal(d.tangents, v) and d.num_tangents == k
    assert d.stacked.shape == (1 + k, *shape) and d.shape == x.shape and d.dtype == dtype
    if k == 1:
        assert torch.equal(d.tangent, v[0]) and torch.equal(dual(x, v[0]).stacked, d.stacked)
    primal, tangent = unpack(d)
    assert torch.equal(primal, x) and torch.equal(tangent, v[0] if k == 1 else v)
    assert unpack(x) == (x, None)


def test_stack_of_and_num_tangents():
    x, d = torch.ones(2), number(2, k=3)
    assert stack_of(d) is d.stacked and stack_of(x).shape == (1, 2) and stack_of(None) is None
    assert num_tangents(x, None, 1.0) == 0 and num_tangents(x, d) == 3
    with pytest.raises(ValueError, match="Duals with 3 and 1 tangents meet in one operation"):
        d + number(2)


def test_tangent_of_several_directions_raises():
    with pytest.raises(ValueError, match="tangent is defined for one tangent, this Dual has 3: use tangents"):
        number(2, k=3).tangent


@pytest.mark.parametrize(
    ("x", "v", "error", "message"),
    [
        (1.0, torch.ones(()), TypeError, r"x must be a torch\.Tensor, got float"),
        (torch.ones(2), [1.0, 1.0], TypeError, r"v must be a torch\.Tensor, got list"),
        (
            torch.arange(2),
            torch.ones(2),
            TypeError,
            r"x must be floating point, got torch\.int64.*aajr_kernels\.inject",
        ),
        (torch.ones(2), torch.arange(2), TypeError, "v must be floating point, got"),
        (torch.ones(2), torch.ones(2).double(), TypeError, r"v must have the dtype of x \(torch\.float32\)"),
        (torch.ones(2), torch.ones(3), ValueError, r"v must have the shape of x \(2,\) or \[K, \*x\.shape\]"),
        (torch.ones(2), torch.ones(1, 1, 2), ValueError, r"got \(1, 1, 2\)"),
        (torch.ones(2), torch.ones(0, 2), ValueError, "v must hold at least one direction, got K = 0"),
        (
            torch.ones(2),
            torch.ones(2, device="meta"),
            ValueError,
            r"v must be on the device of x \(cpu\), got meta",
        ),
    ],
)
def test_wrong_arguments_of_dual(x, v, error, message):
    with pytest.raises(error, match=message):
        dual(x, v)


def test_nested_duals_raise():
    d = number(2)
    with pytest.raises(TypeError, match="x is already a Dual: nested duals are not supported"):
        dual(d, torch.ones(2))
    with pytest.raises(TypeError, match="v is already a Dual"):
        dual(torch.ones(2), d)


def test_gradients_reach_primal_and_direction():
    x, v = (t.requires_grad_() for t in pair(3, k=2))
    d = dual(x, v)
    (d.primal.sum() + 2 * d.tangents.sum()).backward()
    assert torch.equal(x.grad, torch.ones(3).double()) and torch.equal(
        v.grad, torch.full((2, 3), 2.0).double()
    )


# -- the tensor interface ---------------------------------------------------------------------------------------------

# what a tensor has and a number made of one has not: raw storage protocols, names that torch retired
NOT_THERE = """__array_priority__ __array_wrap__ __cuda_array_interface__ __deepcopy__ __dlpack__ __dlpack_device__
__dlpack_c_exchange_api__ __setstate__ __torch_dispatch__ name volatile""".split()


def test_every_tensor_method_is_present():
    names = [n for n in dir(torch.Tensor) if callable(getattr(torch.Tensor, n)) and n not in NOT_THERE]
    assert len(names) > 500
    assert [n for n in names if not hasattr(Dual, n)] == []


def test_a_method_without_a_rule_says_so():
    with pytest.raises(
        aajr.UnsupportedOperation, match=r"Tensor\.storage has no derivative rule for a Dual: replace"
    ):
        number(2).storage()


def test_properties_are_those_of_the_primal():
    x, v = pair(2, 3, k=3)
    d = dual(x, v)
    for name in (
        *(
            "shape",
            "ndim",
            "dtype",
            "device",
            "layout",
            "is_cuda",
            "is_cpu",
            "is_meta",
            "is_sparse",
            "is_quantized",
        ),
        *("itemsize", "is_nested", "is_mkldnn", "requires_grad", "is_leaf", "grad_fn", "grad"),
    ):
        assert getattr(d, name) == getattr(x, name), name
    for name in (
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "size",
        "element_size",
        "get_device",
        "is_contiguous",
    ):
        assert getattr(d, name)() == getattr(x, name)(), name
    for name in ("is_floating_point", "is_complex", "is_inference", "__len__"):
        assert getattr(d, name)() == getattr(x, name)(), name
    assert d.size(-1) == 3 and d.stride() == x.stride() and d.stride(0) == 3 and len(d) == 2
    assert d.T.shape == d.mT.shape == (3, 2) and not d.T.is_contiguous()


def test_rows_can_be_iterated():
    d = number(3, 2, k=2)
    rows = list(d)
    assert [row.shape for row in rows] == [(2,)] * 3
    assert torch.equal(torch.stack(rows).stacked, d.stacked)
    for what, call in (("len", len), ("iteration", list)):
        with pytest.raises(TypeError, match=rf"{what}.* 0-dimensional Dual"):
            call(number())


BINARY = ("add", "sub", "mul", "truediv", "pow", "matmul", "mod", "floordiv")


CASES = [(n, s) for n in BINARY for s in ("dd", "dt", "td", "ds", "sd") if n != "matmul" or "s" not in s]


@pytest.mark.parametrize(("name", "sides"), CASES)
def test_operators_on_both_sides(name, sides):
    function = getattr(operator, name)
    a, b = (torch.rand(3, 3, dtype=torch.float64) + 1.1 for _ in range(2))
    u, v = (torch.randn(3, 3, dtype=torch.float64) for _ in range(2))
    left = {"d": lambda t: a + t * u, "t": lambda t: a, "s": lambda t: 1.7}[sides[0]]
    right = {"d": lambda t: b + t * v, "t": lambda t: b, "s": lambda t: 1.7}[sides[1]]
    h = 1e-4
    expected = (function(left(h), right(h)) - function(left(-h), right(-h))) / (2 * h)
    y = function(
        {"d": dual(a, u), "t": a, "s": 1.7}[sides[0]],
        {"d": dual(b, v), "t": b, "s": 1.7}[sides[1]],
    )
    assert_exact(y.primal, function(left(0), right(0)))
    assert_exact(y.tangent, expected, tolerance=1e-7)


def test_unary_operators():
    d = number(4, k=2)
    assert torch.equal((-d).stacked, -d.stacked) and torch.equal((+d).stacked, d.stacked)
    assert torch.equal(abs(d).primal, d.primal.abs())
    assert torch.equal(abs(d).tangents, d.primal.sign() * d.tangents)


def test_comparisons_and_integers_are_plain():
    d, x = number(3, 2), torch.zeros(3, 2).double()
    for result in (d == d, d != x, d < x, d > 0, d <= d, d >= 1, d.isnan(), d.eq(x), torch.isfinite(d)):
        assert type(result) is torch.Tensor and result.dtype == torch.bool and result.shape == (3, 2)
    for result in (d.argmax(), d.int(), d.long(), d.argsort(0), torch.count_nonzero(d)):
        assert type(result) is torch.Tensor and not result.is_floating_point()
    assert torch.equal(d > 0, d.primal > 0) and torch.equal(x < d, d.primal > 0)
    assert hash(d) == hash(d) and len({d, d}) == 1


def test_scalars():
    d = dual(torch.tensor(2.5), torch.tensor(1.0))
    assert d.item() == float(d) == 2.5 and int(d) == 2 and bool(d) and d.tolist() == 2.5
    assert f"{d:.2f}" == "2.50" and number(2).tolist() is not None
    with pytest.raises(RuntimeError, match="cannot be converted to Scalar"):
        number(2).item()
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(number(2))


@pytest.mark.parametrize("leave", [np.asarray, np.array, lambda d: d.numpy()])
def test_numpy_raises(leave):
    with pytest.raises(
        aajr.UnsupportedOperation, match=r"NumPy cannot hold a Dual.*y\.primal\.detach\(\)\.numpy\(\)"
    ):
        leave(number(2))


def test_torch_tensor_of_a_dual_raises():
    with pytest.raises(TypeError):
        torch.tensor(number(2))


def test_new_tensors_have_zero_tangents():
    d = number(2, 3, k=2)
    made = [
        torch.zeros_like(d),
        torch.ones_like(d),
        torch.full_like(d, 4.0),
        torch.rand_like(d),
        torch.empty_like(d),
    ]
    made += [d.new_zeros(2, 3), d.new_ones((2, 3)), d.new_full((2, 3), 4.0), d.new_empty(2, 3)]
    for y in made:
        assert is_dual(y) and y.shape == (2, 3) and y.dtype == d.dtype and not y.tangents.any()
    assert torch.equal(made[2].primal, torch.full((2, 3), 4.0).double()) and made[1].primal.eq(1).all()
    whole = torch.zeros_like(d, dtype=torch.long)
    assert type(whole) is torch.Tensor and whole.dtype == torch.long


def test_repr_is_readable():
    d = dual(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]))
    text = repr(d)
    assert text.startswith("Dual(shape=(2,), num_tangents=1, dtype=torch.float32")
    assert "primal=tensor([1., 2.])" in text and "tangents=tensor([[3., 4.]])" in text
    assert repr(number(50, 50, k=3)) == "Dual(shape=(50, 50), num_tangents=3, dtype=torch.float64)"
    assert "requires_grad=True" in repr(number(2).requires_grad_())
    assert "device=meta" in repr(number(2).to("meta")) and str(d) == text


# -- copies and trees -------------------------------------------------------------------------------------------------


def test_copy_deepcopy_pickle():
    d = number(2, 3, k=2)
    assert copy.copy(d).stacked is d.stacked
    for twin in (copy.deepcopy(d), pickle.loads(pickle.dumps(d)), d.clone()):
        assert type(twin) is Dual and torch.equal(twin.stacked, d.stacked)
        assert twin.stacked.data_ptr() != d.stacked.data_ptr()


def test_save_and_load(tmp_path):
    d = number(2, k=3)
    torch.save({"d": d}, tmp_path / "d.pt")
    assert torch.equal(torch.load(tmp_path / "d.pt", weights_only=False)["d"].stacked, d.stacked)


def test_it_is_a_pytree_node():
    d = number(2)
    leaves, spec = pytree.tree_flatten({"a": [d, 1]})
    assert leaves[0] is d.stacked and leaves[1] == 1
    again = pytree.tree_unflatten(leaves, spec)["a"][0]
    assert type(again) is Dual and again.stacked is d.stacked
    mapped = pytree.tree_map(lambda t: t * 2 if isinstance(t, torch.Tensor) else t, {"a": d})
    assert torch.equal(mapped["a"].stacked, 2 * d.stacked)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path((d,))[0]]
    assert paths == ["[0].stacked"]


def test_it_is_a_dataclass_that_distributed_code_can_walk():
    """DDP and FSDP look for tensors in the fields of dataclasses and rebuild them with ``dataclasses.replace``."""
    d = number(2, 3)
    assert dataclasses.is_dataclass(d) and [f.name for f in dataclasses.fields(d)] == ["stacked"]

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if dataclasses.is_dataclass(value):
            value = [getattr(value, f.name) for f in dataclasses.fields(value)]
        return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []

    assert tensors((d, [d]))[0] is d.stacked
    from torch.distributed.utils import _apply_to_tensors
    from torch.nn.parallel.distributed import _find_tensors

    assert [t is d.stacked for t in _find_tensors((d,))] == [True]
    moved = _apply_to_tensors(lambda t: t + 1, {"x": (d,)})["x"][0]
    assert type(moved) is Dual and torch.equal(moved.stacked, d.stacked + 1)


def test_a_dual_is_real_where_it_is_made_and_measured():
    z = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="a Dual is real"):
        aajr.dual(z, z)
    for metric in ("l2", "logits", "fisher", "probs"):
        with pytest.raises(aajr.UnsupportedOperation, match="got complex numbers"):
            aajr.aligned_penalty(lambda d: d * 1j, torch.ones(2, 3), torch.ones(2, 3), metric=metric)
    with pytest.raises(aajr.UnsupportedOperation, match="got complex numbers"):
        aajr.linear(number(3) * 1j, torch.ones(2, 3, dtype=torch.complex128))
    with pytest.raises(aajr.UnsupportedOperation, match="no derivative rule for complex numbers"):
        torch.nn.functional.gelu(number(3) * 1j)


def test_an_integer_reduction_is_plain():
    total = number(3).sum(dtype=torch.long)
    assert isinstance(total, torch.Tensor) and total.dtype == torch.long


@pytest.mark.parametrize("shapes", [((), ()), ((), (3,)), ((3,), ()), ((3,), (3,))])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "pow", "maximum"])
def test_dtypes_promote_as_in_torch(name, shapes):
    function = getattr(torch, name)
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
    for left, right in itertools.product(dtypes, repeat=2):
        a, b = ((torch.rand(shape) * 3 + 1).to(t) for shape, t in zip(shapes, (left, right)))
        for duals in ("d ", " d", "dd"):
            if any(flag == "d" and not x.is_floating_point() for flag, x in zip(duals, (a, b))):
                continue
            y = function(
                *(dual(x, torch.ones_like(x)) if flag == "d" else x for flag, x in zip(duals, (a, b)))
            )
            assert y.dtype == function(a, b).dtype, (left, right, duals)
