"""The caches of image features and teacher embeddings: a hit is a miss, bit for bit."""

import json
import multiprocessing
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from tiny_world import Notes, edit_row, flip_byte, warm_processes

from clseave_cli.core import features
from clseave_cli.core.data.images import ImageFolder, open_image
from clseave_cli.core.data.records import distinct, read_split
from clseave_cli.core.features import (
    Photos,
    VectorCache,
    _decoded,
    image_features,
    packed_keys,
    sentence_embeddings,
    tokenize_sentences,
)
from clseave_cli.core.files import cache_root, file_digest
from clseave_cli.core.models import backbones
from clseave_cli.core.training.device import autocast
from clseave_cli.errors import ClseaveError, DataError
from clseave_cli.processes import ahead

SENTENCES = ["red", "The square is blue.", "red", "A dog waits outside."]
FP32 = autocast("fp32", torch.device("cpu"))


@pytest.fixture
def text(clip):
    return backbones.load_clip_text(clip).eval()


@pytest.fixture
def image(clip):
    return backbones.load_clip_image(clip).eval()


def _keys(numbers):
    return packed_keys(number.to_bytes(16, "little") for number in numbers)


def _all(vectors):
    return vectors.rows(np.arange(len(vectors)))


def _compute(items):
    """One by one, each item's number and its negative."""
    for item in items:
        yield torch.tensor([[float(item), -float(item)]])


class _Counter:
    """Counts the sentences or images that an encoder computes."""

    def __init__(self, encoder, monkeypatch):
        self.count = 0
        forward = type(encoder).forward

        def counting(module, batch):
            result = forward(module, batch)
            self.count += len(result)
            return result

        monkeypatch.setattr(type(encoder), "forward", counting)

    def take(self):
        count, self.count = self.count, 0
        return count


def _embed(encoder, sentences=SENTENCES):
    texts, index = distinct(sentences)
    return sentence_embeddings(encoder, texts, autocast=FP32, description="x").rows(index)


def _features(encoder, folder):
    split = read_split(folder, "train")
    photos = Photos.of(split, ImageFolder.of(folder, None))
    return image_features(encoder, split, photos, autocast=FP32).of_rows()


def test_a_hit_is_a_miss_bit_for_bit(text, monkeypatch):
    counter = _Counter(text, monkeypatch)
    miss = _embed(text)
    assert counter.take() == 3  # distinct sentences
    assert torch.equal(_embed(text), miss)
    assert counter.take() == 0
    assert torch.equal(miss[0], miss[2]) and not torch.equal(miss[0], miss[1])
    # Other rows, another order, one new: only that is computed.
    more = _embed(text, ["A dog waits outside.", "new", "red"])
    assert counter.take() == 1
    assert torch.equal(more[0], miss[3]) and torch.equal(more[2], miss[0])


def test_images_are_computed_once_and_by_content(image, data, monkeypatch):
    counter = _Counter(image, monkeypatch)
    miss = _features(image, data)
    assert counter.take() == 8  # 24 rows
    assert torch.equal(_features(image, data), miss)
    assert counter.take() == 0
    split = read_split(data, "train")
    for row in (0, 7, 23):
        name = split.image_names[split.image_index[row]]
        with torch.no_grad():
            expected = image(image.preprocess([open_image(data / "images" / name)]))[0]
        torch.testing.assert_close(miss[row], expected, rtol=1e-4, atol=1e-5)
    counter.take()

    # A picture that changed under its name is noticed; one that only moved is known.
    shutil.copy(data / "images" / "test2.png", data / "images" / "train0.png")
    changed = _features(image, data)
    assert counter.take() == 1
    assert not torch.equal(changed[0], miss[0]) and torch.equal(changed[3:], miss[3:])
    (data / "images").rename(data / "Images")
    assert torch.equal(_features(image, data), changed)
    assert counter.take() == 0


@pytest.mark.parametrize(("cores", "num_ahead"), [(1, 4), (16, 16), (200, 32)])
def test_every_core_has_images_to_decode(image, data, monkeypatch, cores, num_ahead):
    started = []

    def recorded(decoders, function, items, num_ahead):
        started.append((decoders._max_workers, num_ahead))
        return ahead(decoders, function, items, num_ahead)

    monkeypatch.setattr(features, "usable_cores", lambda: cores)
    monkeypatch.setattr(features, "ahead", recorded)
    _features(image, data)
    assert started == [(min(cores, num_ahead), num_ahead)]


@pytest.fixture
def for_gpu(data, monkeypatch):
    """A function that decodes the 8 photos' files as for a GPU: in processes, two at a time."""
    monkeypatch.setattr(features, "_GROUPS_A_PROCESS", 1)
    monkeypatch.setattr(features, "usable_cores", lambda: 2)
    monkeypatch.setattr(features, "_shared_bytes", lambda: 2**30)
    monkeypatch.setattr(features, "page_locked", lambda part, device: part)
    paths = sorted((data / "images").glob("train*.png"))

    def decode(work=lambda path: np.array(open_image(path)), device="cuda"):
        def pixels(items):
            return torch.stack([torch.from_numpy(work(paths[item])) for item in items])

        groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
        return list(_decoded(pixels, groups, torch.device(device)))

    decode.paths = paths
    return decode


