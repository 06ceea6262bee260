"""The local engine, for real, with tiny models of random weights."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from tiny_models import make_m2m100, make_marian
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from clseave_cli.core.config import TranslateConfig
from clseave_cli.core.translation.corpus import translate
from clseave_cli.core.translation.engine import Rejection, create_engine
from clseave_cli.core.translation.nmt import DEFAULT_MODEL, LICENCES, Codec, NmtEngine, load_config
from clseave_cli.errors import ModelError, UsageError

_TEXTS = ["A man in a red shirt.", "Two dogs.", "There is exactly one blue square.", "3 men 犬"]
_needs_ctranslate2 = pytest.mark.skipif(
    importlib.util.find_spec("ctranslate2") is None, reason="needs the ctranslate2 extra"
)
_BACKENDS = ["transformers", pytest.param("ctranslate2", marks=_needs_ctranslate2)]
_every_model = pytest.mark.parametrize("name", ["marian", "multilingual", "m2m100"])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "marian": make_marian(folder / "marian"),
        "multilingual": make_marian(folder / "multilingual", languages=("nld", "deu")),
        "m2m100": make_m2m100(folder / "m2m100"),
    }


def _engine(model, target="de", backend="transformers", **options):
    config = TranslateConfig(model=str(model), backend=backend, **options)
    return create_engine(config, "en", target)


def _reference(model, text, beams, max_new_tokens):
    """One text translated by transformers, as its documentation shows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    more = {}
    if hasattr(tokenizer, "get_lang_id"):
        tokenizer.src_lang = "en"
        more["forced_bos_token_id"] = tokenizer.get_lang_id("de")
    elif tokenizer.supported_language_codes:
        text = f">>deu<< {text}"
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        output = network.generate(
            **inputs, num_beams=beams, max_new_tokens=max_new_tokens, no_repeat_ngram_size=3, **more
        )[0]
    # transformers 5 no longer counts M2M-100's language marks among the special tokens.
    return re.sub(r"__[a-z]+__", "", tokenizer.decode(output, skip_special_tokens=True)).strip()


@_every_model
@pytest.mark.parametrize("beams", [1, 3])
def test_agrees_with_transformers_on_single_texts(models, name, beams):
    engine = _engine(models[name], beams=beams)
    codec, _ = engine._load()
    for text in _TEXTS[1:]:  # alone: padding may tip a beam of random weights
        limit = min(2 * len(codec.encode([text])[0]) + 16, codec.max_tokens - 2)
        assert engine.translate([text], 1) == [_reference(models[name], text, beams, limit)]


@_every_model
def test_padding_changes_nothing(models, name):
    _, decoder = engine = _engine(models[name], beams=1)._load()
    ids = engine[0].encode(_TEXTS)
    together = decoder(ids, 20, False)
    for index, tokens in enumerate(ids):
        alone = decoder([tokens], 20, False)[0]
        assert alone == together[index][: len(alone)]


@_needs_ctranslate2
@_every_model
def test_both_backends_agree(models, name):
    outputs = []
    for backend in ("transformers", "ctranslate2"):
        codec, decoder = _engine(models[name], backend=backend, beams=1, precision="fp32")._load()
        ids = codec.encode(_TEXTS)
        # The last place is forced to be the end by some models, and is free in others.
        outputs.append([codec.decode([row])[0][:12] for row in decoder(ids, 18, True)])
    assert outputs[0] == outputs[1]
    assert any(outputs[0])  # random weights may translate a text into nothing


@_needs_ctranslate2
def test_translations_in_8_bits_are_kept_apart(models, monkeypatch):
    import ctranslate2

    made, translator = [], ctranslate2.Translator
    monkeypatch.setattr(
        ctranslate2, "Translator", lambda *a, **k: made.append(translator(*a, **k)) or made[-1]
    )
    exact, small = (
        _engine(models["marian"], backend="ctranslate2", beams=1, int8=int8)
        for int8 in (False, True)
    )
    assert exact.identity != small.identity and small.identity.settings == "beams=1 int8"
    codec, decoder = small._load()
    assert made[0].compute_type.startswith("int8")
    assert any(codec.decode(decoder(codec.encode(_TEXTS), 18, True)))


@pytest.mark.parametrize("backend", _BACKENDS)
def test_translates_a_folder_and_remembers(models, tmp_path, backend, monkeypatch):
    rows = [{"pairID": str(i), "sentence2": t} for i, t in enumerate([*_TEXTS, _TEXTS[0], "…"])]
    (tmp_path / "snli_ve_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TranslateConfig(
        data=tmp_path, lang=("de",), model=str(models["m2m100"]), backend=backend,
        batch_size=2, beams=2,
    )  # fmt: skip
    file = translate(config).files[0]
    assert (file.num_rows, file.num_translated, file.num_unchanged) == (6, 5, 1)
    first = file.output.read_bytes()
    assert first.count(b"\n") == 6
    # What is in the memory is written without the model being loaded again.
    monkeypatch.setattr(NmtEngine, "_load", lambda self: pytest.fail("the model was loaded"))
    again = translate(config).files[0]
    assert again.num_from_memory == 5 and again.output.read_bytes() == first


