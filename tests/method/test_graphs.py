"""CUDA graphs without a device: that a step reads no value, and that its replays compute what it computes.

The first on meta tensors, where launchers run and kernels do not; the second by a graph that is emulated on the CPU:
it notes the operators of a capture and repeats them in the same memory.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.transformers.subjects import tiny
from ops.op_checks import record_calls
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aajr_kernels as aajr
from aajr_kernels.backends import capture, operator
from aajr_kernels.backends.triton import launch as gpu
from aajr_kernels.method import graphs
from aajr_kernels.ops.attention import packed

NEEDS_TRITON = pytest.mark.skipif(gpu._not_installed() is not None, reason=str(gpu._not_installed()))


class OnDevice(TorchDispatchMode):
    """Fails where the host would wait for a device, which here is ``meta``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.is_meta for x in tensors):
            reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.intersection(func.tags)
            if func is torch.ops.aten.index.Tensor:  # of integers
                reads = any(x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None)
            # numbers on the CPU become arguments of a kernel, more would be copied
            moves = any(not x.is_meta and x.dim() for x in tensors)
            assert not reads and not moves, f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            assert result.is_meta == tensors[0].is_meta, "a copy between host and device"
        return result


@pytest.fixture
def capturing(monkeypatch):
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)


@pytest.fixture
def on_meta(monkeypatch, capturing):
    """Launchers for sm_90 on meta tensors, seen operator by operator."""
    monkeypatch.setattr(operator, "has_dispatch_modes", lambda: False)
    with gpu.dry_run("sm_90") as launched, aajr.use_backend("triton"):
        yield launched


def llama(hidden: int = 32) -> Any:
    return tiny("llama", num_hidden_layers=2, hidden_size=hidden)


def steps_of(model: Any, metric: str = "fisher") -> dict[str, Any]:
    """A penalty step and an AAJR step of a language model, of embeddings, directions and labels."""

    def policy(x: Any, attention_mask: Any = None) -> Any:
        options = dict(attention_mask=attention_mask, use_cache=False)
        return model.model(inputs_embeds=x, **options).last_hidden_state

    def penalty_step(x: Any, v: Any, labels: Any, mask: Any) -> Any:
        penalty, loss = aajr.aligned_penalty(
            lambda d: policy(d, mask),
            x,
            v,
            metric=metric,
            head=model.lm_head,
            labels=labels,
            return_primal=True,
            penalty_weight=0.1,
            mask=mask,
        )
        (loss + 0.1 * penalty).backward()
        return loss, penalty

    def aajr_step(x: Any, v: Any, labels: Any, mask: Any) -> Any:
        loss_fn = aajr.lm_loss(lambda d: policy(d, mask), head=model.lm_head, labels=labels)
        options: dict[str, Any] = dict(step_size=torch.full((x.shape[0],), 0.05, device=x.device), mask=mask)
        traj = aajr.ascend(loss_fn, x, radius=0.2, steps=2, module=model, scope="token", **options)
        penalty, statistics = aajr.trajectory_penalty(
            lambda d, attention_mask: policy(d, attention_mask),
            x,
            traj,
            inputs={"attention_mask": mask},
            batch_steps=2,
            weights=[1.0, 3.0],
            head=model.lm_head,
            metric=metric,
        )
        worst, _ = aajr.trajectory_penalty(
            lambda d: policy(d, mask), x, traj, steps="worst", head=model.lm_head
        )
        (penalty + worst).backward()
        return penalty, worst, traj.losses, traj.points, statistics.q

    return {"penalty": penalty_step, "aajr": aajr_step}


def inputs_of(model: Any, length: int = 9, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, 2, length, model.config.hidden_size, generator=generator)
    labels = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    labels[0, :2] = -100
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, : 2 + seed] = 0
    return [x, v, labels, mask]


