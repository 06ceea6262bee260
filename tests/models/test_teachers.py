"""Teachers of every layout: their embeddings are transformers' own, packed or alone."""

import re
import string

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from tiny_backbones import (
    EMBEDDING_DIM,
    MAX_TOKENS,
    STUDENTS,
    TEACHERS,
    embeddings,
    new_siglip,
    new_vit,
)
from tiny_world import flip_byte, sentences
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import Dinov2Config, Dinov2Model, SwinConfig, SwinModel

from clseave_cli.core.data.images import open_image
from clseave_cli.core.models import backbones
from clseave_cli.core.models.clip_ve import ClipVE, fingerprint
from clseave_cli.core.models.encoders import module_digest
from clseave_cli.core.models.packing import pack
from clseave_cli.errors import ModelError

VISIONS = ("clip", "siglip", "chinese_clip", "dinov2", "swin")

TEXTS = [
    "The square is red.",
    "x",
    "A dog waits outside.",
    "Das Quadrat ist weiß.",
    "The square is " + "green. The square is blue. " * 30,
    "The square is not red.",
]


@pytest.fixture(scope="module", params=list(TEACHERS))
def teacher(request, tmp_path_factory, world):
    return TEACHERS[request.param](tmp_path_factory.mktemp(request.param), sentences(world))


def _whole(folder):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def _reference(folder):
    """The texts read as the model's authors prescribe it; SigLIP attends to its padding."""
    model, tokenizer = _whole(folder)
    is_siglip = model.config.model_type.startswith("siglip")
    padding = "max_length" if is_siglip else "longest"
    inputs = tokenizer(TEXTS, padding=padding, truncation=True, return_tensors="pt")
    if is_siglip:
        assert inputs["input_ids"].shape[1] == MAX_TOKENS
        inputs = {"input_ids": inputs["input_ids"]}
    return model.get_text_features(**inputs).pooler_output.detach()


def _embed(encoder, row_tokens):
    tokens, rows = encoder.tokenize(TEXTS), np.arange(len(TEXTS))
    return encoder(pack(tokens, rows, row_tokens=row_tokens, pad_id=encoder.pad_id)).detach()


