import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_backbones import STUDENTS
from tiny_world import CLIP_SHAPE, Notes
from transformers import AutoModel, AutoTokenizer, CLIPModel

from clseave_cli.core.models import backbones
from clseave_cli.core.models.packing import pack
from clseave_cli.core.models.student import new_student
from clseave_cli.core.models.tokens import TokenTable, tokenize
from clseave_cli.errors import DataError, ModelError

SENTENCES = [
    "The square is red.",
    "x",
    "A dog waits outside.",
    "The square is green and blue and white and red and green.",
    "Das Quadrat ist weiß.",
    "red",
    "The square is not red.",
]


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory):
    """An XLM-RoBERTa, whose positions start at padding_idx + 1, with a tokenizer of words."""
    return STUDENTS["XLM-R"](tmp_path_factory.mktemp("xlmr"), SENTENCES)


@pytest.fixture(params=["clip", "bert", "xlmr"])
def sentence_encoder(request, clip, encoder, xlmr):
    torch.manual_seed(0)
    if request.param == "clip":
        return backbones.load_clip_text(clip).eval()
    return new_student(encoder if request.param == "bert" else xlmr, 16).eval()


def _embed(encoder, rows, row_tokens):
    tokens = encoder.tokenize(SENTENCES)
    with torch.no_grad():
        batch = pack(tokens, np.array(rows), row_tokens=row_tokens, pad_id=encoder.pad_id)
        return encoder(batch), batch


def test_packed_padded_and_alone_are_the_same(sentence_encoder):
    rows = list(range(len(SENTENCES)))
    width = sentence_encoder.row_tokens
    packed, batch = _embed(sentence_encoder, rows, width)
    padded, plain = _embed(sentence_encoder, rows, None)
    alone = torch.cat([_embed(sentence_encoder, [row], None)[0] for row in rows])
    assert len(batch.input_ids) < len(plain.input_ids) == len(SENTENCES)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    # The embeddings come in the order asked for, whatever row they were packed into.
    backwards, _ = _embed(sentence_encoder, rows[::-1], width)
    torch.testing.assert_close(backwards.flip(0), packed, rtol=1e-4, atol=1e-5)
    assert packed.std(dim=0).min() > 1e-4
    assert sentence_encoder.verify_packing()


def test_an_encoder_that_cannot_be_packed_is_padded(encoder):
    student = new_student(encoder, 16)
    forward = student.backbone.forward

    def deaf(input_ids, attention_mask, position_ids=None):
        return forward(input_ids=input_ids, position_ids=position_ids)

    student.backbone.forward = deaf
    notes = Notes()
    assert not student.verify_packing("deaf", notes)
    assert student.row_tokens is None
    assert notes.lines == ["deaf: packing is not exact for this encoder; padding instead."]


