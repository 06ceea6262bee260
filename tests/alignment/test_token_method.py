"""`align --method token`: the loss against one computed pair by pair, and what is kept of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_backbones
import tiny_world
import torch
from safetensors.torch import load_file
from tiny_world import QUICK, killed_at_step, quick_align, read_jsonl, tree, weights
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection

from clseave_cli.commands.options import resolve
from clseave_cli.core.alignment import objectives, token
from clseave_cli.core.alignment.autoencoding import autoencode
from clseave_cli.core.alignment.objectives import SentenceObjective, squared_error
from clseave_cli.core.alignment.token import TokenObjective
from clseave_cli.core.config import AlignConfig, AutoencodeConfig, ExportConfig
from clseave_cli.core.features import Sentences
from clseave_cli.core.models.clip_ve import ClipVE
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.scratch import new_encoder
from clseave_cli.core.models.student import (
    Autoencoder,
    load_autoencoder,
    load_student,
    new_token_student,
    save_student,
)
from clseave_cli.core.prediction.export import export
from clseave_cli.errors import DataError, ModelError, UsageError

ENGLISH = ["The square is red.", "A dog waits outside."]
GERMAN = ["Das Quadrat ist rot.", "Draußen wartet ein Hund."]
#: What the teacher makes of the English sentences.
VECTORS = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
#: Word of the German sentence, word of the English one.
WORDS = [[(0, 0), (1, 1), (3, 3)], [(0, 3), (3, 1), (2, 0)]]


def _align(data, runs, trained, encoder, *languages, **options):
    options = {"method": "token"} | options
    return quick_align(data, runs, trained, encoder, *(languages or ("de",)), **options)


def _autoencoder(world, trained, encoder, tmp_path, *languages):
    config = AutoencodeConfig(
        data=str(world), runs=trained, lang=languages, student=str(encoder),
        out=tmp_path / "autoencoder", epochs=1, **QUICK,
    )  # fmt: skip
    return autoencode(config).folder


@pytest.fixture
def teacher(trained):
    return ClipVE.from_folder(trained / "clip-ve")


@pytest.fixture
def student(encoder, teacher):
    torch.manual_seed(0)
    return new_token_student(encoder, teacher.text, "linear").eval()


def _states(model, tokenizer, sentence):
    """transformers' own last hidden states of a sentence, and each word's first token."""
    inputs = tokenizer(sentence.split(), is_split_into_words=True, return_tensors="pt")
    words = inputs.word_ids(0)
    first = [words.index(word) for word in range(len(sentence.split()))]
    return model(**inputs).last_hidden_state[0], first


def _by_hand(student, encoder, clip_ve, terminal, target):
    """The mean squared error of all token pairs, one sentence and one pair at a time."""
    model = AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    clip = CLIPTextModelWithProjection.from_pretrained(clip_ve / "text").text_model.eval()
    clip_tokenizer = AutoTokenizer.from_pretrained(clip_ve / "text")
    errors = []
    with torch.no_grad():
        for german, english, words in zip(GERMAN, ENGLISH, WORDS, strict=True):
            hidden, first_tokens = _states(model, tokenizer, german)
            # A byte-level tokenizer knows no words: they are found by reading the sentence so far.
            inputs = clip_tokenizer(english, return_tensors="pt")
            states = clip.embeddings(**{"input_ids": inputs.input_ids})
            mask = torch.full([states.shape[1]] * 2, -torch.inf).triu(1)[None, None]
            for layer in clip.encoder.layers:
                output = layer(states, attention_mask=mask)
                states = output[0] if isinstance(output, tuple) else output
            targets = (clip.final_layer_norm(states) if target == "normalised" else states)[0]
            firsts = [
                len(clip_tokenizer(" ".join(english.split()[:word])).input_ids) - 1
                for word in range(len(english.split()))
            ]
            places = [(first_tokens[i], firsts[j]) for i, j in words]
            places += [(len(hidden) - 1, len(targets) - 1)] if terminal else []
            for i, j in places:
                errors.append((student.norm.coder(hidden[i]) - targets[j]).square().mean().item())
    return float(np.mean(errors)), len(errors)


def _objective(student, teacher, terminal, both=(0.0, 1.0), weights=(1.0, 1.0), **more):
    """The objective of the two sentences, their tokens found by the corpus' own means."""
    corpus = token.TokenCorpus(
        student, teacher.text, "en", AlignConfig(terminal_pair=terminal), progress=None
    )
    words = token.split_words(GERMAN, "de")
    flat = np.array([(j, i) for pair in WORDS for i, j in pair])
    links = token.Links(flat, np.ones(len(flat), dtype=bool), np.array([0, 3, 6]))
    part = SimpleNamespace(
        tokens=student.tokenize(GERMAN), sentence_of_pair=np.arange(2),
        source_of_pair=np.arange(2), counts=np.ones(2),
    )  # fmt: skip
    corpus._take(links, words, part)
    pairs = SimpleNamespace(
        sentences=Sentences(part.tokens, np.arange(2)),
        teacher=SimpleNamespace(
            index=np.arange(2), vectors=SimpleNamespace(rows=lambda rows: VECTORS[rows])
        ),
        distinct=np.arange(2),
        weights=torch.tensor(weights),
    )
    return TokenObjective(
        teacher.text,
        corpus.pairs(ENGLISH),
        SentenceObjective(student, pairs, squared_error),
        sentence_weight=both[0],
        token_weight=both[1],
        **more,
    )


