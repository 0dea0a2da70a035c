"""The attack on hidden states finds what a loop finds that is written out here, and names what it cannot open."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from method import small_lm as small
from method.small_lm import WIDTH, SmallLM, policy_for, small_lm
from torch import nn

from aajr_kernels.method.evaluation import EmbeddingAttack, HiddenAttack, evaluate
from aajr_kernels.method.evaluation.run import generator_of

CLOSE = dict(rel=1e-9, abs=1e-12)
WIDTHS = {"mix": WIDTH, "up": 8}


def batch_of(**options):
    """What is added inside acts where it is added: the tokens that predict are open, too."""
    batch = small.batch_of(**options)
    batch["attack_mask"][:, 1:7] = 1
    return batch


def run(model, batches, *attacks, streamed=True, **options):
    return evaluate(policy_for(model, streamed), batches, attacks, module=model, **options)


def forward_by_hand(model: SmallLM, x, mask, added):
    """Logits ``[N, V]`` of one row with something added to the outputs of ``mix`` and ``up``, and these outputs."""
    x = x * mask.unsqueeze(-1)
    before = torch.cumsum(x, 0) / torch.arange(1, len(x) + 1).unsqueeze(-1)
    mixed = nn.functional.linear(before, model.mix.weight, model.mix.bias)
    inner = x + torch.tanh(mixed + added.get("mix", 0.0))
    up = nn.functional.linear(inner, model.up.weight, model.up.bias)
    hidden = torch.tanh(up + added.get("up", 0.0))
    return nn.functional.linear(hidden, model.head.weight, model.head.bias), {"mix": mixed, "up": up}


def loss_by_hand(model, batch, row, added):
    x = model.embedding.weight.detach()[batch["input_ids"][row]]
    logits, states = forward_by_hand(model, x, batch["attention_mask"][row], added)
    labels = batch["labels"][row]
    terms = [
        torch.logsumexp(logits[t], -1) - logits[t, labels[t + 1]]
        for t in range(len(labels) - 1)
        if labels[t + 1] != -100
    ]
    return torch.stack(terms).mean(), states


def units_by_hand(model, batch):
    squares = {"mix": [], "up": []}
    for row in range(len(batch["input_ids"])):
        for name, state in loss_by_hand(model, batch, row, {})[1].items():
            norms = state.detach().norm(dim=-1)
            open_ = (batch["attack_mask"] * batch["attention_mask"])[row]
            squares[name] += [float(norms[t]) ** 2 for t in open_.nonzero().flatten()]
    return {name: (sum(values) / len(values)) ** 0.5 for name, values in squares.items()}


def ascents_by_hand(model, batch, names, *, radius, steps, step_sizes, restarts, generator):
    """Largest loss of every row after 0, 1, ... steps; every token at every place is in a ball of its own."""
    rows, length = batch["input_ids"].shape
    width, units = max(WIDTHS[name] for name in names), units_by_hand(model, batch)
    best = [[float("-inf")] * (steps + 1) for _ in range(rows)]
    for share in step_sizes:
        starts = [torch.zeros(rows, len(names) * length, width, dtype=torch.float64)]
        for _ in range(restarts - 1):
            options = dict(generator=generator, dtype=torch.float64)
            noise, part = torch.randn(starts[0].shape, **options), torch.rand(starts[0].shape[:2], **options)
            for row, place, number in itertools.product(range(rows), range(length), range(len(names))):
                own, entry = WIDTHS[names[number]], number * length + place
                noise[row, entry, own:] = 0
                noise[row, entry] *= radius * part[row, entry] ** (1 / own) / noise[row, entry].norm()
            starts.append(noise)
        winners = [None] * rows
        for start, row in itertools.product(starts, range(rows)):
            places = (batch["attack_mask"] * batch["attention_mask"])[row].nonzero().flatten().tolist()
            delta = {}
            for number, name in enumerate(names):
                delta[name] = torch.zeros(length, WIDTHS[name], dtype=torch.float64)
                for place in places:
                    delta[name][place] = start[row, number * length + place, : WIDTHS[name]]
            losses = []
            for t in range(steps + 1):
                leaves = {name: delta[name].clone().requires_grad_() for name in names}
                loss, _ = loss_by_hand(
                    model, batch, row, {name: units[name] * leaves[name] for name in names}
                )
                losses.append(float(loss.detach()))
                if t == steps:
                    break
                slopes = dict(zip(names, torch.autograd.grad(loss, list(leaves.values()))))
                for name, place in itertools.product(names, places):
                    if slopes[name][place].norm() > 0:
                        delta[name][place] += (
                            share * radius * slopes[name][place] / slopes[name][place].norm()
                        )
                    delta[name][place] *= min(1.0, radius / max(float(delta[name][place].norm()), 1e-30))
            if winners[row] is None or max(losses) > max(winners[row]):
                winners[row] = losses
        best = [[max(a, b) for a, b in zip(*pair)] for pair in zip(best, winners)]
    return [list(itertools.accumulate(row, max)) for row in best]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("names", [("mix",), ("mix", "up")])
def test_ascents_inside_the_model_find_what_a_loop_finds(streamed, names):
    model, batches = small_lm(), [batch_of(seed=1), batch_of(rows=2, seed=2)]
    options = dict(radius=0.3, steps=3, step_sizes=(0.6, 0.2), restarts=2)
    evaluation = run(model, batches, HiddenAttack(names, **options), streamed=streamed, seed=3)
    expected = []
    for index, batch in enumerate(batches):
        generator = generator_of(3, index)
        expected += ascents_by_hand(model.eval(), batch, names, **options, generator=generator)
    found = evaluation.curves["hidden"].T.flatten().tolist()
    assert found == pytest.approx(list(itertools.chain(*expected)), **CLOSE)
    assert (evaluation.attacked["hidden"] > evaluation.clean + 0.01).all()
    assert evaluation.calls["hidden"] == (2 * 2 * 2 * 3, 2 * (2 * 2 + 1))


def test_at_the_embedding_it_is_the_attack_on_embeddings():
    """A module that returns its input is the same place, with the same unit where all attended tokens are open."""

    class Behind(SmallLM):
        def hidden(self, x, attention_mask=None, position_ids=None):
            return super().hidden(self.place(x), attention_mask)

    model = small_lm()
    model.__class__ = Behind
    model.place = nn.Identity()
    options = dict(radius=0.4, steps=3, step_sizes=(0.5,), restarts=3)
    batch = batch_of()
    batch["attack_mask"] = batch["attention_mask"]
    evaluation = run(model, batch, HiddenAttack(model.place, **options), EmbeddingAttack(**options), seed=1)
    hidden, embedding = (evaluation.curves[name] for name in ("hidden", "embedding"))
    torch.testing.assert_close(hidden, embedding, rtol=1e-10, atol=1e-12)
    assert (hidden[-1] > hidden[0]).all()


def test_balls_are_those_of_the_scope():
    model, batch = small_lm(), batch_of()
    reached = {}
    for scope in ("token", "sequence", "agent"):
        attack = HiddenAttack(["mix", "up"], 0.3, steps=4, scope=scope, step_sizes=("auto",))
        reached[scope] = run(model, batch, attack).attacked["hidden"]
    # a ball of a token holds what a ball of a place does for it, and that holds what one of all places does
    assert (reached["sequence"] < reached["agent"]).all() and (reached["agent"] < reached["token"]).all()


def test_the_model_has_no_hooks_afterwards_and_is_as_it_was():
    model = small_lm()
    state = copy.deepcopy(model.state_dict())
    run(model, batch_of(), HiddenAttack("up", steps=2, restarts=2))
    assert not any(module._forward_hooks for module in model.modules()) and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.up.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(model, batch_of(), HiddenAttack("up", steps=2))
    assert not any(module._forward_hooks for module in model.modules())


# -- models of transformers ---------------------------------------------------------------------------------


@functools.cache
def decoder(kind):
    from integrations.trainer.trainers import gpt2, llama

    from aajr_kernels.integrations.transformers import fuse

    made = (gpt2 if kind == "gpt2" else llama)().double()
    if "fused" in kind:
        fuse(made)
    return made


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama, fused"])
def test_layers_and_projections_of_a_decoder(kind):
    """The loss at the worst point is that of the model with hooks of PyTorch that add it."""
    pytest.importorskip("transformers")
    from aajr_kernels.method.batch import prepared
    from aajr_kernels.method.evaluation import Scene
    from aajr_kernels.training import policy_of

    net = decoder(kind)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (2, 10), generator=generator)
    places = torch.arange(10).expand(2, 10)
    attended = (places < torch.tensor([[10], [9]])).long()
    batch = {
        "input_ids": ids,
        "attention_mask": attended,
        "attack_mask": (places >= 2) & (places < 6),
        "labels": ids.masked_fill((places < 6) | (attended == 0), -100),
    }
    blocks = net.transformer.h if kind == "gpt2" else net.model.layers
    inner = blocks[1].mlp if kind == "gpt2" else blocks[1].self_attn.q_proj
    attack = HiddenAttack([blocks[0], inner], 0.3, steps=3, step_sizes=(0.5,))
    scene = Scene(policy_of(net), prepared(batch, torch.device("cpu"), True), (net,))
    (trajectory,) = attack.ascents(scene, generator)
    assert (trajectory.losses.diff(dim=0) > 0).all()
    delta = trajectory.worst - trajectory.x
    open_ = batch["attack_mask"] & attended.bool()
    clean, moved = [], trajectory.worst

    def add(place, module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        if place == len(clean):
            clean.append(first.detach())
        unit = float(clean[place].square().sum(-1)[open_].mean().sqrt())
        changed = first + moved[:, place * 10 : place * 10 + 10, : first.shape[-1]] * unit
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def losses():
        with torch.no_grad():
            logits = net.eval()(input_ids=ids, attention_mask=attended).logits
        nll = -logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(-1)
        learnt = batch["labels"][:, 1:] != -100
        return (nll * learnt).sum(-1) / learnt.sum(-1)

    handles = [m.register_forward_hook(functools.partial(add, i)) for i, m in enumerate((blocks[0], inner))]
    moved = torch.zeros_like(delta)
    torch.testing.assert_close(trajectory.losses[0], losses(), rtol=1e-9, atol=1e-12)
    moved = delta
    torch.testing.assert_close(trajectory.worst_loss, losses(), rtol=1e-8, atol=1e-10)
    for handle in handles:
        handle.remove()
    if kind == "gpt2":
        return
    shared = Scene(scene.policy, scene.batch, scene.modules, share_context=True)
    assert shared.start == 2
    (behind,) = attack.ascents(shared, generator)
    torch.testing.assert_close(behind.losses, trajectory.losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(behind.worst, trajectory.worst, rtol=1e-8, atol=1e-10)
    listed = evaluate(policy_of(net), batch, [HiddenAttack("model.layers", steps=2)], module=net)
    several = HiddenAttack([f"model.layers.{i}" for i in range(len(blocks))], steps=2)
    named = evaluate(policy_of(net), batch, [several], module=net)
    assert torch.equal(listed.attacked["hidden"], named.attacked["hidden"])


# -- errors -------------------------------------------------------------------------------------------------

BAD = {
    "name": (lambda m: HiddenAttack("mux"), "got 'mux', which is not there: mix"),
    "module": (lambda m: HiddenAttack(nn.Linear(2, 2)), "got Linear, which is not there: pass the model"),
    "twice": (lambda m: HiddenAttack(["mix", m.mix]), "every module once, got mix, mix"),
    "never": (lambda m: HiddenAttack("head"), "head must run once in a forward of the model, ran 0 times"),
    "nothing": (lambda m: HiddenAttack([]), "at must name a module or several"),
    "number": (lambda m: HiddenAttack(3), "at must name a module or several, got 3"),
    "numbers": (lambda m: HiddenAttack([3]), "at must hold modules or their dotted names, got int"),
    "radius": (lambda m: HiddenAttack("mix", -1.0), "radius must be positive"),
    "sizes": (lambda m: HiddenAttack("mix", step_sizes=0.5), "step_sizes must be a sequence"),
    "kind": (lambda m: HiddenAttack("odd"), "odd must return a floating point tensor.*got dict"),
    "shape": (lambda m: HiddenAttack("flat"), r"flat must return \[B, N, C\] = \[3, 8, ...\], got \(3, 6\)"),
    "often": (lambda m: HiddenAttack("often"), "often must run once in a forward of the model, ran 2 times"),
}  # fmt: skip


class Odd(SmallLM):
    """With modules that are no places."""

    def hidden(self, x, attention_mask=None, position_ids=None):
        self.odd(x)
        self.flat(x)
        return super().hidden(self.often(self.often(x)), attention_mask)


class Flat(nn.Module):
    def forward(self, x):
        return x.sum(1)


class Dictionary(nn.Module):
    def forward(self, x):
        return {"x": x}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_opened_is_named(kind):
    attack, message = BAD[kind]
    model = small_lm()
    model.__class__ = Odd
    model.odd, model.flat, model.often = Dictionary(), Flat(), nn.Identity()
    with pytest.raises((TypeError, ValueError), match=message):
        run(model, batch_of(), attack(model))
    assert not any(module._forward_hooks for module in model.modules())