def test_processes_decode_for_a_gpu_as_threads_do(for_gpu):
    before = torch.get_rng_state()
    of_processes, of_threads = for_gpu(), for_gpu(device="cpu")
    assert len(of_processes) == 4 and all(map(torch.equal, of_processes, of_threads))
    assert torch.equal(torch.get_rng_state(), before)
    # Another group than the terminal's, whose Ctrl-C is for this process alone.
    groups = torch.cat(for_gpu(lambda path: np.array([os.getpgid(0)]))).flatten().tolist()
    assert groups[0] == os.getpgid(0) not in groups[2:]


@pytest.mark.parametrize("way", ["processes", "daemon", "little shared memory"])
def test_a_damaged_photo_is_refused_in_the_same_words(for_gpu, monkeypatch, way):
    if way != "processes":
        monkeypatch.setattr(features, "_by_processes", pytest.fail)
    if way == "daemon":
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    if way == "little shared memory":
        monkeypatch.setattr(features, "_shared_bytes", lambda: 0)
    path = for_gpu.paths[4]
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: damaged or not an image.$"):
        for_gpu()


def test_a_killed_decoder_is_one_line(for_gpu):
    def work(path):
        if path == for_gpu.paths[4]:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(1)

    with pytest.raises(ClseaveError, match="a process that decodes photos was killed"):
        for_gpu(work)


def _shards():
    return sorted(cache_root().rglob("*.safetensors"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip_byte(path, 0.9),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * 1000),
    ],
    ids=["flipped", "cut", "emptied", "rubbish"],
)
def test_a_damaged_shard_is_computed_again(text, monkeypatch, damage):
    """G10."""
    counter = _Counter(text, monkeypatch)
    sound = _embed(text)
    _embed(text, ["a second shard"])
    counter.take()
    first, second = _shards()
    damage(first)
    damage(second)
    assert torch.equal(_embed(text), sound)
    assert counter.take() == 3 and len(_shards()) == 1
    assert torch.equal(_embed(text), sound)
    assert counter.take() == 0


def test_a_shard_of_another_width_is_computed_again(tmp_path):
    def vectors(width):
        def ones(items):
            yield torch.ones(len(items), width)

        return _all(VectorCache(tmp_path, width).get(_keys(range(2)), ones, "x"))

    vectors(3)
    (wide,) = tmp_path.iterdir()
    assert torch.equal(vectors(2), torch.ones(2, 2))
    assert not wide.exists() and len(list(tmp_path.iterdir())) == 1


def test_encoders_of_other_weights_do_not_meet(text, clip, monkeypatch):
    counter = _Counter(text, monkeypatch)
    before = _embed(text)
    with torch.no_grad():
        text.projection.weight[0, 0] += 1e-3
    counter.take()
    assert not torch.equal(_embed(text), before)
    assert counter.take() == 3
    assert torch.equal(_embed(backbones.load_clip_text(clip).eval()), before)
    assert counter.take() == 0


@pytest.mark.parametrize("load", [backbones.load_clip_text, backbones.load_clip_image])
def test_tokenizer_preprocessing_and_configuration_are_part_of_an_encoder(clip, tmp_path, load):
    encoder = load(clip)
    encoder.save_pretrained(tmp_path)
    assert load(tmp_path).digest() == encoder.digest()
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["hidden_act"] == "quick_gelu"
    path.write_text(json.dumps(config | {"hidden_act": "gelu"}))  # an activation is in no weight
    before = load(clip).digest()
    assert load(tmp_path).digest() != before
    if load is backbones.load_clip_text:
        encoder.tokenizer.backend_tokenizer.add_tokens(["square"])
    else:
        encoder.processor.image_mean = [0.0, 0.0, 0.0]
    assert encoder.digest() != before


def test_vectors_come_in_the_order_of_the_keys(tmp_path):
    cache = VectorCache(tmp_path, 2)
    keys = _keys(range(10))
    first = _all(cache.get(keys[5:], _compute, "x"))
    assert first[:, 0].tolist() == [0, 1, 2, 3, 4]
    # Items 5 to 9 are there under their keys; the others are computed by their places.
    order = [7, 2, 9, 0]
    mixed = cache.get(keys[order], _compute, "x")
    assert _all(mixed)[:, 0].tolist() == [2, 1, 4, 3]
    assert mixed.rows(np.array([3, 0, 0])).tolist() == [[3, -3], [2, -2], [2, -2]]


def test_a_disk_that_keeps_nothing_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(VectorCache, "_write", lambda self, keys, vectors: None)
    with pytest.raises(ClseaveError, match="cannot be read back"):
        VectorCache(tmp_path, 2).get(_keys(range(3)), _compute, "x")


