"""Loading a pipeline."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.kinds import KINDS, Kind
from generation.pipeline import assemble, warm_up
from generation.pipeline.pipeline import Asset
from generation.settings import CONFIGS, Settings
from generation.weights import WeightsError
from tests.support.sculptor import STAGES, Scene, ask
from tests.support.standins import ball

GUIDED = CONFIGS / "tiny_mv_fast.yaml"  # has MVDream, and is DreamGaussian's


def test_load_announces_and_names_every_model(mini_models, no_network, monkeypatch, sculptor):
    made = []

    def load(options, parts):
        guidance = parts.load("mvdream", lambda checkpoint: checkpoint)
        assert (guidance.folder / "unet" / "config.json").is_file()
        assert (guidance.device, guidance.dtype, guidance.entry.front_azimuth) == ("cpu", torch.float32, 0.0)
        assert parts.remove_background(torch.rand(4, 3, 32, 32)).shape == (4, 1, 32, 32)
        made.append(options)
        return sculptor

    monkeypatch.setitem(KINDS, "dreamgaussian", Kind(DreamGaussianOptions, "tests:load"))
    monkeypatch.setattr("tests.load", load, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = Settings.resolve({"profile": "tiny", "models": mini_models, "config": GUIDED})
    told: list[str] = []
    pipeline = assemble.load(settings, told.append)
    assert made == [settings.options]  # one for texts and pictures, whose options are the same
    assert sum(line.startswith("loading") for line in told) == 4
    assert "rasteriser" in told[-1]
    keys = ("stage", "name", "licence", "precision", "device")
    assert [tuple(model[key] for key in keys) for model in pipeline.models] == [
        (stage, f"mini-{folder}", "MIT", "float32", "cpu")
        for stage, folder in zip(
            ["text_to_image", "background", "mvdream", "clip"], ["flux", "background", "mvdream", "clip"], strict=True
        )
    ]
    monkeypatch.setattr(sculptor, "begin", lambda subject: Scene(torch.ones(4, 64, 64), subject.words, subject.seed, 5))
    monkeypatch.setattr(Scene, "gaussians", lambda scene: ball(seed=scene.seed))
    monkeypatch.setattr(pipeline.background, "remove", lambda images: torch.ones_like(images[:, :1]))
    (asset,) = pipeline.generate([ask("a red cube", threshold=0.0)])
    assert isinstance(asset, Asset)
    assert asset.ply
    assert list(asset.report.seconds) == STAGES


def test_load_without_weights_says_which(tmp_path, mini_models, monkeypatch):
    models = tmp_path / "models.yaml"
    text = mini_models.read_text().replace("./mvdream", "mvdream-sd2.1")
    models.write_text(text.replace("./", f"{mini_models.parent}/"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"mvdream-sd2\.1 is not on this machine; get it: .*--only mvdream"):
        assemble.load(Settings.resolve({"profile": "tiny", "models": models, "config": GUIDED}))


@pytest.mark.slow
def test_real_classes_end_to_end(mini_models, no_network, tmp_path, caplog):
    """Every stage's real class with random weights: the way is right, whatever the outcome says."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "iters: 3\nref_size: 64\nrender_size: 64\nnum_pts: 7500\ninit: ball\ndensity_start_iter: 100\n"
        "densification_interval: 100"
    )
    pipeline = assemble.load(Settings.resolve({"profile": "tiny", "models": mini_models, "config": config}))
    warm_up._warm_up_stages(pipeline, lambda text: None)  # what only a GPU needs runs anywhere
    # A random matting net answers about one half everywhere: make it see the whole picture as the object.
    matting: Any = SimpleNamespace(remove=lambda images: torch.ones_like(images[:, :1]))
    pipeline.background = matting
    with caplog.at_level(logging.INFO):
        first, second = pipeline.generate([ask("a red cube", threshold=0.0), ask("a red cube", threshold=0.0)])
    assert isinstance(first, Asset), first
    assert isinstance(second, Asset), second
    assert first.report.num_gaussians > 0
    assert list(first.report.seconds) == [*STAGES[:2], "dreamgaussian", STAGES[3]]
    assert first.ply == second.ply
    assert "red cube" not in caplog.text
