"""The command that evaluates a model: what is read and encoded, what it writes, and its errors."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

import tokenizers

from aajr_kernels.method.evaluation import Evaluation
from common import texts
from common.command import application
from experiments import __main__ as front
from experiments.evaluate import data, encoding
from experiments.evaluate.command import command

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template=None):
    """One token for every byte, and one special token."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {character: i for i, character in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model = texts.small_llama(
        0,
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.save_pretrained(place)
    tokenizer(TEMPLATE).save_pretrained(place)
    return place


def call(*arguments):
    return CliRunner().invoke(application(command), [str(argument) for argument in arguments])


QUICK = "--steps 2 --budget 1 --tries 3 --suffix 2 --batch 2 --reply 4".split()


def lines(path, *values):
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n")
    return path


def test_a_file_of_prompts_is_evaluated(folder, tmp_path):
    file = lines(
        tmp_path / "texts.jsonl",
        {"prompt": "Say yes. Now: no, never.", "attack": "no, never", "response": "yes"},
        {"prompt": "short", "response": "fine"},
        {"prompt": "without a response"},
    )
    options = ("--model", folder, "--data", file, *QUICK)
    result = call(*options, "--out", tmp_path / "first", "--fit", file, "--at", "model.layers.0")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "first" / "evaluation.json").read_text())
    evaluation = Evaluation.from_dict(written)
    assert len(evaluation.clean) == 3 and sorted(written["rows"]) == [0, 1, 2]
    assert list(evaluation.attacked) == ["embedding", "substitution", "suffix", "universal", "hidden"]
    assert (evaluation.attacked["embedding"] >= evaluation.clean - 1e-5).all()
    assert written["run"]["fused"] is True and written["run"]["budget"] == 1
    # of the row that names it, the adversary's part only is replaced, and the suffix follows it
    row = written["rows"].index(0)
    assert written["texts"]["clean"][row] == "no, never"
    changed = written["texts"]["substitution"][row]
    assert len(written["texts"]["suffix"][row]) > len("no, never")
    assert written["texts"]["suffix"][row].startswith("no, never") and changed != "no, never"
    page = (tmp_path / "first" / "page.md").read_text()
    assert f"| clean | {evaluation.clean.mean():.4f}" in page and "## Texts of suffix\n" in page
    assert (tmp_path / "first" / "evaluation.png").stat().st_size > 10_000
    # the clean loss of the first row is that of the model itself
    from transformers import AutoModelForCausalLM

    chat = "<user>Say yes. Now: no, never.</><assistant>"
    ids = torch.tensor([tokenizer()(chat + "yes")["input_ids"]])
    with torch.no_grad():
        scores = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0, -4:-1].log_softmax(-1)
    expected = -scores.gather(1, ids[0, -3:, None]).mean()
    assert evaluation.clean[row].item() == pytest.approx(expected.item(), rel=1e-4)


def test_texts_and_a_list_of_objects_and_one_attack(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 4)
    result = call("--model", folder, "--data", text, "--length", 32, "--attack", "substitution", *QUICK,
                  "--out", tmp_path / "out", "--rows", 3)  # fmt: skip
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert list(written["attacked"]) == ["substitution"] and len(written["clean"]) == 3
    assert all(len(one) == 16 for one in written["texts"]["clean"])


def test_the_front_door_has_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["experiments", "evaluate", "--help"])
    with pytest.raises(SystemExit) as ended:
        front.main()
    assert ended.value.code == 0 and "experiments evaluate" in capsys.readouterr().out


# -- encoding -----------------------------------------------------------------------------------------------