def test_text_embeddings_are_what_transformers_computes(teacher):
    text = backbones.load_clip_text(teacher).eval()
    expected = _reference(teacher)
    assert expected.shape == (len(TEXTS), EMBEDDING_DIM)
    assert torch.pdist(expected).min() > 1e-3
    assert text.tokenize(TEXTS).truncated.tolist() == [False] * 4 + [True, False]
    alone = torch.cat([embeddings(text, [sentence]) for sentence in TEXTS])
    for actual in (alone, _embed(text, text.row_tokens), _embed(text, None)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert text.verify_packing()
    text.packs = False  # the plain, padded layout
    torch.testing.assert_close(_embed(text, None), expected, rtol=1e-4, atol=1e-4)


def test_image_embeddings_are_what_transformers_computes(teacher, world):
    image = backbones.load_clip_image(teacher).eval()
    picture = open_image(world / "images" / "test0.png")
    pictures = [picture, picture.rotate(90).resize((20, 70)), picture.resize((61, 33))]
    processor = transformers.AutoImageProcessor.from_pretrained(teacher, backend="pil")
    assert type(processor) is type(image.processor)
    model, _ = _whole(teacher)
    with torch.no_grad():
        expected = model.get_image_features(**processor(images=pictures, return_tensors="pt"))
        actual = image(image.preprocess(pictures))
    assert actual.shape == (3, EMBEDDING_DIM) and image.embedding_dim == EMBEDDING_DIM
    torch.testing.assert_close(actual, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_a_clip_ve_of_any_layout_is_the_same_after_save_and_load(teacher, tmp_path):
    torch.manual_seed(0)
    model = ClipVE.from_clip(teacher)
    h, p = torch.randn(2, 8, EMBEDDING_DIM)
    model(h, p)  # changes the running statistics
    torch.nn.init.normal_(model.eval().text.projection.weight)  # as training changes it
    model.save(tmp_path)
    again = ClipVE.from_folder(tmp_path)
    assert module_digest(again) == module_digest(model) and not again.training
    assert again.text.digest() == model.text.digest()
    assert again.image.digest() == model.image.digest()
    assert torch.equal(embeddings(again.text, TEXTS), embeddings(model.text, TEXTS))
    with torch.no_grad():
        assert torch.equal(again(h, p), model(h, p))
    (tmp_path / "again").mkdir()
    again.save(tmp_path / "again")
    assert again.fingerprint == model.fingerprint == fingerprint(tmp_path) != ""


#: Classes that read the contents of `text/` and `image/`.
TOWERS = {
    "clip": ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipTextModel", "SiglipVisionModel"),
    "siglip2": ("Siglip2TextModel", "Siglip2VisionModel"),
    "chinese_clip": ("ChineseCLIPTextModel", "ChineseCLIPVisionModel"),
    "altclip": ("AltCLIPTextModel", "AltCLIPVisionModel"),
    "metaclip_2": ("MetaClip2TextModelWithProjection", "MetaClip2VisionModelWithProjection"),
    "vision-text-dual-encoder": ("BertModel", "ViTModel"),
}


def test_transformers_alone_loads_the_towers_and_a_damaged_projection_is_noticed(teacher, tmp_path):
    ClipVE.from_clip(teacher).save(tmp_path)
    whole, _ = _whole(teacher)
    text_class, image_class = TOWERS[whole.config.model_type]
    for part, class_name, model, projection in (
        ("text", text_class, "text_model", "text_projection"),
        ("image", image_class, "vision_model", "visual_projection"),
    ):
        kept = getattr(transformers, class_name).from_pretrained(tmp_path / part).state_dict()
        for name, weight in getattr(whole, model).state_dict().items():
            assert torch.equal(kept.get(name, kept.get(f"{model}.{name}")), weight), name
        file = tmp_path / part / "projection.safetensors"
        if file.exists():
            assert torch.equal(load_file(file)["weight"], getattr(whole, projection).weight)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "text")
    transformers.AutoImageProcessor.from_pretrained(tmp_path / "image", backend="pil")
    # A damaged or missing projection is noticed.
    path = tmp_path / "text" / "projection.safetensors"
    if not path.exists():
        return
    flip_byte(path, 0.9)
    with pytest.raises(ModelError, match=r"projection.safetensors: damaged"):
        ClipVE.from_folder(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"projection.safetensors: contains no projection"):
        backbones.load_clip_text(tmp_path / "text")
    path.unlink()
    with pytest.raises(ModelError, match=r"projection.safetensors: missing"):
        ClipVE.from_folder(tmp_path)
    with pytest.raises(ModelError, match=r"contains no projection|a bert model; expected one of"):
        backbones.load_clip_text(tmp_path / "text")


def test_the_digest_depends_on_how_a_sentence_is_read(teacher):
    text = backbones.load_clip_text(teacher)
    digests = {text.digest()}
    for name, value in (
        ("pooling", "cls" if text.pooling == "terminal" else "terminal"),
        ("causal", not text.causal),
        ("first_position", text.first_position + 1),
    ):
        setattr(text, name, value)
        digests.add(text.digest())
    assert len(digests) == 4


def test_a_siglip_that_projects_to_another_width_is_refused(tmp_path, world):
    new_siglip(tmp_path, sentences(world), projection_size=24)
    with pytest.raises(ModelError, match="text tower projects to 24, the image tower to 16"):
        ClipVE.from_clip(tmp_path)


def test_a_tokenizer_without_rust_is_taken_if_its_file_gives_the_same(tmp_path, world):
    """SigLIP's own class calls sentencepiece; repositories have a `tokenizer.json` beside it."""
    new_siglip(tmp_path, sentences(world))
    (tmp_path / "tokenizer.json").unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(world)), model_prefix=str(tmp_path / "spiece"),
        vocab_size=36, hard_vocab_limit=False, add_dummy_prefix=False, minloglevel=2,
        unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
    )  # fmt: skip
    slow = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    slow.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no fast tokenizer \(tokenizer.json\)"):
        backbones.load_clip_text(tmp_path)

    pieces = [(slow.sp_model.id_to_piece(i), slow.sp_model.get_score(i)) for i in range(len(slow))]
    fast = Tokenizer(models.Unigram(pieces, unk_id=0))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    end = ("</s>", 1)
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"its tokenizer.json gives other tokens than its slow"):
        backbones.load_clip_text(tmp_path)

    punctuation = Regex(f"[{re.escape(string.punctuation)}]")
    no_punctuation = normalizers.Replace(punctuation, "")
    one_space = normalizers.Replace(Regex(r"\s+"), " ")
    fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), no_punctuation, one_space])
    fast.save(str(tmp_path / "tokenizer.json"))
    text = backbones.load_clip_text(tmp_path)
    table = text.tokenize(["The square, is RED!"])
    expected = slow("The square, is RED!", padding="max_length", max_length=MAX_TOKENS)
    assert table.ids.tolist() == expected["input_ids"]
    text.save_pretrained(tmp_path / "saved")
    assert backbones.load_clip_text(tmp_path / "saved").digest() == text.digest()


