"""`aajr validate --model` passes, fails and refuses when it should."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("transformers")

import transformers

from aajr_kernels.cli import main
from aajr_kernels.cli.validate_model import checks as model
from aajr_kernels.cli.validate_model import loading
from aajr_kernels.cli.validate_model.loading import CannotValidate, load, prepare
from aajr_kernels.rules import registry

SMALL = "transformers:LlamaForCausalLM"


def run(*arguments):
    return CliRunner().invoke(main.app, ["validate", "--model", *arguments])


def report_of(*arguments):
    result = run(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_a_class_of_transformers_passes_and_the_peers_are_shown():
    code, report = report_of("transformers:GPT2LMHeadModel")
    assert code == 0 and report["passed"] and report["metric"] == "fisher"
    rows = {(c["name"], c["dtype"]): c for c in report["checks"]}
    ours = [("unmodified", "float64"), ("fused", "float64"), ("unmodified", "float32"), ("fused", "float32")]
    assert list(rows)[:4] == ours
    for key in ours:
        limit = 1e-13 if key[1] == "float64" else 2e-6
        assert max(rows[key][f"{x}_error"] for x in ("penalty", "output", "gradient")) < limit
        assert rows[key]["operations"]
    assert report["finite_differences"] < 1e-9
    assert {"attention", "GELU (tanh)"} <= {row["what"] for row in report["fused"]}
    # why this package exists: PyTorch's own gradient through the tangent of layer norm is wrong without a word
    peer = rows["torch.func.jvp", "float32"]
    assert peer["penalty_error"] < 1e-6 and peer["gradient_error"] > 0.1
    assert 1e-4 < rows["finite differences", "float32"]["gradient_error"] < 0.1


def test_hidden_states_and_kinks():
    """An encoder without a head (l2), and a ReLU network, whose penalty jumps at its kinks."""
    code, report = report_of("transformers:BertModel", "--dtype", "float64")
    assert (
        code == 0 and report["metric"] == "l2" and [c["dtype"] for c in report["checks"]] == ["float64"] * 2
    )
    code, report = report_of("transformers:OPTForCausalLM", "--dtype", "float64", "--length", "8")
    assert code == 0 and "does not know" in report["not_fused"]["OPTForCausalLM"]


def test_a_folder_and_some_of_its_layers(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert len(load(os.fspath(tmp_path)).model.layers) == 3
    result = run(os.fspath(tmp_path), "--layers", "1", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "Passed: LlamaForCausalLM" in result.output and "SwiGLU MLP, 1 x" in result.output


class Small(nn.Module):
    """A model of one's own."""

    def __init__(self, act=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix, self.act = nn.Embedding(11, 6), nn.Linear(6, 11), act

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.mix

    def forward(self, inputs_embeds):
        return self.mix(self.act(inputs_embeds))


def test_a_module_of_ones_own_and_an_operation_without_a_rule(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", FACTORIES)
    monkeypatch.delitem(registry.RULES, torch.fft.rfft)
    code, report = report_of("mine:good", "--dtype", "float64")
    assert code == 0 and report["model"] == "Small"
    code, report = report_of("mine:bad", "--dtype", "float32")
    assert code == 1 and "fft_rfft has no derivative rule" in report["failures"][0]


class FACTORIES:
    good = staticmethod(Small)
    bad = staticmethod(lambda: Small(lambda x: torch.fft.rfft(x, n=10).real))
    number = 3
    needs = staticmethod(lambda size: Small())


def test_a_wrong_penalty_fails(monkeypatch):
    right = model.aligned_penalty

    def wrong(*args, **options):
        penalty, primal = right(*args, **options)
        return penalty * (1 + 1e-4), primal

    monkeypatch.setattr(model, "aligned_penalty", wrong)
    result = run(SMALL)
    assert result.exit_code == 1 and "Failed" in result.output and "times as wrong" in result.output


def test_a_budget_is_that_of_the_same_parameter_in_all_layers():
    zero = torch.zeros(()).double()
    truth = {"penalty": zero, "output": zero}
    truth |= {f"gradient of the penalty for layers.{i}.w": torch.ones(4).double() for i in range(3)}

    def off(*errors):
        return {name: t * (1 + e) for (name, t), e in zip(truth.items(), (0, 0, *errors))}

    def judged(ours, eager=None):
        check = model.Check("ours", "float64" if eager is None else "float32", "cpu")
        check.compare(ours, truth, eager)
        return check

    check = judged(off(3e-3, 0.0, 0.0), off(0.0, 2e-3, 0.0))
    assert 0.7 < check.share < 0.8 and check.worst == "gradient of the penalty for layers.0.w"
    assert check.result == "pass"
    assert judged(off(5e-3, 0.0, 0.0), off(0.0, 2e-3, 0.0)).share > 1
    assert judged(off(0.0, 0.0, 2e-9)).share > 1
    assert judged(off(0, 0, 0) | {"gradient of the penalty for layers.1.w": None}).share == float("inf")
    assert judged(off(float("nan"), 0, 0), off(float("nan"), 0, 0)).share == float("inf")


def test_a_wrong_gradient_fails(monkeypatch):
    right = model.aligned_penalty

    def wrong(call, x, v, **options):
        penalty, primal = right(call, x, v.detach(), **options)
        return penalty.detach() + 0.999 * (penalty - penalty.detach()), primal

    monkeypatch.setattr(model, "aligned_penalty", wrong)
    code, report = report_of(SMALL)
    assert code == 1 and all("gradient of the penalty" in failure for failure in report["failures"])


@pytest.mark.parametrize("which", ["x", "v"])
def test_a_wrong_gradient_of_input_or_direction_fails(monkeypatch, which):
    """An untied embedding is trained through the input alone."""
    right = model.aligned_penalty

    def wrong(call, x, v, **options):
        x, v = (t + 0.01 * (t - t.detach()) if name == which else t for name, t in (("x", x), ("v", v)))
        return right(call, x, v, **options)

    monkeypatch.setattr(model, "aligned_penalty", wrong)
    code, report = report_of(SMALL)
    name = {"x": "inputs_embeds", "v": "direction"}[which]
    assert code == 1 and all(f"for {name}" in failure for failure in report["failures"])


def test_bfloat16_does_not_excuse_five_percent(monkeypatch):
    assert report_of(SMALL, "--dtype", "bfloat16")[0] == 0
    right = model.aligned_penalty

    def wrong(*args, **options):
        penalty, primal = right(*args, **options)
        return penalty + 0.05 * (penalty - penalty.detach()), primal

    monkeypatch.setattr(model, "aligned_penalty", wrong)
    assert report_of(SMALL, "--dtype", "bfloat16")[0] == 1


def test_a_failure_of_fuse_or_of_ours_is_a_failed_row_and_one_of_a_peer_is_a_note(monkeypatch):
    from aajr_kernels.integrations import transformers as integration

    def broken(*args, **options):
        raise TypeError("'NoneType' object is not subscriptable")

    with monkeypatch.context() as patch:
        patch.setattr(integration, "fuse", broken)
        code, report = report_of(SMALL, "--dtype", "float64")
    assert code == 1 and "fused float64: TypeError: 'NoneType'" in report["failures"][0]
    with monkeypatch.context() as patch:
        patch.setattr(model, "PEERS", {"a peer": broken})
        code, report = report_of(SMALL, "--dtype", "float32")
    assert code == 0 and "TypeError" in report["checks"][-1]["failure"]
    monkeypatch.setattr(model, "aligned_penalty", broken)
    code, report = report_of(SMALL, "--dtype", "float64")
    assert code == 1 and len(report["failures"]) == 2


def test_the_saved_class_is_loaded_and_random_weights_are_refused(tmp_path):
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path / "tokens")
    assert type(load(os.fspath(tmp_path / "tokens"))).__name__ == "BertForTokenClassification"
    transformers.BertModel(config).save_pretrained(tmp_path / "body")
    path = tmp_path / "body" / "config.json"
    path.write_text(path.read_text().replace('"BertModel"', '"BertForMaskedLM"'))
    with pytest.raises(CannotValidate, match="lacks weights of BertForMaskedLM"):
        load(os.fspath(tmp_path / "body"))


def test_padding_is_told_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", FACTORIES)
    assert "without padding" in run("mine:good", "--dtype", "float64").output
    assert "one of them padded" in run(SMALL, "--dtype", "float64").output


def test_a_model_that_is_not_deterministic_is_not_confirmed(monkeypatch):
    class Noisy(Small):
        def forward(self, inputs_embeds):
            return super().forward(inputs_embeds) * (1 + 1e-3 * torch.rand(()))

    subject = prepare(Noisy(), 2, 8, 0)
    report = model.validate_model(subject, ("float64",), "cpu")
    assert any("not smooth here, or not deterministic" in failure for failure in report.failures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "a folder that save_pretrained wrote"),
        (["nowhere_at_all:model"], "cannot be loaded (ModuleNotFoundError: "),
        (["torch:nothing_like_it"], "cannot be loaded (AttributeError: "),
        (["transformers:ViTModel"], "must have get_input_embeddings() with an nn.Embedding"),
        (["torch.nn:Flatten"], "does not take inputs_embeds="),
        ([SMALL, "--dtype", "int8"], "choose from float64, float32, bfloat16"),
        ([SMALL, "--device", "tpu"], "choose from auto, cpu, cuda"),
        ([SMALL, "--op", "linear"], "leave --op and --backend out"),
        ([":"], "cannot be loaded (ValueError: "),
        (["torch:nn.Linear"], "of a function without arguments"),
        (["torch:nn.Identity", "--layers", "2"], "decides its own layers"),
    ],
)
def test_bad_arguments(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_options_that_go_with_a_model():
    result = CliRunner().invoke(main.app, ["validate", "--layers", "2", "--op", "linear"])
    assert result.exit_code == 2 and "they go with --model" in result.output


def test_small_and_odd_vocabularies():
    class Odd(Small):
        def __init__(self, words, outputs):
            super().__init__()
            self.table, self.mix = nn.Embedding(words, 6), nn.Linear(6, outputs)

    for words, outputs in ((1, 1), (50, 3)):
        report = model.validate_model(prepare(Odd(words, outputs), 2, 8, 0), ("float64",), "cpu")
        assert not report.failures


def test_what_is_no_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", FACTORIES)
    with pytest.raises(CannotValidate, match="int is no nn.Module"):
        load("mine:number")
    with pytest.raises(CannotValidate, match="of a function without arguments"):
        load("mine:needs")
    with pytest.raises(CannotValidate, match=r"must return logits or hidden states .* got \(2, 11\)"):
        prepare(Small(lambda x: x.mean(1)), 2, 8, 0)
    with pytest.raises(CannotValidate, match="cannot be called with inputs_embeds=.*ZeroDivisionError"):
        prepare(Small(lambda x: 1 / 0), 2, 8, 0)
    without = Small()
    without.get_input_embeddings = lambda: None
    with pytest.raises(CannotValidate, match="get_input_embeddings"):
        prepare(without, 2, 8, 0)


def test_a_model_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(loading, "BYTES", 10**15)
    with pytest.raises(CannotValidate, match="GiB for copies and gradients.*--layers 2"):
        prepare(Small(), 2, 8, 0)


def test_finite_differences_leave_alone_what_embeddings_drop_from_a_gradient():
    """Of a padding row torch drops the gradient, of a table with scale_grad_by_freq it divides it."""

    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Embedding(5, 3, padding_idx=1)
            self.again = nn.Embedding(5, 3, padding_idx=-1)
            self.again.weight = self.shared.weight
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.shared.weight
            self.bag = nn.EmbeddingBag(5, 3, padding_idx=0)
            self.counted = nn.Embedding(5, 3, scale_grad_by_freq=True)
            self.free = nn.Embedding(5, 3)

    tables = Tables()
    along = {name: torch.ones_like(p) for name, p in tables.named_parameters()}
    model._keep_still(tables, along)
    still = {name: (direction == 0).all(1).nonzero().flatten().tolist() for name, direction in along.items()}
    assert still == {
        "shared.weight": [1, 4],
        "bag.weight": [0],
        "counted.weight": [0, 1, 2, 3, 4],
        "free.weight": [],
    }


@pytest.mark.slow
def test_a_model_with_a_padding_row_passes():
    code, report = report_of(
        "transformers:BartForConditionalGeneration", "--dtype", "float64", "--length", "6"
    )
    assert code == 0 and report["finite_differences"] < 1e-9