@pytest.mark.parametrize("backend", _BACKENDS)
def test_repetition_is_guarded_and_length_bounded(models, backend):
    engine = _engine(models["m2m100"], backend=backend, beams=1)
    codec, decoder = engine._load()
    loops = decoder(codec.encode(_TEXTS), 30, False)
    assert any(len(set(row)) < 8 for row in loops)  # left alone, random weights loop
    for text, answer in zip(_TEXTS, engine.translate(_TEXTS, 0), strict=True):
        limit = 4 * len(codec.encode([text])[0]) + 40
        assert answer and len(codec.tokenizer(answer)["input_ids"]) <= limit
    guarded = decoder(codec.encode(_TEXTS), 30, True)
    end = codec.tokenizer.eos_token_id
    for row in guarded:
        body = row[1 : row.index(end, 1) if end in row[1:] else None]
        triples = list(zip(body, body[1:], body[2:], strict=False))
        assert len(triples) == len(set(triples))


def test_too_long_without_a_sentence_end_is_rejected(models):
    with pytest.raises(Rejection, match=r"\d+ tokens without a sentence end .* takes 128"):
        _engine(models["marian"]).translate(["x" * 300], 0)


def test_out_of_memory_halves_the_batch(models, monkeypatch):
    engine = _engine(models["marian"], beams=1)
    (codec, generate), sizes = engine._load(), []

    def limited(ids, *rest):
        sizes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return generate(ids, *rest)

    expected = engine.translate(["Two dogs."], 1)
    monkeypatch.setattr(engine, "_load", lambda: (codec, limited))
    assert engine.translate(["Two dogs."] * 8, 1) == expected * 8
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_translations_of_other_weights_beams_or_precision_are_kept_apart(models, tmp_path):
    first = _engine(models["marian"]).identity
    assert first == _engine(models["marian"]).identity
    assert first != _engine(models["marian"], beams=2).identity
    assert first == _engine(models["marian"], precision="fp32").identity  # on a CPU
    assert first != _engine(models["marian"], precision="bf16").identity
    copy = make_marian(tmp_path / "marian")
    assert _engine(copy).identity.revision == first.revision
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert _engine(copy).identity.revision != first.revision


def test_models_that_do_not_fit(models, tmp_path):
    with pytest.raises(ModelError, match="does not know the language ko"):
        _engine(models["multilingual"], "ko").translate(["A man."], 0)
    with pytest.raises(ModelError, match="does not know the language tlh"):
        _engine(models["m2m100"], "tlh").translate(["A man."], 0)
    pair = make_marian(tmp_path / "pair")
    settings = json.loads((pair / "tokenizer_config.json").read_text())
    settings |= {"source_lang": "eng", "target_lang": "nld"}
    (pair / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="translates eng into nld, not en into de"):
        _engine(pair).translate(["A man."], 0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        _engine(empty)
    (empty / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="a bert model; expected one that translates"):
        _engine(empty).translate(["A man."], 0)
    with pytest.raises(ModelError, match="/de: no such model folder"):
        _engine(tmp_path / "{lang}")
    (pair / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="damaged, not a safetensors file"):
        _engine(pair, "nl").translate(["A man."], 0)
    (pair / "model.safetensors").unlink()
    torch.save({}, pair / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        _engine(pair, "nl").translate(["A man."], 0)


def test_missing_extra(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[ctranslate2\]'"):
        _engine(models["marian"], backend="ctranslate2")
    with pytest.raises(UsageError, match=r"--int8: .* would run in transformers"):
        _engine(models["marian"], int8=True).translate(["one"], 0)
    assert _engine(models["marian"], backend="auto").translate(["A man."], 0)


def test_the_default_model_may_be_used_by_everyone():
    (licence,) = (text for name, text in LICENCES.items() if DEFAULT_MODEL.startswith(name))
    assert licence == "MIT: commercial use allowed"


def test_codec_of_nllb_and_madlad(models, monkeypatch):
    """Their language marks, with stand-ins for their tokenizers, whose vocabularies are large."""

    class Tokenizer:
        all_special_ids = (0,)
        model_max_length = 512

        def __init__(self, vocabulary, **more):
            self._vocabulary = vocabulary
            self.__dict__.update(more)

        def get_vocab(self):
            return self._vocabulary

        def __call__(self, texts):
            return {"input_ids": texts}

    config = load_config(str(models["marian"]))
    tokenizer = Tokenizer({"eng_Latn": 5, "zho_Hans": 6}, src_lang="x")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    assert Codec("nllb", config, "en", "zh").prefix_id == 6
    assert tokenizer.src_lang == "eng_Latn"
    tokenizer = Tokenizer({"<2de>": 7})
    config.model_type = "t5"
    assert Codec("madlad", config, "en", "de").encode(["A man."]) == ["<2de> A man."]
    with pytest.raises(ModelError, match="does not know the language nl"):
        config.task_specific_params = {}
        Codec("madlad", config, "en", "nl")


def test_help_and_memory_hits_load_no_torch(models):
    code = (
        "import sys\n"
        "from clseave_cli.commands import translate\n"
        "from clseave_cli.core.translation.corpus import translate\n"
        "from clseave_cli.core.translation.nmt import NmtEngine\n"
        "from clseave_cli.core.config import TranslateConfig\n"
        "NmtEngine(TranslateConfig(model=sys.argv[1]), 'en', 'de')\n"
        "heavy = {'torch', 'transformers', 'deep_translator', 'requests', 'lingua', 'pyarrow'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    command = [sys.executable, "-c", code, str(models["marian"])]
    subprocess.run(command, check=True, env={"PYTHONPATH": ":".join(sys.path)})
