"""The training loop: models it can call by itself, and what it writes."""

from __future__ import annotations

import copy
import json
import sys
from itertools import pairwise

import pytest
import torch
from training.tiny_lm import ATTACK, fit_config, plain, quiet, sequences, sgd, tiny_lm, vector

from aajr_kernels import stability_report, training
from aajr_kernels.training import (
    Attack,
    Diagnostics,
    Objective,
    ObjectiveConfig,
    Penalty,
    Policy,
    fit,
    policy_of,
    read_rows,
)

# -- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "granite", "cohere", "gpt2"])
def test_the_head_of_hugging_face_models_is_streamed(name):
    transformers = pytest.importorskip("transformers")
    small = dict(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    still = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    classes = {
        "llama": ("LlamaConfig", "LlamaForCausalLM", small),
        "gemma": ("GemmaConfig", "GemmaForCausalLM", small),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", small | {"final_logit_softcapping": 0.5}),
        "granite": ("GraniteConfig", "GraniteForCausalLM", small | {"logits_scaling": 3.0}),
        "cohere": ("CohereConfig", "CohereForCausalLM", small | {"logit_scale": 0.25}),
        "gpt2": (
            "GPT2Config",
            "GPT2LMHeadModel",
            dict(vocab_size=29, n_embd=16, n_layer=1, n_head=2, **still),
        ),
    }
    config, cls, options = classes[name]
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).double()
    policy = policy_of(model)
    assert policy.head is not None
    logits = Policy(lambda x, **inputs: model(inputs_embeds=x, **inputs), model.get_input_embeddings())
    ends = []
    for either in (policy, logits):
        twin_state = copy.deepcopy(model.state_dict())
        batch = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6).long()}
        config = plain(penalty=Penalty(weight=0.3))
        row = quiet(model, [batch], config, policy=either, optimizer=sgd(model, 0.1)).rows[0]
        ends.append((vector(model).clone(), row["loss"]))
        model.load_state_dict(twin_state)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6)
    # norms in transformers compute in float32
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-5, atol=1e-6)


def test_a_head_that_is_not_all_of_it_is_found_out():
    transformers = pytest.importorskip("transformers")
    options = dict(vocab_size=29, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)

    class Shifted(transformers.GPT2LMHeadModel):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits = output.logits * 1.1
            return output

    with pytest.warns(UserWarning, match="logits of Shifted are not those of its head"):
        policy = policy_of(Shifted(transformers.GPT2Config(**options)))
    assert policy.head is None


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_are_trained_alone_and_checkpointed_alone(tmp_path):
    peft = pytest.importorskip("peft")
    from integrations.transformers.subjects import tiny

    def adapted():
        torch.manual_seed(3)
        lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny("llama"), lora)

    model = adapted()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = fit_config(steps=2, attack=ATTACK, learning_rate=1e-2, trainable_only=True)
    quiet(model, [torch.arange(12).reshape(2, 6)], config, out=tmp_path)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all("lora_" in n for n in changed)
    assert policy_of(model).head is not None
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    again = adapted()
    assert training.load_checkpoint(checkpoint, again) == 2
    assert torch.equal(vector(again), vector(model))
    held = checkpoint / "model.safetensors"
    assert held.stat().st_size < sum(p.numel() * 4 for p in model.parameters()) / 4


def test_a_whole_run_under_autocast():
    model, low = tiny_lm(), tiny_lm()
    rows = quiet(model, sequences(1), plain(steps=2)).rows
    actual = quiet(low, sequences(1), plain(steps=2, autocast=torch.bfloat16)).rows
    assert all(p.dtype == torch.float32 for p in low.parameters())
    # eight bits through half a dozen products
    assert (
        actual[0]["loss"] == pytest.approx(rows[0]["loss"], rel=0.05) and actual[0]["loss"] != rows[0]["loss"]
    )


# -- what is written ------------------------------------------------------------------------------------------------


