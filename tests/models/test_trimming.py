"""A trimmed vocabulary: the same tokens and vectors on its text, and its restoration."""

import json

import numpy as np
import pytest
import torch
from tiny_backbones import STUDENTS, embeddings
from tiny_world import ENCODER_SHAPE, flip_byte, quick_align, read_jsonl, sentences, write_jsonl
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from clseave_cli import VisualEntailment
from clseave_cli.core.models import vocabulary
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.scratch import new_encoder
from clseave_cli.core.models.student import load_student, new_student, restore_student, save_student
from clseave_cli.core.models.vocabulary import trim_vocabulary
from clseave_cli.errors import ModelError

#: What the whole vocabulary is learnt from; the languages in use are the first two sentences.
CORPUS = [
    "Das Quadrat ist rot und das andere Quadrat ist blau.",
    "Draußen wartet ein Hund auf den anderen Hund.",
    "The square is red and the other square is blue.",
    "A dog waits outside for another dog.",
    "Le carré est rouge et un autre carré est bleu.",
    "赤い四角があります。犬が待っています。",
] * 4
USED = CORPUS[:2]
OTHERS = [*CORPUS[2:6], "Quadratisch, rotblau!", "🙂 x", ""]

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def _tokenizer(kind):
    """A sub-word tokenizer trained on the corpus; each kind adds special tokens in another way."""
    roberta = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    options = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        ends = [("<s>", 0), ("</s>", 2)]
        frame = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
        trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **options)
    elif kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        frame = processors.Sequence([processors.ByteLevel(trim_offsets=False), roberta])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, **options)
    else:  # marks continuations, as WordPiece does
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        frame = roberta
        trainer = trainers.BpeTrainer(vocab_size=220, continuing_subword_prefix="##", **options)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<mask>"] if kind == "unigram" else [])
    tokenizer.post_processor = frame
    return tokenizer


def _write_xlmr(folder, kind):
    tokenizer = _tokenizer(kind)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", sep_token="</s>",
        cls_token="<s>", unk_token="<unk>", pad_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    config = XLMRobertaConfig(
        # More rows than tokens, as some models have.
        vocab_size=tokenizer.get_vocab_size() + 5, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=130,
        type_vocab_size=1, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)


@pytest.fixture(scope="module", params=["wordpiece", "unigram", "bpe", "bpe with prefix"])
def whole(request, tmp_path_factory):
    """An untrained encoder of each kind of tokenizer; read only."""
    folder = tmp_path_factory.mktemp("whole")
    if request.param == "wordpiece":
        new_encoder(folder, CORPUS, **{**ENCODER_SHAPE, "vocab_size": 250, "max_tokens": 128})
    else:
        _write_xlmr(folder, request.param)
    return folder


def _student(folder):
    torch.manual_seed(1)
    return new_student(folder, 8).eval()


def _trimmed(folder):
    student = _student(folder)
    places = trim_vocabulary(student, np.unique(student.tokenize(USED).ids), str(folder))
    return student, places


@pytest.fixture
def before(whole):
    return _student(whole)


@pytest.fixture
def student(whole):
    """The same student, trimmed."""
    return _trimmed(whole)[0]


def test_the_text_in_use_has_the_same_tokens_and_vectors(whole, before):
    student, places = _trimmed(whole)
    assert len(student.trimmed.kept) < 0.8 * student.trimmed.num_tokens
    assert student.tokenize(USED).ids.tolist() == places[before.tokenize(USED).ids].tolist()
    assert torch.equal(embeddings(student, USED), embeddings(before, USED))
    # Pieces of the text are text too.
    words = [word for text in USED for word in text.split()]
    kept_words = [w for w in words if (places[before.tokenize([w]).ids] >= 0).all()]
    assert kept_words
    assert torch.equal(embeddings(student, kept_words), embeddings(before, kept_words))


def test_other_text_is_still_tokenised(before, student):
    for text in OTHERS:
        ids, unknown, plain = [], [], []
        for tokenizer in (before.tokenizer, student.tokenizer):
            ids.append(tokenizer.backend_tokenizer.encode(text).ids)
            unknown.append(ids[-1].count(tokenizer.unk_token_id))
            words = tokenizer.decode(ids[-1], skip_special_tokens=True).split()
            plain.append("".join(words).replace("##", ""))
        assert len(ids[1]) >= len(ids[0]) and ids[1][-1] == student.terminal_id
        assert unknown[1] <= unknown[0] and plain[1] == plain[0]


