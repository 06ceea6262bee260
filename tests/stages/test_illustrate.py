"""illustrate: prompts, the memory in the pictures, interruption, refusals, both engines."""

import shutil
from random import Random

import pytest
from PIL import Image
from tiny_world import interrupted_at, read_jsonl, tree, write_captions, write_jsonl

from clseave_cli.core.config import IllustrateConfig
from clseave_cli.core.data.images import ImageFolder, picture_name
from clseave_cli.core.data.mini_ve import Sizes, generate
from clseave_cli.core.data.mini_ve.generation import guided, scenes_of
from clseave_cli.core.guided import illustration
from clseave_cli.core.guided.illustration import Engine, illustrate
from clseave_cli.errors import DataError, UsageError
from clseave_cli.labels import LABELS

SIZES = Sizes(200, 60, 60, 5, 3, 3)


@pytest.fixture(scope="module")
def mini_ve(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("mini-ve") / "data", sizes=SIZES).folder


@pytest.fixture
def engine(monkeypatch):
    """An engine that paints a colour for each seed, and notes what it was asked for."""

    class Painter:
        def __init__(self):
            self.asked, self.withheld = [], ()

        def draw(self, request):
            self.asked.append(request)
            colour = request.seed % 256, request.seed // 256 % 256, 0
            return None if request.key in self.withheld else Image.new("RGB", (4, 4), colour)

    painter = Painter()
    engine = Engine({"engine": "painter"}, painter.draw)
    monkeypatch.setattr(illustration, "_diffusers", lambda config: engine)
    return painter


def _prompts(engine):
    return {each.key: each.prompt for each in engine.asked}


def test_captions_of_an_image_make_one_prompt_and_rows_one_each(world, tmp_path, engine):
    captions = write_captions(world, tmp_path / "captions")
    first, *_ = illustrate(IllustrateConfig(data=captions)).folder.iterdir()
    assert first.parent == captions / "guided-image"
    prompt = "The square is red. The square is green. A dog waits outside."
    assert _prompts(engine)["train0"] == prompt
    assert len(_prompts(engine)) == 8 and (captions / "guided-image" / "train0.png").is_file()
    engine.asked.clear()
    out, template = tmp_path / "out", "{gold_label}: {sentence2} / {Flickr30K_ID}"
    shared = {"data": world, "guided_by": "pairID", "out": out}
    illustrate(IllustrateConfig(**shared, template=template))
    assert _prompts(engine)["train0.png#n"] == "neutral: A dog waits outside. / train0.png"
    assert len(list(out.iterdir())) == 24 and (out / "train0.png#n.png").is_file()
    assert len({each.seed for each in engine.asked}) == 24


def test_what_is_done_is_remembered_and_a_stopped_run_ends_in_the_same_bytes(
    world, tmp_path, engine
):
    """G8."""

    def run(name, **options):
        return illustrate(
            IllustrateConfig(data=world, guided_by="pairID", out=tmp_path / name, **options)
        )

    whole = run("whole")
    assert (whole.drawn, whole.kept) == (24, 0)
    with interrupted_at(illustration, "write_png", 8):
        run("stopped")
    rest = run("stopped")
    assert (rest.drawn, rest.kept) == (17, 7)
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")
    engine.asked.clear()
    assert run("whole").kept == 24 and not engine.asked
    with pytest.raises(UsageError, match=r"was not drawn by illustrate from this text with these"):
        run("whole", seed=1)
    engine.withheld = {"train0.png#n"}
    again = run("others", seed=2)
    assert (again.drawn, again.withheld) == (23, 1)


def test_files_of_others_are_never_replaced(data, engine, refused):
    command = ("illustrate", "--data", data, "--input", data / "snli_ve_train.jsonl")
    before = tree(data)
    message = refused(*command, "--template", "{sentence2}", "--out", data / "images", code=2)
    assert "was not drawn by illustrate from this text with these options" in message
    assert tree(data) == before


def test_bad_rows_and_prompts_are_refused_in_one_line(data, tmp_path, engine):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"pairID": "a", "sentence1": "A dog."}, {"x": 1}])

    def run(**options):
        return illustrate(IllustrateConfig(data=data, out=tmp_path / "out", **options))

    with pytest.raises(DataError, match=r"captions_train.jsonl: cannot be read"):
        run()
    rows = {"input": path, "guided_by": "pairID"}
    with pytest.raises(DataError, match=r"rows.jsonl:2: no pairID; expected the picture"):
        run(**rows)
    with pytest.raises(DataError, match=r"rows.jsonl:1: no caption; expected what --template name"):
        run(**rows, template="{caption}")
    ids = ["../a/b%", "a.png", "a.jpg"]
    write_jsonl(path, [{"pairID": key, "sentence1": "A dog."} for key in ids])
    names = sorted(picture.name for picture in run(**rows).folder.iterdir())
    assert names == ["..%2Fa%2Fb%25.png", "a.jpg.png", "a.png.png"]
    assert all(ImageFolder(tmp_path / "out").get(picture_name(key)) for key in ids)


