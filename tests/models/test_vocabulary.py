import copy

import numpy as np
import pytest
import torch
from tiny_backbones import embeddings, new_mpnet
from torch import nn

from clseave_cli.core.models.student import new_student
from clseave_cli.core.models.vocabulary import reduced_vocabulary

TRAINED = ["The square is red.", "The square is red and green.", "red", "A dog waits outside."]
OTHERS = ["Das Quadrat ist weiß.", "Buiten wacht een hond."]


def _words(encoder):
    return encoder.backbone.get_input_embeddings().weight


def _optimise(encoder, tokens, weight_decay):
    """A few steps of AdamW with all that the loop does."""
    torch.manual_seed(1)
    expected = torch.randn(len(tokens), encoder.embedding_dim)
    parameters = list(encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=weight_decay, fused=True)
    for step in range(4):
        rows = np.roll(np.arange(len(tokens)), step)[:3]
        optimizer.zero_grad()
        predicted = encoder(encoder.pack(tokens, rows))
        (predicted - expected[torch.from_numpy(rows)]).square().mean().backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_words_in_use_are_trained_as_in_the_whole_table_and_no_others(
    sentence_encoder, weight_decay
):
    before = _words(sentence_encoder).detach().clone()
    tokens = sentence_encoder.tokenize(TRAINED)
    whole, reduced = sentence_encoder, copy.deepcopy(sentence_encoder)
    _optimise(whole, tokens, weight_decay)
    with reduced_vocabulary(reduced, tokens):
        assert len(_words(reduced)) < len(before)
        _optimise(reduced, tokens, weight_decay)
    used = np.unique(tokens.ids)
    unused = np.setdiff1d(np.arange(len(before)), [*used, reduced.pad_id])
    assert unused.size and torch.equal(_words(reduced)[unused], before[unused])
    for name, value in reduced.named_parameters():
        expected = whole.get_parameter(name)
        if value is _words(reduced):
            assert not torch.equal(value[used], before[used])
            value, expected = value[used], expected[used]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_embeddings_are_the_same_inside_and_after_a_failure(sentence_encoder):
    trained, others = (sentence_encoder.tokenize(texts) for texts in (TRAINED, OTHERS))
    shapes = {name: value.shape for name, value in sentence_encoder.state_dict().items()}
    expected = embeddings(sentence_encoder, [*TRAINED, *OTHERS])
    with pytest.raises(RuntimeError), reduced_vocabulary(sentence_encoder, trained, others):
        assert torch.equal(embeddings(sentence_encoder, [*TRAINED, *OTHERS]), expected)
        raise RuntimeError  # an encoder is whole again after a failure too
    assert {n: v.shape for n, v in sentence_encoder.state_dict().items()} == shapes
    assert sentence_encoder.token_places is None
    assert torch.equal(embeddings(sentence_encoder, [*TRAINED, *OTHERS]), expected)


def test_a_translator_is_merged_into_every_word_vector(sentence_encoder):
    texts = [*TRAINED, *OTHERS]
    words = sentence_encoder.backbone.get_input_embeddings()
    translator = nn.Linear(words.embedding_dim, words.embedding_dim, bias=False)
    behind = copy.deepcopy(sentence_encoder)
    behind.backbone.set_input_embeddings(nn.Sequential(copy.deepcopy(words), translator))
    expected = embeddings(behind, texts)
    assert (expected - embeddings(sentence_encoder, texts)).abs().max() > 1e-2
    tokens = sentence_encoder.tokenize(TRAINED)
    with reduced_vocabulary(sentence_encoder, tokens, translator=translator):
        trained = embeddings(sentence_encoder, TRAINED)
    torch.testing.assert_close(trained, expected[: len(TRAINED)], rtol=0, atol=1e-5)
    assert sentence_encoder.backbone.get_input_embeddings() is words
    torch.testing.assert_close(embeddings(sentence_encoder, texts), expected, rtol=0, atol=1e-5)


def test_no_other_token_takes_the_padding_id_that_positions_depend_on(tmp_path):
    """MPNet counts tokens that are not padding, whose id follows an unused one here."""
    tokens = {"unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>"}
    special = {f"{role}_token": token for role, token in tokens.items()}
    student = new_student(new_mpnet(tmp_path, TRAINED, special), 16).eval()
    assert not student.verify_packing() and student.pad_id == 1
    expected = embeddings(student, TRAINED)
    with reduced_vocabulary(student, student.tokenize(TRAINED)):
        assert torch.equal(embeddings(student, TRAINED), expected)


def test_word_vectors_in_another_form_are_left_alone(sentence_encoder):
    words = _words(sentence_encoder)
    scaled = type("Scaled", (nn.Embedding,), {})(*words.shape, _weight=words.detach().clone())
    sentence_encoder.backbone.set_input_embeddings(scaled)
    with reduced_vocabulary(sentence_encoder, sentence_encoder.tokenize(TRAINED)):
        assert sentence_encoder.backbone.get_input_embeddings() is scaled
