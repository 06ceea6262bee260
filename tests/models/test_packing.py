import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_backbones import STUDENTS, embeddings
from tiny_world import Notes
from transformers import AutoTokenizer, BertTokenizer, CLIPModel, CLIPTokenizer

from clseave_cli.core.data.images import Preparation
from clseave_cli.core.models import backbones
from clseave_cli.core.models.encoders import SentenceEncoder
from clseave_cli.core.models.packing import pack
from clseave_cli.core.models.student import new_student
from clseave_cli.core.models.tokens import TokenTable, tokenize
from clseave_cli.errors import DataError

SENTENCES = [
    "The square is red.",
    "x",
    "A dog waits outside.",
    "The square is green and blue and white and red and green.",
    "Das Quadrat ist weiß.",
    "red",
    "The square is not red.",
]


def test_an_encoder_that_cannot_be_packed_is_padded(encoder):
    student = new_student(encoder, 16)
    forward = student.backbone.forward
    student.backbone.forward = lambda attention_mask, **inputs: forward(**inputs)
    notes = Notes()
    assert not student.verify_packing("deaf", notes)
    assert student.row_tokens is None
    assert notes.lines == ["deaf: packing is not exact for this encoder; padding instead."]


@pytest.mark.parametrize(("kind", "longest"), [("BERT", 48), ("mDeBERTa", 60)])
def test_unpacked_rows_are_computed_in_groups_of_similar_length(encoder, tmp_path, kind, longest):
    torch.manual_seed(0)
    folder = encoder if kind == "BERT" else STUDENTS[kind](tmp_path, SENTENCES)
    student = new_student(folder, 16).eval()
    student.packs = False
    lengths = np.random.default_rng(0).integers(3, longest + 1, 128)
    tokens = _words(student, lengths)
    forward, computed = student.backbone.forward, []

    def counted(input_ids, **more):
        computed.append(input_ids.numel())
        return forward(input_ids=input_ids, **more)

    student.backbone.forward = counted
    rows = np.arange(len(lengths))
    batch = student.pack(tokens, rows)
    together = student(batch)
    num_computed = sum(computed)
    assert lengths.sum() < num_computed < 1.1 * lengths.sum() < batch.input_ids.numel() / 1.5
    assert torch.equal(torch.cat(list(student.embed(tokens))), together)

    singles = [student.pack(tokens, rows[i : i + 1]) for i in rows]
    alone = torch.cat([student(single) for single in singles])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    # Every state is where the batch says, and gradients equal those of the sentences alone.
    states = student.hidden_states(batch, layer=1).flatten(0, 1)
    for sentence in (0, 64, 127):
        single = student.hidden_states(singles[sentence], layer=1)[0]
        place = batch.starts[sentence] + torch.arange(lengths[sentence])
        torch.testing.assert_close(states[place], single, rtol=1e-4, atol=1e-5)
    weight = next(student.backbone.parameters())
    packed, separate = (torch.autograd.grad(e.square().sum(), weight)[0] for e in (together, alone))
    torch.testing.assert_close(packed, separate, rtol=1e-3, atol=1e-4)