@pytest.mark.parametrize("target", ["normalised", "encoder"])
@pytest.mark.parametrize(("code", "terminal"), [("linear", True), ("relu", False)])
def test_the_loss_equals_one_computed_pair_by_pair(
    teacher, trained, encoder, code, terminal, target
):
    torch.manual_seed(0)
    student = new_token_student(encoder, teacher.text, code, target=target).eval()
    objective = _objective(student, teacher, terminal, target=target)
    batch = objective.prepare(np.array([1, 0]))
    wanted, count = _by_hand(student, encoder, trained / "clip-ve", terminal, target)
    assert objective.loss(batch).item() == pytest.approx(wanted, rel=1e-4)
    assert batch.num_tokens.sum() == count == (8 if terminal else 6)


def test_a_repeated_pair_counts_as_often_as_it_stands(teacher, student):
    first, second = (
        _objective(student, teacher, True).prepare(np.array([row])) for row in range(2)
    )
    both = _objective(student, teacher, True, weights=(3.0, 1.0))
    sums = [both.loss(batch).item() * batch.num_tokens.item() for batch in (first, second)]
    wanted = (3 * sums[0] + sums[1]) / (3 * 4 + 4)
    assert both.loss(both.prepare(np.arange(2))).item() == pytest.approx(wanted, rel=1e-5)


def test_shards_of_several_processes_add_up(teacher, student, monkeypatch):
    objective = _objective(student, teacher, True)
    whole = objective.loss(objective.prepare(np.arange(2))).item()

    def play(**methods):
        for module in (token, objectives):
            monkeypatch.setattr(module, "processes", lambda: SimpleNamespace(**methods))

    shards = []
    for rank in range(2):
        play(shard=lambda rows, rank=rank: np.array_split(rows, 2)[rank])
        shards.append(objective._errors(objective.prepare(np.arange(2))))
    gathered = torch.cat(shards)
    play(shard=lambda rows: rows, gather=lambda encode, count: gathered)
    loss = objective.loss(objective.prepare(np.arange(2))).item()
    assert loss == pytest.approx(whole, rel=1e-5)


def test_each_distinct_english_sentence_is_encoded_once(teacher, student):
    objective = _objective(student, teacher, True)
    objective.sentences.pairs.teacher.index = np.array([1, 1])
    assert len(objective.prepare(np.arange(2)).source.terminals) == 1


