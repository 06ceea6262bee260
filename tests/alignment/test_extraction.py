"""Word alignment against a reference that takes one pair at a time."""

import numpy as np
import pytest
import reference_aligner
import torch
from tiny_world import flip_byte
from transformers import AutoModel, AutoTokenizer

from clseave_cli.core.alignment import word_aligner
from clseave_cli.core.alignment.links import Links
from clseave_cli.core.alignment.word_aligner import WordAligner, cached_links, link_words
from clseave_cli.core.alignment.words import split_words
from clseave_cli.core.models.student import new_student
from clseave_cli.core.training.distribution import Processes
from clseave_cli.errors import UsageError

ENGLISH = ["The square is red.", "A dog waits outside.", "It is blue.", "red", "  The   dog "]
GERMAN = ["Das Quadrat ist rot.", "Draußen wartet ein Hund.", "Es ist blau.", "rot", "Der Hund"]
PAIRS = np.stack([np.arange(5), np.arange(5)])


@pytest.fixture
def student(encoder):
    torch.manual_seed(0)
    return new_student(encoder, 16).eval()


def _random_pairs(count):
    """States and words of pairs of any lengths, several sub-words a word."""
    random = np.random.default_rng(3)
    for _ in range(count):
        sides = []
        for _ in range(2):
            words = np.arange(random.integers(1, 9))
            words = np.repeat(words, random.integers(1, 4, len(words)))
            states = torch.from_numpy(random.standard_normal((len(words), 16))).float()
            sides.append((states, words.tolist()))
        yield sides


def _batched(pairs, threshold):
    sides = []
    for side in range(2):
        states = torch.full((len(pairs), 40, 16), torch.pi)
        words = torch.full((len(pairs), 40), -1)
        for number, pair in enumerate(pairs):
            # Special tokens stand before and behind, padding after them.
            length = len(pair[side][1])
            states[number, 1 : 1 + length] = pair[side][0]
            words[number, 1 : 1 + length] = torch.tensor(pair[side][1])
        sides.append((states, words))
    (source, source_words), (target, target_words) = sides
    return link_words(source, target, source_words, target_words, threshold).tolist()


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.1, 0.5])
def test_batched_extraction_equals_the_reference(threshold):
    pairs = list(_random_pairs(60))
    wanted = [
        [number, *link]
        for number, ((source, source_words), (target, target_words)) in enumerate(pairs)
        for link in sorted(
            reference_aligner.link_words(
                source.tolist(), target.tolist(), source_words, target_words, threshold
            )
        )
    ]
    assert _batched(pairs, threshold) == wanted
    assert threshold == 0.5 or len(wanted) > 60


def test_one_pair_by_hand():
    # Two words each; the second source word has two sub-words, one like each target word.
    source = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]]])
    target = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])
    words = torch.tensor([[0, 1, 1]])
    # Sub-word 2 shares target 0 with sub-word 0: half the probability each, far over 0.001.
    for threshold, links in ((1e-3, [[0, 0, 0], [0, 1, 0], [0, 1, 1]]), (0.6, [[0, 1, 1]])):
        linked = link_words(source, target, words, torch.tensor([[0, 1]]), threshold)
        assert linked.tolist() == links


def test_without_words_there_are_no_links(student):
    links = WordAligner(student, "encoder").align(split_words([]), split_words([]), PAIRS[:, :0])
    assert len(links) == 0 and list(links.lines()) == []
    states, words = torch.ones(2, 3, 4), torch.tensor([[-1, 0, -1], [-1, -1, -1]])
    assert link_words(states, states, words, words, 0.0).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("packs", [True, False])
def test_the_aligner_equals_the_reference_on_transformers_own_states(student, encoder, packs):
    student.packs = packs
    aligner = WordAligner(student, "encoder", threshold=0.04)
    links = aligner.align(split_words(ENGLISH), split_words(GERMAN), PAIRS)
    model = AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for number, (english, german) in enumerate(zip(ENGLISH, GERMAN, strict=True)):
        source, target = (
            reference_aligner.sentence_states(model, tokenizer, text.split(), 1)
            for text in (english, german)
        )
        wanted = reference_aligner.link_words(
            source[0].tolist(), target[0].tolist(), source[1], target[1], 0.04
        )
        span = slice(links.offsets[number], links.offsets[number + 1])
        assert list(map(tuple, links.words[span].tolist())) == sorted(wanted)
    possible = [len(e.split()) * len(g.split()) for e, g in zip(ENGLISH, GERMAN, strict=True)]
    assert 0 < len(links.words) < sum(possible)


def test_the_layer_is_the_eighth_or_the_last(student, encoder):
    assert WordAligner(student, "encoder").layer == 1
    with pytest.raises(UsageError, match=r"--aligner-layer 8: encoder has 1; choose from 1 to 1"):
        WordAligner(student, "encoder", layer=8)


def test_links_are_cached_by_encoder_and_threshold(student, encoder, cache, monkeypatch):
    source, target = split_words(ENGLISH), split_words(GERMAN)

    def align(threshold=0.04, student=student):
        links = WordAligner(student, "encoder", threshold=threshold).align(source, target, PAIRS)
        return list(links.lines())

    student.train()
    before = [parameter.detach().clone() for parameter in student.parameters()]
    first = align()
    assert student.training and all(map(torch.equal, before, student.parameters()))
    (kept,) = (cache / "words").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(WordAligner, "_align", None)
        assert align() == first
        # The randomly initialised projection of another student changes no link.
        assert align(student=new_student(encoder, 16)) == first
    assert align(0.5) != first and len(list((cache / "words").iterdir())) == 2
    flip_byte(kept)
    assert align() == first  # damaged, so found anew
    with torch.no_grad():
        next(student.backbone.parameters()).add_(0.01)
    align()
    assert len(list((cache / "words").iterdir())) == 3


def test_the_first_of_several_processes_finds_the_links(monkeypatch):
    links = Links(np.zeros((1, 2), dtype=np.int64), np.ones(1, dtype=bool), np.array([0, 1]))
    monkeypatch.setattr(Processes, "agree", lambda *_: links)  # received from rank 0
    monkeypatch.setattr(word_aligner, "processes", lambda: Processes(1, 2))
    assert cached_links("key", lambda: pytest.fail("computed twice")) is links