def adds_on_meta() -> bool:
    """Whether addmm takes `out_dtype` on ``meta``; torch 2.11 mistakes it there for `beta`."""
    a, total = (torch.empty(2, 2, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32)
    except TypeError:
        return False
    return True


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["penalty", "aajr"])
def test_a_step_of_a_fused_llama_never_waits_for_the_device(on_meta, monkeypatch, name):
    pytest.importorskip("transformers")
    from aajr_kernels.integrations.transformers import fuse
    from aajr_kernels.ops.head import products
    from aajr_kernels.ops.head import triton as head

    for attribute, value in (("_JOINT_SIZE_LOW", 1), ("_KEPT_LEAST", 1 << 24)):
        monkeypatch.setattr(head, attribute, value)
    offered = {"mm": True, "addmm": adds_on_meta()}
    monkeypatch.setattr(products, "_offers", lambda device, name: offered[name])  # of the warm-up
    passes = record_calls(monkeypatch, head, ("head_fwd", "head_joint"))
    with monkeypatch.context() as patch:
        patch.setattr(capture, "is_capturing", lambda device: False)
        with aajr.use_backend("auto"):
            model = llama()
            fuse(model)
    model = model.to("meta", torch.bfloat16)
    inputs = [x.to("meta", torch.bfloat16 if x.is_floating_point() else None) for x in inputs_of(model)]
    with OnDevice():
        steps_of(model)[name](*inputs)
    names = {kernel.__name__ for kernel in on_meta}
    assert {"_attention_fwd_kernel", "_attention_bwd_q_kernel", "_head_bwd_kernel"} <= names, names
    assert model.model.layers[0].mlp.down_proj.weight.grad is not None
    assert passes[-1] == "head_joint"  # not followed by another form


@NEEDS_TRITON
def test_packed_attention_never_waits_for_the_device(on_meta):
    x, v = torch.empty(2, 40, 32, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(3, 32, 32, dtype=torch.bfloat16, device="meta").requires_grad_()
    offsets = torch.empty(4, dtype=torch.int32, device="meta")

    def policy(d: Any) -> Any:
        q, k, v = (aajr.linear(d, w).reshape(40, 2, 16).transpose(0, 1) for w in weight)
        return aajr.attention(q, k, v, causal=True, cu_seqlens=offsets).transpose(0, 1).reshape(40, 32)

    with OnDevice():
        aajr.aligned_penalty(policy, x, v, metric="l2").backward()
    assert weight.grad is not None and "_attention_fwd_kernel" in {kernel.__name__ for kernel in on_meta}


@pytest.mark.parametrize(
    "read",
    [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.cpu(), lambda x: x[[0]], torch.nonzero],
)
def test_what_waits_is_found_in_a_backward_too(read):
    x = torch.ones(3, device="meta", requires_grad=True)
    x.register_hook(lambda bar: read(bar) and None)
    with OnDevice(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        (2 * x).sum().backward()


def test_offsets_on_a_device_are_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x) or [0, 4, 9])
    read = lambda x: packed.packed_sequences((1, 2, 9, 8), (1, 2, 9, 8), x.device, False, x).bounds
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    assert [read(offsets) for _ in range(3)] == [([0, 4, 9],) * 2] * 3 and len(reads) == 1
    offsets.add_(1)
    assert read(offsets) and len(reads) == 2
    assert read(offsets.clone()) and len(reads) == 3
    on_cpu = torch.tensor([0, 4, 9])  # which NumPy may write without notice
    assert read(on_cpu) and read(on_cpu) and len(reads) == 5


# -- replays ----------------------------------------------------------------------------------------------------------