@pytest.mark.parametrize(("kind", "longest"), [("BERT", 48), ("mDeBERTa", 60)])
def test_what_is_padded_is_computed_in_groups_of_like_length(encoder, tmp_path, kind, longest):
    torch.manual_seed(0)
    folder = encoder if kind == "BERT" else STUDENTS[kind](tmp_path, SENTENCES)
    student = new_student(folder, 16).eval()
    student.packs = False
    lengths = np.random.default_rng(0).integers(3, longest + 1, 128)
    tokens = _words(student, lengths)
    forward, computed, layer = student.backbone.forward, [], 1

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
    # Every state lies where the batch says, and gradients are those of the sentences alone.
    states = student.hidden_states(batch, layer).flatten(0, 1)
    for sentence in (0, 64, 127):
        own = student.hidden_states(singles[sentence], layer)[0]
        place = batch.starts[sentence] + torch.arange(lengths[sentence])
        torch.testing.assert_close(states[place], own, rtol=1e-4, atol=1e-5)
    weight = next(student.backbone.parameters())
    ours, theirs = (torch.autograd.grad(e.square().sum(), weight)[0] for e in (together, alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def _words(student, lengths):
    """Sentences of so many tokens: arbitrary words between the first token and the terminal one."""
    frame = student.tokenize(["x"]).ids
    known = student.tokenize(SENTENCES).ids
    random = np.random.default_rng(1)
    rows = [[frame[0], *random.choice(known, n - 2), frame[-1]] for n in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return TokenTable(np.concatenate(rows).astype(np.int32), offsets, np.zeros(len(rows), bool))


def test_clip_embeddings_are_what_transformers_computes(clip):
    text = backbones.load_clip_text(clip)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model.get_text_features(**inputs).pooler_output
        ours, _ = _embed(text, range(len(SENTENCES)), text.row_tokens)
    assert wanted.shape == (len(SENTENCES), CLIP_SHAPE["embedding_dim"])
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_clip_image_embeddings_are_what_transformers_computes(clip, world):
    from clseave_cli.core.data.images import open_image

    picture = open_image(world / "images" / "test0.png")
    image = backbones.load_clip_image(clip).eval()
    pixels = image.preprocess([picture])
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(clip).eval().get_image_features(pixel_values=pixels)
        torch.testing.assert_close(image(pixels), wanted.pooler_output)


def test_the_student_reads_the_normalised_terminal_token(encoder):
    torch.manual_seed(0)
    student = new_student(encoder, 16).eval()
    torch.nn.init.normal_(student.norm.weight)
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        ours, _ = _embed(student, range(len(SENTENCES)), student.row_tokens)
        for sentence, embedding in zip(SENTENCES, ours, strict=True):
            inputs = tokenizer(sentence, return_tensors="pt")
            assert inputs["input_ids"][0, -1] == tokenizer.sep_token_id
            state = model.eval()(**inputs).last_hidden_state[0, -1]
            state = (state - state.mean()) / torch.sqrt(state.var(unbiased=False) + 1e-5)
            wanted = (state * student.norm.weight + student.norm.bias) @ student.projection.weight.T
            torch.testing.assert_close(embedding, wanted, rtol=1e-4, atol=1e-5)
    assert student.projection.bias is None


def test_the_terminal_token_of_a_legacy_clip_is_found(clip, tmp_path):
    # OpenAI's own checkpoints say eos_token_id 2, and mean the highest id.
    model = CLIPModel.from_pretrained(clip)
    model.config.text_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    text, legacy = backbones.load_clip_text(clip), backbones.load_clip_text(tmp_path)
    assert legacy.terminal_id == text.terminal_id == legacy.tokenizer.eos_token_id
    rows = range(len(SENTENCES))
    assert torch.equal(
        _embed(legacy, rows, legacy.row_tokens)[0], _embed(text, rows, text.row_tokens)[0]
    )
    inputs = legacy.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = CLIPModel.from_pretrained(tmp_path).eval().get_text_features(**inputs)
    torch.testing.assert_close(
        _embed(legacy, rows, None)[0], wanted.pooler_output, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|startoftext|> b <|endoftext|>"])
def test_clip_reads_special_tokens_spelled_out_as_ordinary_text(clip, text):
    text_tower = backbones.load_clip_text(clip)
    _assert_ordinary_text(text_tower, text, {"<|startoftext|>", "<|endoftext|>"})


@pytest.mark.parametrize("text", ["[SEP]", "x [SEP] y [CLS] z [PAD]"])
def test_bert_reads_special_tokens_spelled_out_as_ordinary_text(encoder, text):
    _assert_ordinary_text(new_student(encoder, 16), text, {"[SEP]", "[CLS]", "[PAD]"})


def _assert_ordinary_text(encoder, text, special):
    ids = encoder.tokenize([text]).ids.tolist()
    assert ids[-1] == encoder.terminal_id and len(ids) > 2
    pieces = encoder.tokenizer.convert_ids_to_tokens(ids[1:-1])
    assert not special & set(pieces)
    # As a tokenizer does when it is not told otherwise: the danger is real.
    encoder.tokenizer.backend_tokenizer.encode_special_tokens = False
    plain = encoder.tokenizer.backend_tokenizer.encode(text).ids
    assert special & set(encoder.tokenizer.convert_ids_to_tokens(plain[1:-1]))


def test_a_long_text_is_cut_before_its_terminal_token(sentence_encoder):
    long, limit = "red " * 10_000, sentence_encoder.max_tokens
    tokens = sentence_encoder.tokenize(["red", long, long])
    assert tokens.num_truncated == 2
    assert tokens.lengths(np.arange(3)).tolist() == [3, limit, limit]
    assert tokens.ids[tokens.offsets[1:] - 1].tolist() == [sentence_encoder.terminal_id] * 3
    with torch.no_grad():
        embeddings = torch.cat(list(sentence_encoder.embed(tokens)))
    assert embeddings.isfinite().all() and torch.equal(embeddings[1], embeddings[2])


def test_a_text_at_the_limit_is_not_cut(sentence_encoder):
    fits = " ".join(["red"] * (sentence_encoder.max_tokens - 2))
    assert sentence_encoder.tokenize([fits]).num_truncated == 0
    assert sentence_encoder.tokenize([fits + " red"]).num_truncated == 1


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
def test_every_token_is_laid_out_once(lengths, width, data):
    chosen = np.array(data.draw(st.permutations(range(len(lengths)))), dtype=np.intp)
    batch = pack(_table(lengths), chosen, row_tokens=width, pad_id=0)
    rows, row_width = batch.input_ids.shape
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
    for row in range(rows):
        pairs = {
            (int(s), int(i))
            for s, i in zip(batch.segments[row], batch.input_ids[row], strict=True)
            if s >= 0
        }
        assert len(pairs) == len({s for s, _ in pairs}) == len({i for _, i in pairs})


@pytest.mark.parametrize(
    ("lengths", "call_tokens", "wanted"),
    [
        ([9, 3, 3, 4], 0, ((1, 9), (1, 4), (2, 3))),
        ([9, 3, 3, 4], 14, ((1, 9), (3, 4))),  # a cut after 9 saves 15, the other one 2
        ([9, 3, 3, 4], 15, ()),
        ([5, 5], 0, ()),
    ],
)
def test_groups_by_hand(lengths, call_tokens, wanted):
    rows = np.arange(len(lengths))
    batch = pack(_table(lengths), rows, row_tokens=None, pad_id=0, call_tokens=call_tokens)
    assert batch.groups == wanted
    for part, (num_rows, width) in zip(batch.parts(), wanted, strict=True):
        assert part.input_ids.shape == part.segments.shape == (num_rows, width)
        assert int((part.segments >= 0).sum(1).max()) == width


def test_the_attention_mask_by_hand():
    batch = pack(_table([2, 1]), np.array([0, 1]), row_tokens=4, pad_id=0)
    o, x = False, True
    assert batch.attention_mask(causal=False)[0, 0].tolist() == [
        [x, x, o, o],
        [x, x, o, o],
        [o, o, x, o],
        [o, o, o, x],
    ]
    assert batch.attention_mask(causal=True)[0, 0].tolist() == [
        [x, o, o, o],
        [x, x, o, o],
        [o, o, x, o],
        [o, o, o, x],
    ]


def test_an_encoder_with_neither_sep_nor_eos_is_refused(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.sep_token = None
    with pytest.raises(ModelError, match=r"neither a \[SEP\] nor an end-of-sentence token"):
        backbones.terminal_id(tokenizer)


def test_the_real_clip_vocabulary(assets):
    from transformers import CLIPTokenizer

    folder = assets / "tokenizers" / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    sentences = ["a photo of a cat", "Hello, World!"]
    table = tokenize(tokenizer.backend_tokenizer, sentences, max_tokens=77, terminal_id=49407)
    # The ids that openai/CLIP's own clip.tokenize gives.
    assert table.ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert table.ids[7:].tolist() == [49406, 3306, 267, 1002, 256, 49407]


def test_the_real_mbert_vocabulary(assets):
    from transformers import BertTokenizer

    vocabulary = assets / "tokenizers" / "mbert-cased" / "vocab.txt"
    tokenizer = BertTokenizer(str(vocabulary), do_lower_case=False, strip_accents=False)
    sentences = ["Paris is the capital of France.", "犬が"]
    table = tokenize(tokenizer.backend_tokenizer, sentences, max_tokens=512, terminal_id=102)
    known = ["[CLS]", "Paris", "is", "the", "capital", "of", "France", ".", "[SEP]"]
    lines = vocabulary.read_text(encoding="utf-8").split("\n")
    assert table.ids[:9].tolist() == [lines.index(piece) for piece in known]
    assert [lines[i] for i in table.ids[9:]] == ["[CLS]", "犬", "が", "[SEP]"]