# --- the built-in world ---


def test_guided_scenes_have_the_label_and_say_no_more(mini_ve):
    rows = read_jsonl(mini_ve / "snli_ve_train.jsonl")
    labels = {row["pairID"]: row["gold_label"] for row in rows}
    asked = scenes_of(mini_ve, "train", by_row=True)
    assert asked.keys() == labels.keys()
    forms = set()
    for key, (scene, hypothesis) in asked.items():
        other = guided(scene, hypothesis, Random(key))
        forms.add((hypothesis.form, labels[key]))
        assert hypothesis.judge(other) == hypothesis.judge(scene) == labels[key]
        assert len(set(other.items)) == len(other.items) == len(scene.items)
        assert other.num_hidden == scene.num_hidden and other != scene
        same = guided(scene, None, Random(key))
        assert sorted(same.items) == sorted(scene.items) and same.num_hidden == scene.num_hidden
    assert len(forms) == 4 * len(LABELS)


def test_the_built_in_world_draws_its_pictures(mini_ve, tmp_path, clseave, refused):
    command = ("illustrate", "--engine", "mini-ve", "--data", mini_ve)
    names = (("pairID", 7, "train-00000.png#0h0.png"), ("image", 5, "train-00000.png"))
    for by, limit, name in names:
        out = tmp_path / by
        options = ("--guided-by", by, "--out", out, "--limit", limit)
        assert clseave(*command, *options)[1] == f"{out}: {limit} pictures drawn · 0 kept\n"
        assert clseave(*command, *options)[1] == f"{out}: 0 pictures drawn · {limit} kept\n"
        with Image.open(out / name) as picture:
            assert picture.size == (64, 64)
            assert '"engine": "mini-ve"' in picture.info["Software"]
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(mini_ve / "captions_train.jsonl", other)
    for content in ("{}", '{"world": "mini-VE", "version": 2}'):
        (other / "world.json").write_text(content)
        assert "expected a mini-VE of this version" in refused(*command[:-1], other)


# --- diffusers ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, clip):
    """A tiny Stable Diffusion with random weights."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import AutoTokenizer, CLIPTextModel

    text = CLIPTextModel.from_pretrained(clip)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    blocks = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, attention_head_dim=4,
        cross_attention_dim=text.config.hidden_size, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), **blocks,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), **blocks
    )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    folder = tmp_path_factory.mktemp("pipeline")
    diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def _command(world, out):
    return ("illustrate", "--data", world, "--guided-by", "pairID", "--template", "{sentence2}",
            "--out", out)  # fmt: skip


def test_a_real_pipeline_draws_and_repeats_itself(world, pipeline, tmp_path, clseave):
    options = ("--model", pipeline, "--steps", 2, "--size", 16, "--device", "cpu", "--precision")

    def run(out, *more):
        code, message, err = clseave(*_command(world, tmp_path / out), *options, "fp32", *more)
        assert code == 0, err
        return message

    assert "3 pictures drawn" in run("a", "--limit", 3)
    assert "1 pictures drawn · 3 kept" in run("a", "--limit", 4)
    assert "4 pictures drawn" in run("b", "--limit", 4)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") and len(tree(tmp_path / "a")) == 4
    assert len(set(tree(tmp_path / "a").values())) == 4


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "--model is missing: which text-to-image model"),
        (("--model", "{clip}"), 1, "cannot be loaded as a diffusers pipeline ("),
        (("--model", "{pipeline}", "--size", "20"), 1, "train0.png#e: not drawn ("),
    ],
)
def test_unusable_models_are_refused(
    world, pipeline, clip, tmp_path, refused, options, code, message
):
    options = [option.format(clip=clip, pipeline=pipeline) for option in options]
    assert message in refused(*_command(world, tmp_path / "out"), *options, code=code)


def test_without_diffusers_one_line_says_how_to_install_it(world, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(illustration.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[diffusers]'" in refused(*_command(world, tmp_path / "out"))