def test_vectors_lie_in_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("clseave_cli.core.features._SHARD_BYTES", 4 * 2 * 4)
    vectors = VectorCache(tmp_path, 2).get(_keys(range(10)), _compute, "x")
    assert len(list(tmp_path.iterdir())) == 3
    assert _all(vectors)[:, 0].tolist() == list(range(10))
    assert vectors.rows(np.array([9, 0, 5])).tolist() == [[9, -9], [0, 0], [5, -5]]


@pytest.mark.parametrize("num_computed", [0, 2])
@pytest.mark.parametrize("reason", [DataError("the third is damaged"), KeyboardInterrupt()])
def test_what_was_computed_before_an_interruption_is_kept(tmp_path, reason, num_computed):
    cache = VectorCache(tmp_path / "new", 2)

    def fail(items):
        yield from _compute(items[:num_computed])
        raise reason

    with pytest.raises(type(reason)):
        cache.get(_keys(range(3)), fail, "x")
    # Nothing but the one shard, whole: no half-written file beside it.
    shards = list((tmp_path / "new").glob("*"))
    assert [file_digest(shard, 16) for shard in shards] == [shard.stem for shard in shards]
    assert len(shards) == (num_computed > 0)
    asked = []

    def rest(items):
        asked.extend(items)
        yield from _compute(items)

    vectors = cache.get(_keys(range(3)), rest, "x")
    assert asked == [0, 1, 2][num_computed:]
    assert _all(vectors).tolist() == [[0, 0], [1, -1], [2, -2]]


def test_what_is_computed_is_written_from_time_to_time(tmp_path, monkeypatch):
    now = iter(range(0, 1000, 25))
    monkeypatch.setattr("clseave_cli.core.features.time.monotonic", lambda: float(next(now)))
    written = []

    def compute(items):
        for vector in _compute(items):
            yield vector
            written.append(len(list(tmp_path.iterdir())))

    vectors = VectorCache(tmp_path, 2).get(_keys(range(6)), compute, "x")
    assert written == [0, 0, 1, 1, 1, 2]  # a minute is over after three
    assert _all(vectors)[:, 0].tolist() == list(range(6))


def _fill(folder, start, barrier):
    cache = VectorCache(folder, 4)
    keys = _keys(range(start, start + 300))

    def compute(items):
        barrier.wait(30)
        for item in items:
            yield torch.full((1, 4), float(start + item))

    vectors = _all(cache.get(keys, compute, "x"))
    os._exit(0 if vectors[:, 0].tolist() == list(range(start, start + 300)) else 3)


def test_two_processes_fill_one_cache(tmp_path):
    context = warm_processes()
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=_fill, args=(tmp_path / "shared", start, barrier))
        for start in (0, 150)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    vectors = _all(VectorCache(tmp_path / "shared", 4).get(_keys(range(450)), pytest.fail, "x"))
    assert np.array_equal(vectors[:, 3].numpy(), np.arange(450))


def test_a_photo_replaced_while_it_is_read_is_not_kept(image, data, cache):
    split = read_split(data, "train")
    photos = Photos.of(split, ImageFolder.of(data, None))
    first = data / "images" / "train0.png"
    sound = first.read_bytes()
    shutil.copy(data / "images" / "test2.png", first)
    with pytest.raises(DataError, match=r"train.jsonl:1: .*train0.png: replaced while it was bein"):
        image_features(image, split, photos, autocast=FP32)
    assert not list(cache.rglob("*.safetensors"))
    first.write_bytes(sound)
    again = image_features(image, split, photos, autocast=FP32).of_rows()
    assert torch.equal(again, _features(image, data))

    edit_row(data / "snli_ve_train.jsonl", 6, Flickr30K_ID="../../etc/passwd")
    with pytest.raises(DataError, match=r"train.jsonl:6: image '../../etc/passwd' is not in"):
        _features(image, data)


def test_sentences_that_are_too_long_are_counted_and_one_is_named(text):
    notes = Notes()
    # Of most characters and of most tokens are not the same: the first row is one word.
    rows = [" " * 9000 + "red", "red " * 500, "blue", "red " * 500, "blue " * 100]
    sentences = tokenize_sentences(text, rows, lambda row: f"f.jsonl:{row + 1}", notes)
    assert sentences.index.tolist() == [0, 1, 2, 1, 3]
    assert sentences.tokens.num_truncated == 2
    assert notes.lines == [
        "f.jsonl:2: one of 2 distinct sentences that are too long for the encoder; "
        "truncated to 32 tokens with the terminal token."
    ]


def test_the_cache_lies_where_the_environment_says(cache, monkeypatch):
    assert cache_root() == cache
    monkeypatch.setenv("CLSEAVE_CACHE", "")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(cache_root()) == "/somewhere/.cache/clseave"


def test_a_shard_is_read_through_once_for_all_languages(text, monkeypatch):
    digested, digest = [], features.file_digest
    monkeypatch.setattr(
        features, "file_digest", lambda path, size: digested.append(path) or digest(path, size)
    )
    for _ in range(3):
        sentence_embeddings(text, SENTENCES[1:], autocast=FP32, description="")
    assert len(digested) == 1
