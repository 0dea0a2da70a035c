"""The adversary's losses in training: with a shared context, adapters as the reference, diagnostics, and bad input."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from assertions import assert_exact
from integrations.trainer.trainers import adapted_gpt2, gpt2
from torch import nn
from training.test_sharing import ATTACK, LENGTH, START, batch, measured, model
from training.tiny_lm import sequences, tiny_lm

from aajr_kernels import ascend
from aajr_kernels.integrations.transformers import fuse, shared_context
from aajr_kernels.method.batch import prepared
from aajr_kernels.method.sharing import shared_of
from aajr_kernels.training import (
    KL,
    Attack,
    Constraint,
    CrossEntropy,
    Diagnostics,
    Objective,
    ObjectiveConfig,
    Payoff,
    Penalty,
    Policy,
    Targeted,
    policy_of,
    randomness,
)
from aajr_kernels.training.config import describe

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

CPU = torch.device("cpu")
CONFIG = ObjectiveConfig(attack=ATTACK, penalty=Penalty(weight=0.2), adversarial_weight=0.7, clean_weight=0.3)
exact = partial(assert_exact, tolerance=1e-10, floor=1e-4)


def targets(data):
    wanted = torch.full_like(data["labels"], -100)
    wanted[:, 2], wanted[:, START + 2 :] = 3, 4
    return data | {"attack_labels": wanted}


def policies(head: str) -> Policy:
    net = model()
    if head == "streamed":
        return replace(policy_of(net), reference=policy_of(gpt2(seed=7).double().eval()))
    forward = lambda net, x, **inputs: net(inputs_embeds=x, use_cache=False, **inputs)
    other = gpt2(seed=7).double().eval()
    return Policy(
        partial(forward, net),
        net.get_input_embeddings(),
        context=partial(shared_context, net),
        reference=Policy(partial(forward, other), other.get_input_embeddings()),
    )


@pytest.mark.parametrize("head", ["streamed", "logits"])
@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(),
        Targeted(1.0, away=0.5),
        KL(),
        KL(tokens="attention"),
        KL("reference", "symmetric"),
        KL("reference", tokens="attention"),
    ],
    ids=str,
)
@pytest.mark.parametrize("scored_from", [0, START + 3])
def test_a_shared_context_changes_no_value(loss, head, scored_from):
    policy = policies(head)
    data = prepared(targets(batch(scored_from)), CPU, True)
    x = data.embedded(policy)
    shared = shared_of(policy, data, x, START, is_scored=loss.reads(data, START) or scored_from == 0)
    assert shared.start == START
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    noise[:, :START] = 0
    whole, suffix = (x + 0.2 * noise).detach().requires_grad_(), None
    suffix = whole.detach()[:, START:].requires_grad_()
    a = loss.of(policy, data, x)(whole)
    b = loss.of(shared.policy, shared.batch, shared.x, shared)(suffix)
    exact(b, a, "losses")
    (slope,), (expected,) = (torch.autograd.grad(y.sum(), z) for y, z in ((b, suffix), (a, whole)))
    exact(slope, expected[:, START:], "gradient")
    assert float(expected[:, START:].norm()) > 1e-3
    assert not b.requires_grad or all(p.grad is None for p in model().parameters())


@pytest.mark.parametrize("loss", [Targeted(), KL("reference")], ids=str)
def test_an_objective_that_shares_its_context(loss):
    """Where labels are behind it, targets and tokens of the divergence may lie in it."""
    config = replace(CONFIG, attack=replace(ATTACK, loss=loss))
    results = []
    for mode in (False, True):
        _, parts, grads, _ = measured(
            replace(config, share_context=mode), targets(batch(START + 3)), model(), policies("streamed")
        )
        assert ("shared" in parts) == mode
        parts.pop("shared", None)
        results.append(({k: float(v) for k, v in parts.items()}, grads))
    (plain, expected), (ours, grads) = results
    assert ours == pytest.approx(plain, rel=1e-10)
    for i, (a, b) in enumerate(zip(grads, expected, strict=True)):
        exact(a, b, str(i))


@pytest.mark.parametrize(
    "loss",
    [
        KL(),
        KL("reference"),
        Targeted(0, away=1.0),
        Payoff(lambda z, batch: z[..., 2].sum(-1)),
        CrossEntropy(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_the_attack_of_an_objective_is_an_ascent_on_the_loss(loss):
    """With dropout, the losses that are reported and the loss at the point that was found, and a report on the way."""
    net = tiny_lm(dropout=0.3).double().train()
    attack = Attack(radius=0.5, relative=False, steps=2, step_size=0.3, init="uniform", loss=loss)
    config = ObjectiveConfig(attack=attack, penalty=Penalty("none"), diagnostics=Diagnostics(1))
    policy = replace(policy_of(net), reference=policy_of(tiny_lm(5).double().eval()))
    objective, reports = Objective(net, config, policy=policy), []
    data = objective.prepared(sequences(1)[0])
    torch.manual_seed(3)
    terms = objective(data, on_report=reports.append)
    torch.manual_seed(3)
    x = data.embedded(policy).detach()
    traj = ascend(
        loss.of(policy, data, x),
        x,
        generator=randomness.generator_for(0, 0, 0, CPU),
        module=net,
        **dict(radius=0.5, steps=2, step_size=0.3, scope="token", init="uniform"),
    )
    assert float(terms.parts["attack_worst"]) == pytest.approx(float(traj.worst_loss.mean()), rel=1e-12)
    assert float(terms.parts["attack_start"]) == pytest.approx(float(traj.losses[0].mean()), rel=1e-12)
    minimised = (
        policy.loss_fn(data.inputs, data.labels, "sum")(traj.worst).sum() / (data.labels != -100).sum()
    )
    exact(terms.parts["adversarial_loss"], minimised.detach(), "what is minimised")
    (report,) = reports
    exact(report.losses, traj.losses, "losses of the report")
    for t in range(
        2
    ):  # the curvature at both ends of a step by differences of gradients, with the same masks
        ends = []
        for place in (traj.points[t], traj.points[t + 1]):
            unit = traj.displacements[t] / traj.displacements[t].flatten(1).norm(dim=1).reshape(-1, 1, 1)
            slopes = []
            for h in (1e-4, -1e-4):
                torch.manual_seed(3)
                point = (place + h * unit).requires_grad_()
                (slope,) = torch.autograd.grad(loss.of(policy, data, x)(point).sum(), point)
                slopes.append((slope * unit).flatten(1).sum(1))
            ends.append((slopes[0] - slopes[1]) / 2e-4)
        assert bool((report.kappa_positive[t] >= torch.stack(ends).amax(0).clamp(min=0) - 1e-6).all())
        assert bool((report.kappa[t] >= -torch.stack(ends).amin(0).clamp(max=0) - 1e-6).all())


def adapted() -> nn.Module:
    """With dropout in the base and adapters that do something."""
    import peft

    torch.manual_seed(2)
    lora = dict(target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, lora_dropout=0.2)
    net = peft.get_peft_model(gpt2(dropout=0.2), peft.LoraConfig(r=2, **lora)).double()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.5)
    return net.train()


@pytest.mark.parametrize("fused", [False, True])
def test_the_reference_of_a_model_with_adapters(fused):
    pytest.importorskip("peft")
    net = adapted()
    base = copy.deepcopy(net).unload().eval()
    if fused:
        fuse(net)
    policy = policy_of(net)
    assert policy.head is not None
    data = prepared(targets(batch(0)), CPU, True)
    x = data.embedded(policy).detach()
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    loss, draws = KL("reference"), torch.get_rng_state()
    torch.manual_seed(1)
    ours = loss.of(policy, data, x)(x)
    torch.manual_seed(1)
    exact(ours, loss.of(replace(policy, reference=policy_of(base)), data, x)(x), "losses")
    assert float(ours.detach().min()) > 1e-3
    torch.set_rng_state(draws)
    options = dict(radius=0.1, steps=2, step_size=0.1, module=net)
    ascend(loss.of(policy, data, x), x, **options)
    assert torch.equal(torch.get_rng_state(), draws)
    assert flags == {name: p.requires_grad for name, p in net.named_parameters()}
    assert all(module.training for module in net.modules())


def test_a_reference_that_would_move():
    pytest.importorskip("peft")
    net = adapted_gpt2()
    policy = policy_of(net)
    data = prepared(batch(0), CPU, True)
    x = data.embedded(policy).detach()
    net.base_model.model.transformer.ln_f.bias.requires_grad_()
    with pytest.raises(
        ValueError, match=r"must not move, but base_model.model.transformer.ln_f.bias is trained"
    ):
        KL("reference").of(policy, data, x)(x)
    policy = policy_of(net)  # inside an attack nothing is trained
    with pytest.raises(
        ValueError, match=r"must not move, but base_model.model.transformer.ln_f.bias is trained"
    ):
        ascend(KL("reference").of(policy, data, x), x, radius=0.1, steps=1, module=net)


BAD = {
    "start": (
        lambda: Attack(loss=KL()),
        ValueError,
        r"init must be 'uniform' with loss=KL\(to='clean'.*, got 'zero'",
    ),
    "type": (lambda: Attack(loss="kl"), TypeError, r"loss must be CrossEntropy\(\), .* got str"),
    "class": (lambda: Attack(loss=KL), TypeError, r"loss must be CrossEntropy\(\), .* got KL"),
    "smoothness": (
        lambda: ObjectiveConfig(attack=Attack(loss=Targeted()), diagnostics=Diagnostics(1, smoothness=True)),
        ValueError,
        r"Diagnostics\(smoothness=True\) is of the cross-entropy, got an attack with loss=Targeted",
    ),
    "step size": (
        lambda: ObjectiveConfig(
            attack=Attack(loss=Targeted()), penalty=Constraint(gamma="auto", step_size=0.1)
        ),
        ValueError,
        r"Constraint\(step_size=\) is of the cross-entropy",
    ),
    "input gradient": (
        lambda: ObjectiveConfig(attack=Attack(loss=Targeted()), penalty=Penalty("input_gradient")),
        ValueError,
        r"Penalty\(method='input_gradient'\) is of the cross-entropy",
    ),
    "sharing": (
        lambda: ObjectiveConfig(attack=Attack(loss=Payoff(len)), share_context=True),
        ValueError,
        "share_context must be 'auto' or False with loss=Payoff",
    ),
    "weights of rows": (
        lambda: Objective(
            tiny_lm(), ObjectiveConfig(attack=Attack(loss=Targeted(0, 1)), penalty=Penalty(weight=0.1))
        ).penalty(sequences(1)[0], row_weights=torch.ones(2)),
        ValueError,
        r"row_weights must be None with loss=Targeted\(toward=0, away=1\)",
    ),
    "targets": (
        lambda: Objective(tiny_lm(), ObjectiveConfig(attack=Attack(loss=Targeted())))(sequences(1)[0]),
        ValueError,
        "attack_labels must be in the batch",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_payoffs_are_of_whole_sequences():
    """Their context is computed with the rest, although the cross-entropy's would not be."""
    config = replace(CONFIG, attack=replace(ATTACK, loss=Payoff(lambda z, batch: z[..., 2].sum(-1))))
    _, parts, _, _ = measured(config, batch(0), model())
    assert "shared" not in parts and LENGTH > START


def test_configurations_say_which_loss():
    own = describe(Attack(loss=KL(), init="uniform"))["loss"]
    assert own == {"loss": "KL", "to": "clean", "direction": "forward", "tokens": "loss"}
    assert describe(Attack())["loss"] == {"loss": "CrossEntropy"}
    named = describe(Attack(loss=Payoff(test_bad_input)))["loss"]
    assert named["function"] == "test_bad_input"