# --- two encoders of any kinds ---


def _vision(kind, folder, sentences):
    """A small vision encoder of a kind, or an image-text model that has one."""
    if kind in TEACHERS:
        return TEACHERS[kind](folder, sentences)
    new_vit(folder)
    if kind == "vit":
        return folder
    config, model, shape = {
        # For larger pictures than its processor crops, like the published one.
        "dinov2": (Dinov2Config, Dinov2Model, {"image_size": 48, "patch_size": 8,
                   "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}),
        "swin": (SwinConfig, SwinModel, {"image_size": 32, "patch_size": 4, "embed_dim": 8,
                 "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}),
    }[kind]  # fmt: skip
    model(config(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "vision"),
    [*((text, "vit") for text in STUDENTS), *(("mBERT", kind) for kind in VISIONS)],
)
def test_any_two_encoders_make_a_teacher(text, vision, world, tmp_path):
    texts = sentences(world)
    text_folder = STUDENTS[text](tmp_path / "text", texts)
    vision_folder = _vision(vision, tmp_path / "vision", texts)
    torch.manual_seed(1)
    model, encoder, image = backbones.new_dual_encoder(str(text_folder), str(vision_folder), 16)
    for part in (model, encoder.tokenizer, image.processor):
        part.save_pretrained(tmp_path / "clip")
    encoder.verify_packing()
    expected = embeddings(encoder.eval(), TEXTS)
    assert torch.pdist(expected).min() > 1e-3
    pixels = image.preprocess([open_image(world / "images" / "test0.png")])
    model.eval()
    with torch.no_grad():
        seen = image(pixels)
        features = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(seen, features)
    head = "pooled" if vision == "swin" else "patches"
    clip_ve = ClipVE.from_clip(tmp_path / "clip", head=head).eval()
    clip_ve.text.verify_packing()
    torch.testing.assert_close(embeddings(clip_ve.text, TEXTS), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(clip_ve.image(pixels)[:, :16], seen)
    (tmp_path / "clip-ve").mkdir()
    clip_ve.save(tmp_path / "clip-ve")
    again = ClipVE.from_folder(tmp_path / "clip-ve")
    assert again.text.digest() == clip_ve.text.digest()
    assert again.image.digest() == clip_ve.image.digest()
    if vision == "swin":
        with pytest.raises(ModelError, match="no fixed grid of patches; use --head pooled"):
            ClipVE.from_clip(tmp_path / "clip", head="patches")