def test_only_encoder_and_code_are_trained(world, trained, encoder, tmp_path, teacher):
    before = tree(trained / "clip-ve")
    result = _align(
        world, tmp_path, trained, encoder, token_target="encoder", method="sentence+token"
    )
    student = load_student(result.folder)
    assert tree(trained / "clip-ve") == before
    assert torch.equal(student.projection.weight, teacher.text.projection.weight)
    last = teacher.text.backbone.final_layer_norm
    assert module_digest(student.norm.final_norm) == module_digest(last)
    fresh = new_token_student(encoder, teacher.text, "linear")
    assert module_digest(student.backbone) != module_digest(fresh.backbone)


@pytest.mark.parametrize("method", ["token", "sentence+token"])
def test_a_student_learns(world, trained, encoder, tmp_path, method):
    options = {"method": method, "epochs": 100, "weight_decay": 0.0, "select": "mse"}
    result = _align(world, tmp_path, trained, encoder, **options)
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    records = [record for record in records if "dev" in record]
    errors, losses = [r["dev"]["mse"] for r in records], [r["loss"] for r in records]
    # Not by heart: an untrained encoder aligns some words wrongly, and differently each time.
    assert min(errors) < 0.4 * errors[0] and losses[-1] < 0.4 * losses[0]


def test_both_losses_add_up_and_pack_the_sentences_once(teacher, student, monkeypatch):
    tokens = _objective(student, teacher, True)
    both = _objective(student, teacher, True, both=(1.0, 0.5))
    sentences = both.sentences
    rows = np.array([1, 0])
    wanted = sentences.loss(sentences.prepare(rows)) + 0.5 * tokens.loss(tokens.prepare(rows))
    packed = []
    monkeypatch.setattr(
        student, "pack", lambda *a: packed.append(1) or type(student).pack(student, *a)
    )
    assert both.loss(both.prepare(rows)).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert packed == [1]  # once for both losses