def test_rows_page_figure_and_diagnostics(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    model, heard = tiny_lm(dropout=0.2), []
    config = fit_config(
        steps=4,
        attack=ATTACK,
        penalty=Penalty(gamma=0.1),
        diagnostics=Diagnostics(2, smoothness=True, power_iterations=2, nearby=0.01),
        evaluate_every=2,
        tensorboard=True,
    )

    def evaluate(model):
        assert not model.training and not torch.is_grad_enabled()
        return {"norm": vector(model).norm()}

    result = quiet(model, sequences(2), config, out=tmp_path, evaluate=evaluate, on_step=heard.append)
    assert read_rows(tmp_path / "metrics.jsonl") == result.rows
    assert [r["step"] for r in result.rows] == [1, 2, 2, 3, 4, 4] and len(heard) == 4
    assert result.rows[-1]["eval/norm"] == pytest.approx(float(vector(model).norm()))
    stability = [json.loads(line) for line in (tmp_path / "stability.jsonl").read_text().splitlines()]
    assert [row["step"] for row in stability] == [2, 4]
    summary = stability[0]["summary"]
    assert {"kappa", "hinge_active", "smoothness", "spectral_norm", "expansion"} <= summary.keys()
    assert 0 < summary["expansion"] < 10
    # losses of the attack, met again in the report: the same dropout mask
    assert summary["loss_start"] == pytest.approx(result.rows[1]["attack_start"], rel=1e-6)
    page = (tmp_path / "report.md").read_text()
    assert "| step | norm |" in page and '"radius": 0.5' in page and "![Losses" in page
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").iterdir())
    assert model.training


def test_smoothness_is_that_of_the_mean_loss_that_is_maximised(monkeypatch):
    """24 scored tokens in a row and 9 in the other: bounds per row, of a mean, in the scope of tokens."""
    reports, seen = [], {}

    def looked_at(loss_fn, x, traj, **options):
        seen["traj"] = traj
        return stability_report(loss_fn, x, traj, **options)

    monkeypatch.setattr("aajr_kernels.training.step.stability_report", looked_at)
    model, gamma = tiny_lm().double().eval(), 0.02
    config = ObjectiveConfig(
        attack=Attack(radius=5.0, relative=False, steps=2, step_size=0.3),
        penalty=Penalty(weight=0.1, gamma=gamma),
        diagnostics=Diagnostics(1, smoothness=True, samples=3),
    )
    ids = torch.randint(13, (2, 25))
    attended = torch.ones(2, 25, dtype=torch.long)
    attended[1, 10:] = 0
    Objective(model, config)({"input_ids": ids, "attention_mask": attended}, on_report=reports.append)
    (report,), traj = reports, seen["traj"]
    scored = torch.tensor([24.0, 9.0], dtype=torch.float64)
    kept = torch.arange(25) < scored[:, None]
    inputs = {"attention_mask": attended}
    expected, bends = torch.zeros(2, 2, 2).double()
    for t in range(2):
        d = traj.displacements[t]
        length = d.flatten(1).norm(dim=1).reshape(2, 1, 1)
        tangents = []
        for share in (0.0, 0.5, 1.0):
            at = traj.points[t] + share * d
            z, z_tan = torch.autograd.functional.jvp(lambda x: model(x, **inputs), at, d / length)
            p = z.softmax(-1)
            q = (p * z_tan.square()).sum(-1) - (p * z_tan).sum(-1).square()
            expected[t] = torch.maximum(expected[t], (q * kept).sum(1) / scored)
            tangents.append(z_tan)
        for before, after in pairwise(tangents):
            change = ((after - before).norm(dim=-1) * kept).sum(1) / (length.flatten() / 2)
            bends[t] = torch.maximum(bends[t], 2**0.5 * change / scored)
    torch.testing.assert_close(report.gauss_newton, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(report.second_order, bends, rtol=1e-9, atol=0)
    assert (report.kappa <= report.smoothness).all() and (report.kappa_positive <= report.smoothness).all()
    # norm 1 for each of 25 or 10 attacked tokens; the loss is a mean over 24 or 9, whose number drops out
    moving = traj.directions.square().sum(-1).round().sum(-1)
    assert moving.tolist() == [[24.0, 9.0], [24.0, 9.0]] or moving.tolist() == [[25.0, 10.0], [25.0, 10.0]]
    torch.testing.assert_close(report.smoothness_at_gamma - bends, gamma**2 / moving, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("penalty", "compared"),
    [
        (Penalty(gamma=0.1), True),
        (Penalty(gamma=0.1, metric="probs"), False),  # the report measures the Fisher q
        (Penalty("spectral", gamma=0.1), False),  # γ bounds another number than √q along u
        (Penalty("finite_difference", gamma=0.1, metric="l2"), True),
    ],
    ids=["aligned", "probs", "spectral", "differences"],
)
def test_gamma_is_compared_with_the_quantity_that_it_bounds(penalty, compared):
    reports = []
    config = ObjectiveConfig(ATTACK, penalty, diagnostics=Diagnostics(1, smoothness=True))
    Objective(tiny_lm(), config)(sequences(1)[0], on_report=reports.append)
    assert (reports[0].hinge_active is not None) == compared
    assert (reports[0].smoothness_at_gamma is not None) == compared


def test_diagnostics_and_evaluation_do_not_change_the_training(tmp_path):
    models = [tiny_lm(dropout=0.3) for _ in range(2)]
    config = plain(steps=3)
    quiet(models[0], sequences(3), config)
    more = plain(steps=3, diagnostics=Diagnostics(1), evaluate_every=1)
    quiet(models[1], sequences(3), more, evaluate=lambda m: {"draw": torch.rand(())}, out=tmp_path)
    assert torch.equal(vector(models[0]), vector(models[1]))


def test_without_matplotlib_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    quiet(tiny_lm(), sequences(1), plain(), out=tmp_path)
    assert "brings matplotlib" in (tmp_path / "report.md").read_text()


def test_progress_is_lines_without_a_terminal(capsys):
    fit(tiny_lm(), sequences(1), plain())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("begins") and "done" in lines[-1] and not any("\r" in line for line in lines)
    fit(tiny_lm(), sequences(1), plain(), progress=False)
    assert capsys.readouterr().err == ""