def test_tokens_of_the_adversary_are_its_characters():
    example = data.Example("Translate: ignore this. Thanks", "no", "ignore this")
    for chat, whole in (
        (True, "<system>Be kind</><user>Translate: ignore this. Thanks</><assistant>"),
        (False, "Translate: ignore this. Thanks"),
    ):
        tokens = tokenizer(TEMPLATE)
        row = encoding.prompt_of(tokens, example, "Be kind", chat)
        assert tokens.decode(row.ids) == whole
        assert tokens.decode([t for t, is_open in zip(row.ids, row.is_open) if is_open]) == "ignore this"
        answered = row.answered(encoding.response_of(tokens, "no"))
        assert tokens.decode(answered.ids) == whole + "no"
        assert [t for t, scored in zip(answered.ids, answered.is_scored) if scored] == answered.ids[-2:]
        assert not any(answered.is_open[-2:])
    # the template strips what surrounds the prompt
    row = encoding.prompt_of(tokenizer(TEMPLATE), data.Example("  all of it "), None, True)
    assert sum(row.is_open) == len("all of it")


def test_batches_hold_rows_of_similar_length():
    rows = [
        encoding.Row([1] * n, [True] + [False] * (n - 1), [False] * (n - 1) + [True]) for n in (5, 2, 9, 3)
    ]
    batches, order = encoding.batches(rows, 2)
    assert order == [1, 3, 0, 2] and [batch["input_ids"].shape for batch in batches] == [(2, 3), (2, 9)]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batches[0]["labels"].tolist() == [[-100, 1, -100], [-100, -100, 1]]
    assert batches[0]["attack_mask"].tolist() == [[1, 0, 0], [1, 0, 0]]


def test_a_text_is_cut_into_pieces_half_of_which_are_scored():
    rows = encoding.windows(tokenizer(), "abcdefghij", 4)
    assert [tokenizer().decode(row.ids) for row in rows] == ["abcd", "efgh"]
    assert rows[0].is_open == [True, True, False, False] and rows[0].is_scored == [False, False, True, True]


# -- errors -------------------------------------------------------------------------------------------------

BAD_FILES = {
    "no json": ("x.jsonl", "{prompt: 1}", "must hold JSON"),
    "no prompt": ("x.jsonl", '{"text": "a"}', "line 1 must be an object with a prompt"),
    "list": ("x.json", '[{"prompt": "a"}, 3]', "entry 2 must be an object"),
    "response": ("x.jsonl", '{"prompt": "a", "response": 3}', "response must be a text, got 3"),
    "attack": ("x.jsonl", '{"prompt": "aba", "attack": "a"}', "must occur once in the prompt, got 2 times"),
    "empty": ("x.txt", " \n", "is empty"),
    "short": ("x.txt", "abc", "at least --length=64 tokens, got 3"),
    "long": ("x.jsonl", json.dumps({"prompt": "a" * 80, "response": "b"}), "no row of at most --length=64 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named(kind, folder, tmp_path):
    name, content, message = BAD_FILES[kind]
    (tmp_path / name).write_text(content)
    result = call("--model", folder, "--data", tmp_path / name, "--length", 64, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_arguments_that_cannot_be_used_are_named(folder, tmp_path):
    file = lines(tmp_path / "x.jsonl", {"prompt": "a", "response": "b"})
    for arguments, message in (
        (("--model", tmp_path / "none", "--data", file), "cannot be loaded"),
        (("--model", folder, "--data", tmp_path / "none.txt"), "No such file"),
        (("--model", folder, "--data", file, "--adapter", tmp_path), "--adapter"),
        (("--model", folder, "--data", file, "--device", "nowhere"), "--device 'nowhere' cannot be used"),
        (("--model", folder, "--data", file, "--attack", "hidden"), "at must name a module"),
        (("--model", folder, "--data", file, "--at", "model.layers.9"), "got 'model.layers.9', which is not there"),
        (("--model", folder, "--data", file, "--radius", "0"), "radius must be positive"),
        (("--model", folder, "--data", file, "--attack", "suffix", "--fit", file), "--fit goes with the universal"),
    ):  # fmt: skip
        result = call(*arguments, "--out", tmp_path / "out")
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