def test_links_of_a_file_are_those_of_the_aligner(clseave, world, trained, encoder, tmp_path):
    """What word-align writes, read by align, makes the same student to the bit."""
    path = tmp_path / "links.de"
    code, _, err = clseave(
        "word-align", "--data", world, "--lang", "de", "--aligner", encoder, "--out", path,
        "--aligner-threshold", 0.05, "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and "24 sentence pairs" in err
    links = tmp_path / "links.{lang}"
    aligned = _align(world, tmp_path / "a", trained, encoder, aligner_threshold=0.05)
    read = _align(world, tmp_path / "b", trained, encoder, alignments=links)
    assert weights(aligned.folder) == weights(read.folder)
    path.write_text("0-0\n" * 24)
    other = _align(world, tmp_path / "c", trained, encoder, alignments=links)
    assert weights(other.folder) != weights(read.folder)


def test_a_limit_takes_no_tokens_from_a_trimmed_vocabulary(world, trained, encoder, tmp_path):
    kept = []
    for method, limit in (("sentence", 1), ("token", None)):
        options = {"method": method, "limit": limit, "trim_vocabulary": True}
        result = _align(world, tmp_path / method, trained, encoder, "de", "nl", **options)
        assert np.isfinite(result.training.dev["mse"])
        kept.append(load_student(result.folder).trimmed.kept)
    assert np.array_equal(*kept)
    result = _align(world, tmp_path, trained, encoder, "de", "nl", include_english=True)
    assert np.isfinite(result.training.dev["mse"])


def test_english_words_pair_with_themselves(teacher, student):
    config = AlignConfig(terminal_pair=False)
    corpus = token.TokenCorpus(student, teacher.text, "en", config, progress=None)
    numbers = np.arange(2)
    corpus.add_source(
        SimpleNamespace(
            tokens=student.tokenize(ENGLISH), sentence_of_pair=numbers, source_of_pair=numbers,
            counts=np.ones(2),
        ),
        ENGLISH,
    )  # fmt: skip
    pairs = corpus.pairs(ENGLISH)
    assert np.diff(pairs.links.offsets).tolist() == [4, 4]
    first_letters = [
        [model.tokenizer.convert_ids_to_tokens(int(id_))[0].lower() for id_ in ids[words[:4]]]
        for model, ids, words in (
            (teacher.text, pairs.sources.ids, pairs.links.words[:, 0]),
            (student, student.tokenize(ENGLISH).ids, pairs.links.words[:, 1]),
        )
    ]
    assert first_letters[0] == first_letters[1]


def test_the_thesis_preset_is_the_failing_method(
    world, trained, encoder, teacher, tmp_path, monkeypatch
):
    config = resolve(AlignConfig, {"method": "token"}, preset="thesis")
    faults = {"code": "relu", "terminal_pair": False, "sentence_token": "pooler",
              "token_target": "encoder", "token_reader": "code",
              "pretrained_code": True}  # fmt: skip
    assert {name: getattr(config, name) for name in faults} == faults
    # This teacher's states are wider than its embeddings, which a bare code cannot be.
    with pytest.raises(ModelError, match=r"--token-reader code: the head reads 16 .* has 32; use"):
        new_token_student(encoder, teacher.text, "relu", reader="code")
    faults["token_reader"] = "decoder"
    pretrained = _autoencoder(world, trained, encoder, tmp_path, "de", "nl")
    started, make = [], token.new_token_student
    monkeypatch.setattr(
        token, "new_token_student", lambda *a, **k: started.append(make(*a, **k)) or started[-1]
    )
    result = _align(
        world, tmp_path, trained, encoder, autoencoder=pretrained, max_steps=1,
        learning_rate=0.0, **faults,
    )  # fmt: skip
    autoencoder, fingerprint = load_autoencoder(pretrained, Autoencoder(32, 32))
    student = load_student(result.folder)
    for part, half in ((student.norm.coder, "encoder"), (student.norm.decoder, "decoder")):
        for name, value in getattr(autoencoder, half).state_dict().items():
            assert torch.equal(part.state_dict()[name], value)
    assert student.pooling == "cls"
    assert torch.equal(student.norm.pooler[0].weight, started[0].norm.pooler[0].weight)
    assert fingerprint in (result.folder / "training" / "run.json").read_text()


def test_a_student_read_through_the_decoder_resumes_to_the_bit(world, trained, encoder, tmp_path):
    options = {
        "method": "sentence+token", "code": "relu", "sentence_token": "cls", "epochs": 3,
        "token_target": "encoder", "token_reader": "decoder", "pretrained_code": True,
        "autoencoder": _autoencoder(world, trained, encoder, tmp_path, "de"), "batch_size": 2,
    }  # fmt: skip
    whole = _align(world, tmp_path / "whole", trained, encoder, **options)
    with killed_at_step(5):
        _align(world, tmp_path / "parts", trained, encoder, checkpoint_minutes=0, **options)
    parts = _align(world, tmp_path / "parts", trained, encoder, resume=True, **options)
    assert weights(parts.folder) == weights(whole.folder)


def test_the_sentence_is_read_through_the_encoders_own_pooling_layer(teacher, world, tmp_path):
    encoder = tiny_backbones.STUDENTS["LaBSE"](tmp_path, tiny_world.sentences(world))
    student = new_token_student(encoder, teacher.text, "linear", sentence_token="pooler").eval()
    inputs = AutoTokenizer.from_pretrained(encoder)(GERMAN, return_tensors="pt", padding=True)
    with torch.no_grad():
        pooled = AutoModel.from_pretrained(encoder).eval()(**inputs).pooler_output
        wanted = teacher.text.projection(student.norm.coder(pooled))
        embeddings = student(student.pack(student.tokenize(GERMAN), np.arange(len(GERMAN))))
    torch.testing.assert_close(embeddings, wanted)


@pytest.mark.parametrize("sentence_token", ["terminal", "pooler"])
def test_an_embedding_can_be_made_from_the_folder_alone(teacher, encoder, tmp_path, sentence_token):
    """As docs/checkpoints.md says, from files and with torch's own functions."""
    options = {"target": "encoder", "sentence_token": sentence_token}
    student = new_token_student(encoder, teacher.text, "relu", **options).eval()
    save_student(student, tmp_path, languages=["de"], teacher=teacher.fingerprint)
    coding = json.loads((tmp_path / "config.json").read_text())["coding"]
    weights = load_file(tmp_path / "projection.safetensors")
    model = AutoModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    inputs = tokenizer(GERMAN, return_tensors="pt", padding=True)

    def linear(name, states):
        weight = weights.pop(f"{name}.weight")
        return functional.linear(states, weight, weights.pop(f"{name}.bias", None))

    with torch.no_grad():
        states = model(**inputs).last_hidden_state
        assert coding["pools"] == (sentence_token == "pooler") and coding["code"] == "relu"
        if coding["pools"]:
            states = linear("coded_state.pooler.0", states[:, 0]).tanh()
        else:
            states = states[torch.arange(2), inputs.attention_mask.sum(dim=1) - 1]
        normal = functional.layer_norm(
            linear("coded_state.coder.0", states).relu(), [coding["width"]],
            weights.pop("coded_state.final_norm.weight"),
            weights.pop("coded_state.final_norm.bias"), coding["norm_eps"],
        )  # fmt: skip
        embeddings = linear("projection", normal)
        wanted = student(student.pack(student.tokenize(GERMAN), np.arange(len(GERMAN))))
    torch.testing.assert_close(embeddings, wanted)
    assert not weights


@pytest.mark.parametrize("reader", ["padded", "decoder", "code"])
def test_the_readers_of_the_thesis(teacher, world, tmp_path, reader):
    """Section 4.1, with a student 1.5 times as wide as the teacher; also after saving."""
    new_encoder(tmp_path / "encoder", tiny_world.sentences(world), width=48, num_layers=1)
    text = teacher.text
    if reader == "code":
        text.projection = torch.nn.Linear(32, 32, bias=False)
    student = new_token_student(
        tmp_path / "encoder", text, "relu", target="encoder", reader=reader
    ).eval()
    last, matrix = text.backbone.final_layer_norm, text.projection.weight
    with torch.no_grad():
        torch.nn.init.normal_(last.weight)
        if reader != "code":
            student.norm.final_norm.weight[:32] = last.weight
        states = torch.randn(3, 48)
        code = student.norm.coder[0](states).relu()
        read = {"padded": states, "decoder": student.norm.decoder(code), "code": code}[reader]
        wanted = code
        if reader != "code":
            read = (read - read.mean(1, keepdim=True)) / (
                read.var(1, keepdim=True, correction=0) + last.eps
            ).sqrt()
            # Padding with zeros keeps 32 of the 48 numbers, normalised with all of them.
            wanted = (read[:, :32] * last.weight + last.bias) @ matrix.T
        torch.testing.assert_close(student.project(states), wanted)
        (tmp_path / "saved").mkdir()
        save_student(student, tmp_path / "saved", languages=["de"], teacher="x")
        torch.testing.assert_close(load_student(tmp_path / "saved").project(states), wanted)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert not [name for name in trained if "final_norm" in name or "projection" in name]


def test_an_older_folder_is_read_through_the_projection(teacher, encoder, tmp_path):
    student = new_token_student(encoder, teacher.text, "linear", target="encoder").eval()
    save_student(student, tmp_path, languages=["de"], teacher="x")
    coding = json.loads((tmp_path / "config.json").read_text())["coding"]
    assert coding.pop("reader") == "projection"
    tiny_world.reseal(tmp_path, "student", coding=coding)
    states = torch.randn(2, 32)
    assert torch.equal(load_student(tmp_path).project(states), student.project(states))


def test_encoders_that_do_not_fit_are_refused(teacher, world, tmp_path):
    sentences = tiny_world.sentences(world)
    new_encoder(tmp_path / "narrow", sentences, width=16, num_layers=1)
    with pytest.raises(ModelError, match=r"--token-reader padded: pads the teacher's 32 .* is 16;"):
        new_token_student(tmp_path / "narrow", teacher.text, "linear", reader="padded")
    encoder = tiny_backbones.STUDENTS["DistilmBERT"](tmp_path / "no pooler", sentences)
    with pytest.raises(ModelError, match=r"a distilbert model has no pooling layer; use .* cls"):
        new_token_student(encoder, teacher.text, "linear", sentence_token="pooler")


def test_a_token_student_predicts_and_is_exported(clseave, world, runs, encoder, tmp_path):
    _align(world, runs, runs, encoder, code="relu", token_reader="padded", sentence_token="pooler")
    image = world / "images" / "test0.png"
    code, _, err = clseave("predict", image, GERMAN[0], "--lang", "de", "--runs", runs, "--json")
    assert code == 0, err
    exported = export(ExportConfig(runs=runs, out=tmp_path / "onnx", lang=("de",), device="cpu"))
    assert exported.difference < 1e-4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pooling": "mean"}, UsageError, "--method token: use --sentence-token"),
        ({"objective": "cosine"}, UsageError, "--objective cosine needs --method sentence"),
        ({"token_reader": "decoder"}, UsageError, "--token-reader decoder: .*--pretrained-code"),
        ({"token_reader": "code"}, ModelError, "--token-reader code: the head reads 16"),
        ({"aligner_layer": 8}, UsageError, "--aligner-layer 8: .* has 1"),
        ({"aligner": "nowhere/at/all"}, ModelError, "nowhere/at/all: no such model folder"),
        ({"pretrained_code": True}, ModelError, "autoencoder: no such model folder; .*autoencode"),
        ({"aligner_threshold": 1.0, "terminal_pair": False}, DataError, "no words are linked"),
        ({"method": "sentence", "alignments": "links.{lang}"}, UsageError,
         "--alignments: --method sentence does not compare words"),
        ({"auxiliary": ("nl",), "alignments": "links"}, UsageError,
         r"--alignments links: one file for several languages; put \{lang\} in its name"),
        ({"alignments": "missing.{lang}"}, DataError, "missing.de: cannot be read"),
        ({"alignments": "long.{lang}"}, DataError,
         "long.de:25: more lines than sentences; .*train.de.jsonl has 24"),
        ({"alignments": "short.{lang}"}, DataError, "short.de: 23 lines; expected 24"),
        ({"alignments": "word.{lang}"}, DataError, "word.de:24: 0-4 names a word that does not"),
        ({"alignments": "text.{lang}"}, DataError, "text.de:24: '0;4' is no link"),
    ],
)  # fmt: skip
def test_refusals(world, trained, encoder, tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    for name, last in (("long", "0-0\n0-0"), ("short", ""), ("word", "0-4"), ("text", "0;4")):
        (tmp_path / f"{name}.de").write_text("0-0\n" * 23 + last)
    with pytest.raises(error, match=message):
        _align(world, tmp_path / "runs", trained, encoder, **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", sorted(set(tiny_backbones.TEACHERS) - {"clip", "metaclip_2"}))
def test_a_teacher_that_ends_otherwise_is_refused(name, world, encoder, tmp_path):
    folder = tiny_backbones.TEACHERS[name](tmp_path, tiny_world.sentences(world))
    with pytest.raises(ModelError, match="the token method needs a teacher whose text tower ends"):
        new_token_student(encoder, ClipVE.from_clip(folder).text, "linear")


@pytest.mark.parametrize("method", ["token", "sentence+token"])
@pytest.mark.parametrize("name", sorted(tiny_backbones.STUDENTS))
def test_any_encoder_can_be_the_student(name, method, world, trained, teacher, tmp_path):
    encoder = tiny_backbones.STUDENTS[name](tmp_path / "encoder", tiny_world.sentences(world))
    result = _align(world, tmp_path, trained, encoder, method=method, max_steps=2)
    assert np.isfinite(result.training.dev["mse"])
    before = new_token_student(encoder, teacher.text, "linear").backbone
    assert module_digest(load_student(result.folder).backbone) != module_digest(before)