def _words(student, lengths):
    """Sentences of these lengths: random words between the first token and the terminal one."""
    frame = student.tokenize(["x"]).ids
    words = student.tokenize(SENTENCES).ids
    random = np.random.default_rng(1)
    rows = [[frame[0], *random.choice(words, n - 2), frame[-1]] for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenTable(np.concatenate(rows).astype(np.int32), offsets, np.zeros(len(rows), bool))


def test_the_terminal_token_of_a_legacy_clip_is_its_last(clip, tmp_path):
    # OpenAI's checkpoints say eos_token_id 2, and mean the highest id.
    model = CLIPModel.from_pretrained(clip)
    model.config.text_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    text, legacy = backbones.load_clip_text(clip).eval(), backbones.load_clip_text(tmp_path).eval()
    assert legacy.terminal_id == text.terminal_id == legacy.tokenizer.eos_token_id
    actual, expected = (embeddings(reader, SENTENCES) for reader in (legacy, text))
    assert torch.equal(actual, expected)
    inputs = legacy.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(tmp_path).eval().get_text_features(**inputs)
    torch.testing.assert_close(actual, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_special_tokens_spelled_out_are_ordinary_text(sentence_encoder):
    tokenizer = sentence_encoder.tokenizer
    special = {"<|startoftext|>", "<|endoftext|>", "[SEP]", "[CLS]", "[PAD]"} & {*tokenizer.vocab}
    texts = [*special, " x ".join(["a", *special])]
    for text in texts:
        ids = sentence_encoder.tokenize([text]).ids.tolist()
        assert ids[-1] == sentence_encoder.terminal_id and len(ids) > 2
        assert not special & set(tokenizer.convert_ids_to_tokens(ids[1:-1]))
    # Without this setting a tokenizer reads them as special: the danger is real.
    tokenizer.backend_tokenizer.encode_special_tokens = False
    for text in texts:
        assert special & set(tokenizer.backend_tokenizer.encode(text).tokens[1:-1])


def test_a_long_text_is_cut_before_its_terminal_token(sentence_encoder):
    limit = sentence_encoder.max_tokens
    fits = " ".join(["red"] * (limit - 2))
    tokens = sentence_encoder.tokenize(["red", fits, fits + " red", "red " * 10_000])
    assert tokens.truncated.tolist() == [False, False, True, True]
    assert tokens.lengths(np.arange(4)).tolist() == [3, limit, limit, limit]
    assert tokens.ids[tokens.offsets[1:] - 1].tolist() == [sentence_encoder.terminal_id] * 4
    with torch.no_grad():
        _, *cut = torch.cat(list(sentence_encoder.embed(tokens)))
    assert cut[0].isfinite().all()
    assert torch.equal(cut[0], cut[1]) and torch.equal(cut[0], cut[2])


def test_a_tokenizer_without_terminal_token_is_refused(clip):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    with pytest.raises(DataError, match=r"does not end 'a red square' in its terminal token"):
        tokenize(tokenizer.backend_tokenizer, ["a red square"], max_tokens=10, terminal_id=0)


def _table(lengths):
    """Sentence i is i + 1, again and again: a token says where it belongs."""
    ids = np.repeat(np.arange(len(lengths)) + 1, lengths).astype(np.int32)
    return TokenTable(ids, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(len(lengths), bool))


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    width=st.sampled_from([None, 4, 12, 20]),
    data=st.data(),
)
def test_every_token_is_packed_once(lengths, width, data):
    chosen = np.array(data.draw(st.permutations(range(len(lengths)))), dtype=np.intp)
    batch = pack(_table(lengths), chosen, row_tokens=width, pad_id=0)
    row_width = batch.input_ids.shape[1]
    assert row_width == (max(lengths) if width is None else max(width, max(lengths)))
    used = batch.segments >= 0
    assert int(used.sum()) == sum(lengths)
    assert torch.equal(batch.input_ids > 0, used)
    flat = batch.input_ids.flatten()
    for sentence, end in zip(chosen, batch.terminals.tolist(), strict=True):
        length = lengths[sentence]
        here = slice(end - length + 1, end + 1)
        assert flat[here].tolist() == [sentence + 1] * length
        assert batch.positions.flatten()[here].tolist() == list(range(length))
        assert end // row_width == (end - length + 1) // row_width
    # Within a row a segment is one sentence.
    for row in torch.stack([batch.segments, batch.input_ids], dim=2):
        pairs = row[row[:, 0] >= 0].unique(dim=0)
        assert len(pairs) == len(pairs[:, 0].unique()) == len(pairs[:, 1].unique())


@pytest.mark.parametrize(
    ("lengths", "call_tokens", "expected"),
    [
        ([9, 3, 3, 4], 0, ((1, 9), (1, 4), (2, 3))),
        ([9, 3, 3, 4], 14, ((1, 9), (3, 4))),  # a cut after 9 saves 15, the other one 2
        ([9, 3, 3, 4], 15, ()),
        ([5, 5], 0, ()),
    ],
)
def test_groups_by_hand(lengths, call_tokens, expected):
    rows = np.arange(len(lengths))
    batch = pack(_table(lengths), rows, row_tokens=None, pad_id=0, call_tokens=call_tokens)
    assert batch.groups == expected
    for part, (num_rows, width) in zip(batch.parts(), expected, strict=True):
        assert part.input_ids.shape == part.segments.shape == (num_rows, width)
        assert int((part.segments >= 0).sum(1).max()) == width


@pytest.mark.parametrize("causal", [False, True])
def test_the_attention_mask_by_hand(causal):
    batch = pack(_table([2, 1]), np.array([0, 1]), row_tokens=4, pad_id=0)
    mask = batch.attention_mask(causal=causal)[0, 0]
    first = [1, 0, 0, 0] if causal else [1, 1, 0, 0]
    assert mask.tolist() == [first, [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert mask.dtype == torch.bool


def test_the_real_clip_vocabulary(assets):
    tokenizer = CLIPTokenizer.from_pretrained(assets / "tokenizers" / "clip")
    sentences = ["a photo of a cat", "Hello, World!"]
    table = tokenize(tokenizer.backend_tokenizer, sentences, max_tokens=77, terminal_id=49407)
    # The ids that openai/CLIP's own clip.tokenize gives.
    assert table.ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert table.ids[7:].tolist() == [49406, 3306, 267, 1002, 256, 49407]


def test_the_real_mbert_vocabulary(assets):
    vocabulary = assets / "tokenizers" / "mbert-cased" / "vocab.txt"
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=False, strip_accents=False)
    sentences = ["Paris is the capital of France.", "犬が"]
    table = tokenize(tokenizer.backend_tokenizer, sentences, max_tokens=512, terminal_id=102)
    pieces = ["[CLS]", "Paris", "is", "the", "capital", "of", "France", ".", "[SEP]"]
    lines = vocabulary.read_text(encoding="utf-8").split("\n")
    assert table.ids[:9].tolist() == [lines.index(piece) for piece in pieces]
    assert [lines[i] for i in table.ids[9:]] == ["[CLS]", "犬", "が", "[SEP]"]


# --- bucketed shapes, for captured steps; on a CPU here ---


@pytest.mark.parametrize("pooling", ["terminal", "cls", "mean"])
def test_bucketed_batches_have_few_shapes_and_exact_results(encoder, monkeypatch, pooling):
    student = new_student(encoder, 16, pooling).eval()
    random = np.random.default_rng(0)
    sentences = [" ".join(["red", "circle"] * n) for n in random.integers(1, 9, size=400)]
    tokens = student.tokenize(sentences)
    shapes = {False: set(), True: set()}
    for _ in range(40):
        rows = random.choice(len(sentences), size=48, replace=False)
        embeddings = {}
        for filled in (False, True):
            monkeypatch.setattr(SentenceEncoder, "buckets_shapes", filled)
            batch = student.pack(tokens, rows, places=50)
            shapes[filled].add((tuple(batch.input_ids.shape), len(batch.terminals)))
            with torch.no_grad():
                embeddings[filled] = student(batch)
        assert embeddings[True].shape == (50, 16) and torch.isfinite(embeddings[True]).all()
        torch.testing.assert_close(embeddings[True][:48], embeddings[False], atol=1e-5, rtol=1e-4)
    assert len(shapes[True]) < len(shapes[False]) and len(shapes[True]) <= 8
    student(batch)[:48].square().sum().backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("size", [(500, 375), (40, 60), (32, 32)])
def test_uint8_pixels_have_the_same_features(clip, monkeypatch, size):
    """Pixels normalised on the GPU differ by rounding only."""
    tower = backbones.load_clip_image(clip).eval()
    random = np.random.default_rng(1)
    picture = Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size)
    pixels = tower.preprocess([picture])
    cut = torch.from_numpy(np.stack([Preparation.of(tower.processor).cut(picture)]))
    assert cut.dtype == torch.uint8 and pixels.dtype == torch.float32
    with torch.no_grad():
        features = tower(pixels), tower(cut)
    torch.testing.assert_close(features[1], features[0], atol=1e-5, rtol=1e-5)
    assert torch.cosine_similarity(*features).item() > 1 - 1e-5
