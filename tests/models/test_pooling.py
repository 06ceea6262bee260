"""Poolings: packed as alone, as transformers computes them, saved and loaded."""

import json

import numpy as np
import pytest
import torch
from tiny_world import reseal

from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.packing import pack
from clseave_cli.core.models.student import load_student, new_student, save_student
from clseave_cli.errors import ModelError

SENTENCES = [
    "The square is red.",
    "x",
    "A dog waits outside.",
    "The square is green and blue and white and red and green.",
    "Das Quadrat ist weiß.",
]
POOLINGS = ("terminal", "cls", "mean")


@pytest.fixture(params=POOLINGS)
def student(request, encoder):
    torch.manual_seed(0)
    made = new_student(encoder, 16, request.param)
    torch.nn.init.normal_(made.norm.weight)
    return made.eval()


def _reference(student, sentence):
    """One sentence through transformers' own forward and the formulas of docs/methods.md."""
    inputs = student.tokenizer(sentence, return_tensors="pt")
    hidden = student.backbone(**inputs).last_hidden_state[0]
    pooled = {"terminal": hidden[-1], "cls": hidden[0], "mean": hidden.mean(dim=0)}[student.pooling]
    normed = torch.nn.functional.layer_norm(
        pooled, pooled.shape, student.norm.weight, student.norm.bias, student.norm.eps
    )
    return student.projection.weight @ normed


@pytest.mark.parametrize("row_tokens", [None, 32, 48])
def test_packed_embeddings_are_those_of_single_sentences(student, row_tokens):
    tokens = student.tokenize(SENTENCES)
    order = np.array([3, 0, 4, 1, 2])
    with torch.no_grad():
        batch = pack(tokens, order, row_tokens=row_tokens, pad_id=student.pad_id)
        ours = student(batch)
        theirs = torch.stack([_reference(student, SENTENCES[i]) for i in order])
    assert row_tokens is None or len(batch.input_ids) < len(SENTENCES)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std(dim=0).min() > 1e-4
    assert student.verify_packing()


def test_saved_and_loaded_it_is_the_same(student, tmp_path):
    save_student(student, tmp_path, languages=["de"], teacher="t" * 64)
    again = load_student(tmp_path)
    assert module_digest(again) == module_digest(student) and again.embedding_dim == 16
    assert again.pooling == student.pooling
    tokens = student.tokenize(SENTENCES)
    rows = np.arange(len(SENTENCES))
    with torch.no_grad():
        assert torch.equal(again(again.pack(tokens, rows)), student(student.pack(tokens, rows)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pooling"] == student.pooling
    # What earlier versions could train is refused, not read as something else.
    reseal(tmp_path, "student", projection="mlp")
    with pytest.raises(ModelError, match="its projection is of a kind"):
        load_student(tmp_path)


def test_students_of_different_poolings_have_different_digests(encoder):
    digests = set()
    for pooling in POOLINGS:
        torch.manual_seed(0)
        digests.add(new_student(encoder, 16, pooling).digest())
    assert len(digests) == 3
