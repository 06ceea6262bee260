"""Students around every kind of encoder: each sentence as transformers computes it alone."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_backbones import CANNOT_BE_PACKED, MAX_TOKENS, STUDENTS, embeddings, save_word_tokenizer
from tiny_world import reseal, sentences
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, T5Config

from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.student import load_student, new_student, save_student
from clseave_cli.errors import ModelError

TEXTS = [
    "Das Quadrat ist weiß.",
    "x",
    "Draußen wartet ein Hund.",
    "Das Quadrat ist " + "rot. Das Quadrat ist blau. " * 20,
    "Das Quadrat ist grün. Draußen wartet ein Hund.",
]

#: Name of the encoder, pooling.
KINDS = [(name, "terminal") for name in STUDENTS] + [("mBERT", "cls"), ("mBERT", "mean")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(kind, tmp_path_factory, world):
    return STUDENTS[kind[0]](tmp_path_factory.mktemp(kind[0]), sentences(world))


@pytest.fixture
def student(kind, backbone):
    torch.manual_seed(0)
    student = new_student(backbone, 16, kind[1]).eval()
    torch.nn.init.normal_(student.norm.weight)
    torch.nn.init.normal_(student.norm.bias)
    return student


def _reference(backbone, student):
    """One sentence at a time, unpadded: its states pooled, normalised, projected."""
    model = AutoModel.from_pretrained(backbone).eval()
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, return_tensors="pt")
        assert inputs["input_ids"][0, -1] == student.terminal_id
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
            poolings = {"terminal": states[-1], "cls": states[0], "mean": states.mean(dim=0)}
            state = poolings[student.pooling]
            state = (state - state.mean()) / torch.sqrt(state.var(unbiased=False) + 1e-5)
            state = state * student.norm.weight + student.norm.bias
            expected.append(state @ student.projection.weight.T)
    return torch.stack(expected)


def test_sentence_embeddings_are_what_transformers_computes(kind, backbone, student):
    packs = student.verify_packing()
    assert packs == (kind[0] not in CANNOT_BE_PACKED)
    assert student.max_tokens == MAX_TOKENS
    tokens = student.tokenize(TEXTS)
    assert tokens.truncated.tolist() == [False, False, False, True, False]
    expected = _reference(backbone, student)
    assert torch.pdist(expected).min() > 1e-3
    torch.testing.assert_close(embeddings(student, TEXTS), expected, rtol=1e-4, atol=1e-4)
    rows = np.arange(len(TEXTS))[::-1]
    if packs:
        assert len(student.pack(tokens, rows).input_ids) < len(TEXTS)
    with torch.no_grad():
        backwards = student(student.pack(tokens, rows))
    torch.testing.assert_close(backwards.flip(0), expected, rtol=1e-4, atol=1e-4)
    student.packs = False
    torch.testing.assert_close(embeddings(student, TEXTS), expected, rtol=1e-4, atol=1e-4)


def test_a_student_of_any_kind_is_the_same_after_save_and_load(
    kind, student, tmp_path, monkeypatch
):
    student.verify_packing()
    assert student.first_position == (2 if kind[0] in ("XLM-R", "data2vec", "MPNet") else 0)
    fingerprint = save_student(student, tmp_path, languages=["de"], teacher="t" * 64)
    with monkeypatch.context() as patch:
        patch.setattr(backbones, "_first_position", None)  # saved, not determined again
        again = load_student(tmp_path, "t" * 64)
    assert again.fingerprint == fingerprint and not again.training
    assert module_digest(again) == module_digest(student)
    assert again.packing == student.packing  # or evaluate and predict would pack what cannot be
    assert again.digest() == student.digest()
    assert torch.equal(embeddings(again, TEXTS), embeddings(student, TEXTS))
    saved = AutoModel.from_pretrained(tmp_path / "encoder").state_dict()
    assert all(torch.equal(saved[k], weight) for k, weight in student.backbone.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["languages"] == ["de"] and config["pooling"] == student.pooling
    assert config["teacher"] == "t" * 64 and config["format_version"] == 1
    assert config["first_position"] == student.first_position
    # A folder of an earlier version: positions were not in it.
    reseal(tmp_path, "student", without=("first_position",))
    again = load_student(tmp_path)
    assert again.packing == student.packing
    assert torch.equal(embeddings(again, TEXTS), embeddings(student, TEXTS))
    # The projection of earlier versions is refused.
    reseal(tmp_path, "student", projection="mlp")
    with pytest.raises(ModelError, match="its projection is of a kind"):
        load_student(tmp_path)


def test_unknown_positions_are_never_passed(tmp_path, world, monkeypatch):
    # Without the true one.
    monkeypatch.setattr(backbones, "_candidate_positions", lambda model: [0])
    folder = STUDENTS["XLM-R"](tmp_path, sentences(world))
    student = new_student(folder, 16).eval()
    assert student.first_position is None and not student.verify_packing()
    expected = _reference(folder, student)
    torch.testing.assert_close(embeddings(student, TEXTS), expected, rtol=1e-4, atol=1e-4)


def test_the_position_table_is_a_limit_too(backbone, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "unlimited")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**9
    tokenizer.save_pretrained(folder)
    assert new_student(folder, 16).max_tokens == MAX_TOKENS


def test_padding_saved_with_a_tokenizer_is_ignored(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "padded")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("x").ids) == 16
    actual, expected = (new_student(path, 16).tokenize(TEXTS) for path in (folder, encoder))
    np.testing.assert_array_equal(actual.ids, expected.ids)
    np.testing.assert_array_equal(actual.offsets, expected.offsets)


def test_packing_respects_the_windows_of_local_attention(tmp_path, world):
    student = new_student(STUDENTS["mmBERT"](tmp_path, sentences(world)), 16)
    assert student.verify_packing()
    student.backbone.config.local_attention = 2 * MAX_TOKENS  # what packing takes the window from
    batch = student.pack(student.tokenize(TEXTS), np.arange(len(TEXTS)))
    wide = student._attention_mask(batch)["sliding_attention"]
    assert torch.equal(wide, batch.attention_mask(causal=False))


@pytest.mark.parametrize(
    ("template", "more"), [("<s> $A", {"eos_token": "</s>"}), ("<s> $A <unk>", {})]
)
def test_a_tokenizer_without_a_terminal_token_is_refused(tmp_path, world, template, more):
    STUDENTS["XLM-R"](tmp_path, sentences(world))
    special = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>", **more}
    save_word_tokenizer(tmp_path, sentences(world), special=special, template=template)
    with pytest.raises(ModelError, match="its tokenizer does not end a text in its"):
        new_student(tmp_path, 16)


def test_a_tokenizer_that_drops_letters_is_refused():
    backend = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[]))
    tokenizer = SimpleNamespace(
        backend_tokenizer=backend, sep_token_id=None, eos_token_id=None, name_or_path="x"
    )
    with pytest.raises(ModelError, match="x: its tokenizer does not end a text in its"):
        backbones.input_settings(None, tokenizer, {})


def test_other_models_are_refused(tmp_path, clip):
    T5Config(num_layers=1, d_model=8, d_kv=4, num_heads=2, d_ff=8).save_pretrained(tmp_path)
    for folder, kind in ((tmp_path, "t5"), (clip, "clip")):
        with pytest.raises(ModelError, match=f"a {kind} model; expected a text encoder such as"):
            new_student(folder, 16)
