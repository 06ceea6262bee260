import torch
from tiny_world import CLIP_SHAPE, ENCODER_SHAPE, sentences, tree
from transformers import AutoTokenizer, CLIPModel

from clseave_cli.core.models import backbones
from clseave_cli.core.models.scratch import ClipShape, new_clip, new_encoder

UNSEEN = "Zebra ÿ 犬が 🦓 qux!"


def test_texts_and_seed_alone_determine_the_bytes(world, tmp_path):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        new_clip(tmp_path / name / "clip", sentences(world), ClipShape(**CLIP_SHAPE), seed)
        new_encoder(tmp_path / name / "encoder", sentences(world), **ENCODER_SHAPE)
    first, again, other = (tree(tmp_path / name) for name in "abc")
    assert first == again
    assert first["clip/model.safetensors"] != other["clip/model.safetensors"]
    assert first["clip/tokenizer.json"] == other["clip/tokenizer.json"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_new_clip_reads_any_text_and_ends_in_its_highest_id(clip):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    ids = tokenizer(UNSEEN)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == max(tokenizer.get_vocab().values())
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == UNSEEN.lower().replace(" ", "")
    config = CLIPModel.from_pretrained(clip).config
    assert config.text_config.eos_token_id == tokenizer.eos_token_id
    assert config.text_config.vocab_size == len(tokenizer)


def test_a_new_encoder_knows_its_words_and_keeps_case_and_accents(encoder):
    model, tokenizer = backbones.load_encoder(encoder)
    assert tokenizer.tokenize("Das Quadrat ist weiß.") == ["Das", "Quadrat", "ist", "weiß", "."]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]) == [0, 1, 2, 3]
    assert tokenizer.unk_token_id in tokenizer(UNSEEN)["input_ids"]
    assert model.config.vocab_size == len(tokenizer) == len(set(tokenizer.get_vocab().values()))
