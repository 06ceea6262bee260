"""The multilingual autoencoder: its formula, its folder, its training."""

import pytest
import torch
from reference_aligner import sentence_states
from tiny_world import QUICK, flip_byte, killed_at_step, read_jsonl, tree, weights
from transformers import AutoModel, AutoTokenizer

from clseave_cli.core.alignment.autoencoding import autoencode
from clseave_cli.core.config import AutoencodeConfig
from clseave_cli.core.models.student import Autoencoder, load_autoencoder, save_autoencoder
from clseave_cli.errors import DataError, ModelError, UsageError


@pytest.mark.parametrize("code", ["relu", "linear"])
def test_it_is_two_layers(code):
    torch.manual_seed(0)
    autoencoder = Autoencoder(6, 4, code)
    states = torch.randn(5, 6)
    encode, decode = autoencoder.encoder[0], autoencoder.decoder[0]
    codes = states @ encode.weight.T + encode.bias
    codes = codes.clamp(min=0) if code == "relu" else codes
    restored = codes @ decode.weight.T + decode.bias
    restored = restored.clamp(min=0) if code == "relu" else restored
    assert torch.allclose(autoencoder(states), restored, atol=1e-6)
    assert torch.allclose(autoencoder.encoder(states), codes, atol=1e-6)
    assert (autoencoder(states).min() < 0) == (code == "linear")


def test_only_an_intact_folder_of_the_same_shape_is_loaded(tmp_path):
    saved = Autoencoder(6, 4)
    fingerprint = save_autoencoder(saved, tmp_path, languages=["de"])
    loaded, loaded_fingerprint = load_autoencoder(tmp_path, Autoencoder(6, 4))
    assert loaded_fingerprint == fingerprint
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    for other, message in (
        (Autoencoder(8, 4), "of 6 to 4, code relu; needed here: 8 to 4, code relu"),
        (Autoencoder(6, 4, "linear"), "needed here: 6 to 4, code linear"),
    ):
        with pytest.raises(ModelError, match=message):
            load_autoencoder(tmp_path, other)
    flip_byte(tmp_path / "autoencoder.safetensors")
    with pytest.raises(ModelError, match="damaged"):
        load_autoencoder(tmp_path, Autoencoder(6, 4))
    with pytest.raises(ModelError, match="no such model folder; `clseave autoencode"):
        load_autoencoder(tmp_path / "nowhere", Autoencoder(6, 4))


@pytest.fixture
def train(world, trained, encoder, tmp_path):
    """Trains an autoencoder into a folder of this name."""
    inputs = {"data": str(world), "runs": trained, "student": str(encoder)}
    defaults = {"lang": ("de", "nl"), "epochs": 2, **QUICK, "learning_rate": 1e-2}

    def run(name, **options):
        return autoencode(AutoencodeConfig(out=tmp_path / name, **inputs, **(defaults | options)))

    return run


def test_training_reconstructs_the_states(train, encoder):
    before = tree(encoder)
    result = train("a", code="linear", epochs=60)
    records = read_jsonl(result.folder / "training" / "metrics.jsonl")
    errors = [record["dev"]["mse"] for record in records if "dev" in record]
    assert errors[-1] < 0.5 * errors[0]
    assert result.training.dev["unexplained"] < 0.6
    assert result.languages == ("de", "nl") and tree(encoder) == before
    loaded, _ = load_autoencoder(result.folder, Autoencoder(32, 32, "linear"))
    assert not any(parameter.isnan().any() for parameter in loaded.parameters())


def test_the_loss_is_that_of_the_words_first_tokens(train, world, encoder):
    """The last dev metric, recomputed with transformers alone."""
    result = train("a")
    autoencoder, _ = load_autoencoder(result.folder, Autoencoder(32, 32))
    model = AutoModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    states = []
    for lang in ("de", "nl"):
        rows = read_jsonl(world / f"snli_ve_dev.{lang}.jsonl")
        for sentence in dict.fromkeys(row["sentence2"] for row in rows):
            hidden, words = sentence_states(model, tokenizer, sentence.split(), -1)
            states += [hidden[words.index(word)] for word in range(len(sentence.split()))]
    states = torch.stack(states)
    error = (autoencoder(states) - states).square().mean().item()
    assert result.training.dev["mse"] == pytest.approx(error, rel=1e-4)


def test_a_killed_run_ends_in_the_same_autoencoder_and_is_not_trained_again(train, tmp_path):
    options = {"epochs": 6, "batch_size": 4, "checkpoint_minutes": 0}
    whole = train("whole", **options)
    with killed_at_step(7):
        train("killed", **options)
    (state,) = (tmp_path / "killed.partial" / "training").glob("state-*")
    assert state.name == "state-00000006"
    resumed = train("killed", resume=True, **options)
    assert weights(resumed.folder) == weights(whole.folder)
    assert resumed.training.steps == whole.training.steps > 7
    finished = tree(resumed.folder)
    again = train("killed", resume=True, **options)
    assert again.training is None and tree(resumed.folder) == finished


def test_refusals(train, tmp_path, monkeypatch):
    # Before the encoder is loaded.
    monkeypatch.setattr("clseave_cli.core.alignment.autoencoding.new_student", pytest.fail)
    with pytest.raises(DataError, match=r"no snli_ve_gone.de.jsonl"):
        train("a", dev_split="gone")
    with pytest.raises(UsageError, match="--lang is missing"):
        train("a", lang=())
    with pytest.raises(DataError, match=r"no snli_ve_train.ko.jsonl"):
        train("a", lang=("ko",))
    assert not list(tmp_path.iterdir())
