"""Words of sentences, with and without spaces, and the tokens they are made of."""

import sys
from itertools import groupby
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from clseave_cli.core.alignment import words as words_module
from clseave_cli.core.alignment.words import NONE, find_tokens, split_words
from clseave_cli.core.models import backbones
from clseave_cli.core.models.student import new_student
from clseave_cli.core.models.tokens import tokenize
from clseave_cli.errors import ExtraMissing


def _split(text, lang=None):
    return split_words(["one two", text], lang).of(1)


def test_words_stand_between_spaces():
    text = " The  square\tis red.\n"
    assert _split(text, "en") == ["The", "square", "is", "red."]
    assert split_words(["a b", "", "c"]).counts.tolist() == [2, 0, 1]
    assert len(split_words([])) == 0


@pytest.mark.parametrize(
    ("lang", "module", "text", "wanted"),
    [
        ("ja", "sudachipy", "犬が 公園を走る。", ["犬", "が", "公園", "を", "走る", "。"]),
        ("zh", "rjieba", "有一个绿色的圆形。", ["有", "一个", "绿色", "的", "圆形", "。"]),
        ("zh-Hant", "rjieba", "我是學生", ["我", "是", "學生"]),
        ("ko", "mecab", "빨간 하트가 있습니다.", ["빨간", "하트", "가", "있", "습니다", "."]),
        ("th", "pythainlp", "ฉันรักภาษาไทย", ["ฉัน", "รัก", "ภาษาไทย"]),
    ],
)
def test_segmented_languages(lang, module, text, wanted):
    pytest.importorskip(module)
    assert _split(text, lang) == wanted


@pytest.mark.parametrize(
    ("lang", "module"),
    [("ja", "sudachipy"), ("zh", "rjieba"), ("ko", "mecab"), ("th", "pythainlp")],
)
def test_a_missing_segmenter_names_the_extra(monkeypatch, lang, module):
    monkeypatch.setitem(sys.modules, module, None)
    words_module._segmenter.cache_clear()
    with pytest.raises(ExtraMissing, match=r"words in .. need .*'\.\[segment\]"):
        split_words(["x"], lang)
    # With words that stand between spaces already, nothing is missing.
    assert split_words(["a b"]).counts.tolist() == [2]


def test_a_segmenter_that_changes_the_text(monkeypatch):
    monkeypatch.setattr(words_module, "_segmenter", lambda code: lambda text: ["ab", " ", "X", "c"])
    assert _split("ab c", "ja") == ["ab", "c"]


def _words_of_tokens(encoder, text, lang=None):
    """(token, word) of every token of a sentence, and the first tokens of its words."""
    aligned = find_tokens(encoder, split_words(["", text], lang))
    span = slice(aligned.tokens.offsets[1], aligned.tokens.offsets[2])
    words = split_words([text], lang).of(0)
    named = [None if w == NONE else words[w] for w in aligned.word_of_token[span]]
    tokens = encoder.tokenizer.convert_ids_to_tokens(aligned.tokens.ids[span])
    first = aligned.first_token[aligned.words.offsets[1] :]
    return list(zip(tokens, named, strict=True)), [None if f == NONE else tokens[f] for f in first]


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_every_token_has_its_word(kind, encoder, clip):
    model = new_student(encoder, 16) if kind == "bert" else backbones.load_clip_text(clip)
    words = ["The", "square", "is", "weiß."]
    tokens, first = _words_of_tokens(model, " The square is  weiß. ")
    assert tokens[0][1] is None and tokens[-1][1] is None
    # Each word's tokens stand together, in the order of the words.
    assert [word for word, _ in groupby(word for _, word in tokens[1:-1])] == words
    assert first == [next(token for token, of in tokens if of == word) for word in words]
    if kind == "bert":  # CLIP's are bytes, in lower case
        assert all(token.removeprefix("##") in word for token, word in tokens[1:-1])


def test_words_that_were_cut_off_have_no_token(encoder):
    model = new_student(encoder, 16)
    text = "The square is red. " * 20
    tokens, first = _words_of_tokens(model, text)
    assert len(tokens) == model.max_tokens and tokens[-1] == ("[SEP]", None)
    assert len(first) == 80 and first[0] and first[-1] is None


class _SentencePieces:
    """An encoder's side that `find_tokens` needs, with pieces as of unsegmented text."""

    def __init__(self):
        pieces = ["<s>", "</s>", "▁", "ab", "c", "de", "▁f"]
        backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        self.tokenizer = SimpleNamespace(
            backend_tokenizer=backend,
            convert_ids_to_tokens=lambda ids: [pieces[number] for number in ids],
        )

    def tokenize(self, sentences):
        backend = self.tokenizer.backend_tokenizer
        return tokenize(backend, sentences, max_tokens=16, terminal_id=1)


def test_a_piece_belongs_to_the_word_it_begins_in(monkeypatch):
    # The words are a, bcd, e, f; the pieces ab and de reach over the end of one.
    monkeypatch.setattr(
        words_module, "_segmenter", lambda code: lambda text: ["a", "bcd", "e", " ", "f"]
    )
    tokens, first = _words_of_tokens(_SentencePieces(), "abcde f", "ja")
    assert tokens == [
        ("<s>", None), ("▁", "a"), ("ab", "a"), ("c", "bcd"), ("de", "bcd"), ("▁f", "f"),
        ("</s>", None),
    ]  # fmt: skip
    assert first == ["▁", "c", None, "▁f"]