class Emulated(TorchDispatchMode):
    """A graph on the CPU: notes operators, and repeats them in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, torch.Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


@pytest.fixture
def emulated(monkeypatch):
    """``graphed`` captures on the CPU, the operators of torch: kernels of other backends would not be seen."""
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(emulation, stream):
        with monkeypatch.context() as patch, emulation:
            patch.setattr(capture, "is_capturing", lambda device: True)
            yield

    monkeypatch.setattr("aajr_kernels.method.expected._number", lambda x: x)  # the CPU's would be read
    monkeypatch.setattr(graphs, "_device_of", lambda example: torch.device("cpu"))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Emulated)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    with aajr.use_backend("reference"):
        yield


@pytest.mark.parametrize("name", ["penalty", "aajr"])
def test_a_replay_computes_the_step_of_its_inputs(emulated, name):
    pytest.importorskip("transformers")
    model = llama()
    step = steps_of(model)[name]
    parameters = [p for p in model.parameters() if p is not model.model.embed_tokens.weight]
    replay = aajr.graphed(step, inputs_of(model), module=model)
    assert all(p.grad is None for p in parameters)
    for seed in (1, 2):
        inputs = inputs_of(model, seed=seed)
        results = [x.clone() for x in replay(*inputs)]
        gradients = [p.grad.clone() for p in parameters]
        model.zero_grad()
        expected = step(*inputs)
        for ours, theirs in zip([*results, *gradients], [*expected, *(p.grad for p in parameters)]):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
        model.zero_grad()
        with torch.no_grad():  # as an optimizer does
            model.lm_head.weight.mul_(1.1)


def test_random_steps_are_drawn_by_every_replay(emulated):
    x = torch.randn(64, 3)

    def step(x: Any) -> Any:
        traj = aajr.ascend(lambda y: y.pow(3).sum(-1), x, radius=1.0, steps=4, step_size=0.1)
        return aajr.trajectory_penalty(lambda d: d * d, x, traj, steps="random", metric="l2")[1].steps

    replay = aajr.graphed(step, (x,))
    first, second = (replay(x).clone() for _ in range(2))
    assert set(first.flatten().tolist()) == {0, 1, 2, 3} and not torch.equal(first, second)


def test_inputs_are_those_of_the_capture(emulated):
    replay = aajr.graphed(lambda x, k: {"y": x * k}, (torch.ones(3), 2))
    assert replay(torch.full((3,), 5.0), 2)["y"].tolist() == [10.0] * 3
    with pytest.raises(
        ValueError, match=r"like those of the capture, torch.float32 \(3,\) on cpu, got .*\(4,\) on cpu"
    ):
        replay(torch.ones(4), 2)
    with pytest.raises(ValueError, match="part of the graph, 2, got 3: pass a tensor"):
        replay(torch.ones(3), 3)
    with pytest.raises(ValueError, match="structure of example"):
        replay(torch.ones(3))


def test_the_last_call_before_the_capture_reads_no_value_either(emulated, monkeypatch):
    """Fused masks, packed offsets and heads take other kernels where values are not read: they have to be loaded."""
    device, seen = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    aajr.graphed(lambda x: seen.append(capture.reads_no_value(device)), (torch.ones(3),))
    assert seen == [False, False, True, True]


def test_a_graph_needs_a_device():
    with pytest.raises(ValueError, match="on one CUDA device, got one on cpu: move it there"):
        aajr.graphed(lambda x: x, (torch.ones(3),))
    with pytest.raises(ValueError, match="example must hold the tensors that step takes, got none"):
        aajr.graphed(lambda x: x, (3,))


def test_casts_of_an_autocast_around_it_would_be_kept(emulated):
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="enter autocast inside of step"),
    ):
        aajr.graphed(lambda x: x, (torch.ones(3),))


def cube(x: torch.Tensor) -> torch.Tensor:
    return x.pow(3).flatten(1).sum(-1)


def refusals() -> dict[str, tuple[Any, str]]:
    x, agents = torch.rand(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    attack: dict[str, Any] = dict(radius=1.0, steps=2, step_size=0.1)

    def along(**options: Any) -> Any:
        return aajr.trajectory_penalty(
            lambda d: d * d, x, aajr.ascend(cube, x, **attack), metric="l2", **options
        )

    return {
        "auto": (lambda: aajr.ascend(cube, x, radius=1.0, steps=2), "step_size='auto' steps back"),
        "agents": (lambda: aajr.ascend(cube, x, **attack, scope="agent", agents=agents), "count the agents"),
        "dropout": (lambda: aajr.ascend(lambda y: cube(model(y)), x, **attack), "eval mode"),
        "weights": (lambda: along(steps="random", weights=[0.2, 0.8]), "weights"),
        "tensor": (lambda: along(weights=torch.ones(2)), "weights"),
        "report": (
            lambda: aajr.stability_report(cube, x, aajr.ascend(cube, x, **attack)),
            "outside of the graph",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_a_graph_cannot_hold_is_refused_in_a_sentence(emulated, name):
    call, message = refusals()[name]

    def step(x: torch.Tensor) -> Any:
        return call() if capture.is_capturing(x.device) else x

    with pytest.raises(aajr.UnsupportedOperation, match=message) as raised:
        aajr.graphed(step, (torch.ones(1),))
    assert "captured CUDA graph cannot" in str(raised.value) and str(raised.value).endswith(".")


def test_a_value_that_torch_cannot_read_is_an_error_with_the_reason(emulated):
    def step(x: torch.Tensor) -> Any:
        if capture.is_capturing(x.device):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    with pytest.raises(
        RuntimeError, match=r"cannot be captured \(CUDA error: .* is capturing\): a CUDA graph"
    ):
        aajr.graphed(step, (torch.ones(1),))