def test_transformers_alone_loads_it(whole, before, student, tmp_path):
    save_student(student, tmp_path, languages=["de"], teacher="t" * 64)
    model = AutoModel.from_pretrained(tmp_path / "encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    kept = len(student.trimmed.kept)
    assert model.config.vocab_size == kept == len(tokenizer)
    assert model.get_input_embeddings().num_embeddings == kept
    reference = AutoModel.from_pretrained(whole).eval()
    old = AutoTokenizer.from_pretrained(whole)
    for text in USED:
        actual = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
        expected = reference(**old(text, return_tensors="pt")).last_hidden_state
        assert torch.equal(actual, expected)
    loaded = load_student(tmp_path)
    assert torch.equal(embeddings(loaded, USED), embeddings(before, USED))
    assert np.array_equal(loaded.trimmed.kept, student.trimmed.kept)


def test_it_can_be_undone(before, student, tmp_path):
    # As training would change them.
    with torch.no_grad():
        for model in (before, student):
            model.projection.weight.mul_(2)
            model.backbone.encoder.layer[0].output.dense.weight.add_(0.1)
        table = student.backbone.get_input_embeddings().weight
        table.add_(1.0)
        before.backbone.get_input_embeddings().weight[torch.from_numpy(student.trimmed.kept)] += 1.0
    save_student(student, tmp_path, languages=["de"], teacher="t" * 64)
    restored = restore_student(tmp_path)
    assert module_digest(restored) == module_digest(before)
    assert torch.equal(embeddings(restored, OTHERS), embeddings(before, OTHERS))
    assert restored.tokenizer.get_vocab() == before.tokenizer.get_vocab()


def test_refusals(before, student, tmp_path, encoder):
    save_student(student, tmp_path, languages=["de"], teacher="t" * 64)
    with pytest.raises(ModelError, match="not the encoder that was trimmed"):
        restore_student(tmp_path, encoder)
    with pytest.raises(ModelError, match="trimmed already"):
        trim_vocabulary(student, np.arange(4), "x")
    flip_byte(tmp_path / "vocabulary.safetensors", 0.9)
    with pytest.raises(ModelError, match=r"vocabulary\.safetensors: damaged"):
        load_student(tmp_path)
    (tmp_path / "plain").mkdir()
    save_student(before, tmp_path / "plain", languages=["de"], teacher="t" * 64)
    with pytest.raises(ModelError, match="whole already"):
        restore_student(tmp_path / "plain")


def test_a_tokenizer_of_words_is_refused(tmp_path):
    STUDENTS["XLM-R"](tmp_path, CORPUS)
    with pytest.raises(ModelError, match=r"with WordPiece, Unigram and BPE .*, not WordLevel"):
        _trimmed(tmp_path)


def test_the_least_probable_piece_stays(tmp_path):
    """The penalty of an unknown character depends on it."""
    _write_xlmr(tmp_path, "unigram")
    lowest = []
    for student in (_student(tmp_path), _trimmed(tmp_path)[0]):
        content = json.loads(student.tokenizer.backend_tokenizer.to_str())
        lowest.append(min(score for _, score in content["model"]["vocab"]))
    assert lowest[0] == lowest[1]


def test_single_characters_by_kind():
    marks = ("Ġ", "▁", "##", "</w>")
    single = ["a", "##a", "▁a", "Ġ", "a</w>", "<0x0A>", "▁", "犬", "##犬"]
    tokens = [*single, "ab", "##ab", "<s>", "##", "▁ab"]
    assert [token for token in tokens if vocabulary._is_single(token, marks)] == single


# --- through align ---


def test_a_trimmed_student_is_the_untrimmed_one_on_its_text(world, tmp_path, trained, encoder):
    plain, short = (
        quick_align(world, tmp_path / name, trained, encoder, "de", epochs=2, trim_vocabulary=trim)
        for name, trim in (("plain", False), ("short", True))
    )
    texts = [row["sentence2"] for row in read_jsonl(world / "snli_ve_train.de.jsonl")]
    whole, trimmed = load_student(plain.folder), load_student(short.folder)
    assert torch.equal(embeddings(trimmed, texts), embeddings(whole, texts))
    assert short.training.dev == plain.training.dev
    size = [(r.folder / "encoder" / "model.safetensors").stat().st_size for r in (plain, short)]
    assert size[1] < size[0]
    assert trimmed.trimmed.encoder == str(encoder)
    assert trimmed.trimmed.num_tokens == len(whole.tokenizer)
    assert module_digest(restore_student(short.folder)) == module_digest(whole)
    # Text of other languages still gets an answer.
    (tmp_path / "short" / "clip-ve").symlink_to(trained / "clip-ve")
    model = VisualEntailment.from_pretrained(tmp_path / "short", "de", "cpu", "fp32")
    answer = model(world / "images" / "test0.png", sentences(world)[-1] + " 犬 xyz")
    assert sum(answer.probabilities.values()) == pytest.approx(1)


def test_english_keeps_the_tokens_of_all_its_sentences(world, tmp_path, trained, encoder):
    """Also of dev sentences, and of those that held-out photos or --limit drop."""
    words = ["Het", "vierkant", "is", "rood", "groen", "blauw", "wit", "Buiten", "wacht"]
    data = tmp_path / "data"
    data.mkdir()
    (data / "images").symlink_to(world / "images")
    photos = [f"train{n // 4 + 1}{n % 4}.png".replace("train1", "train") for n in range(8)]
    for name in ("train", "train.de", "train.nl", "dev", "dev.de"):  # photos are held out for nl
        rows = read_jsonl(world / f"snli_ve_{name}.jsonl")
        for row in rows:
            number = photos.index(row["Flickr30K_ID"]) if name.startswith("train") else 8
            row["sentence2"] = "Das Quadrat." if name[-3:] in (".de", ".nl") else words[number]
        write_jsonl(data / f"snli_ve_{name}.jsonl", rows)
    options = {"trim_vocabulary": True, "include_english": True, "limit": 3}
    result = quick_align(data, tmp_path, trained, encoder, "de", "nl", **options)
    student = load_student(result.folder)
    kept = student.trimmed.kept[student.tokenize(words).ids]
    assert kept.tolist() == new_student(encoder, 16).tokenize(words).ids.tolist()
