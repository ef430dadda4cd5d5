"""Arguments, config files and the machine, resolved into settings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from generation import settings, weights
from generation.generators.kinds import load_models
from generation.schema.options import SettingsError
from generation.settings import CONFIGS, Settings
from generation.splats.rasterize import gsplat_build
from scripts.ops.download_weights import profile_entries


@pytest.mark.parametrize(
    ("asked", "count", "numbers"),
    [("all", 0, ()), ("all", 1, (0,)), ("all", 3, (0, 1, 2)), ("1", 2, (1,)), ("1,0", 2, (1, 0))],
)
def test_gpus_are_those_that_are_asked_for(monkeypatch, asked, count, numbers):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(gsplat_build, "is_built", lambda: True)
    monkeypatch.setattr(settings, "gpu_memory", lambda gpus: None)
    assert Settings.resolve({"profile": "tiny", "gpus": asked}).gpus == numbers


def test_the_smallest_card_decides(monkeypatch):
    sizes = {0: 80, 1: 24, 2: 16}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu] * 2**30)
    )
    assert settings.gpu_memory([0, 1]) == 24 * 2**30
    assert settings.gpu_memory([]) is None


def test_models_of_ones_own_are_not_full_unless_that_is_asked_for(monkeypatch, mini_models):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Settings.resolve({"models": mini_models}).profile == "tiny"


def test_cards_behind_a_driver_that_is_too_old_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved = Settings.resolve({"profile": "tiny"})
    assert (resolved.device, resolved.gpus) == ("cpu", ())


@pytest.mark.parametrize(
    ("asked", "count", "words"),
    [
        ("2", 2, "'2': CUDA finds 2, numbered from 0"),
        ("0", 0, "'0': CUDA finds no GPU on this machine"),
        ("0,0", 2, "'0,0': names a GPU twice"),
        ("0,", 2, "gpus: '0,'"),
        ("-1", 2, "gpus: '-1'"),
    ],
)
def test_gpus_that_can_not_be_used_are_named_with_how_many_there_are(monkeypatch, asked, count, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    with pytest.raises(SettingsError, match=words):
        Settings.resolve({"profile": "tiny", "gpus": asked})


class TestScoreParts:
    """What the validators' score has beside the alignment with texts may be missing; it is named then."""

    @pytest.fixture
    def models_file(self, tmp_path, mini_models, monkeypatch) -> Path:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        text = mini_models.read_text().replace("./", f"{mini_models.parent}/")
        path = tmp_path / "models.yaml"
        more = "image_clip: {model: llm2clip-l-14-336}\nquality: {model: 404-gen-quality}\nlpips: {model: alexnet}\n"
        path.write_text(text + more)
        return path

    def test_absent_ones_are_left_out(self, models_file):
        resolved = Settings.resolve({"profile": "tiny", "models": models_file})
        assert resolved.models.optional == {}
        assert resolved.models.score_parts == ("alignment", "ssim")
        assert set(resolved.missing) == {"image_clip", "quality", "lpips"}
        assert resolved.missing["lpips"].endswith("--only alexnet")

    def test_a_damaged_one_is_an_error(self, models_file, tmp_path):
        folder = tmp_path / "hub" / "url--alexnet"
        folder.mkdir(parents=True)
        (folder / "alexnet-owt-7be5be79.pth").write_bytes(b"half")
        with pytest.raises(SettingsError, match=r"lpips: alexnet: .* has 4 bytes, it should have 244408911"):
            Settings.resolve({"profile": "tiny", "models": models_file})

    def test_those_that_are_there_are_loaded(self, models_file, tmp_path):
        for name in ("image_clip", "quality"):  # any folder with a card
            (tmp_path / name).mkdir()
            (tmp_path / name / "card.json").write_text('{"name": "mine", "licence": "MIT"}')
        text = (
            models_file.read_text().replace("404-gen-quality", "./quality").replace("llm2clip-l-14-336", "./image_clip")
        )
        models_file.write_text(text)
        resolved = Settings.resolve({"profile": "tiny", "models": models_file})
        assert set(resolved.models.optional) == {"image_clip", "quality"}
        assert set(resolved.missing) == {"lpips"}
        assert resolved.models.score_parts == ("iqa", "alignment", "ssim")

    def test_the_download_brings_all_of_the_full_profiles(self):
        names = {entry.name for entry in profile_entries()}
        assert {"clip-convnext-large-d", "llm2clip-l-14-336", "404-gen-quality", "alexnet"} <= names

    def test_small_cards_keep_the_clips_and_the_idle_generator_off_the_gpu(self):
        models = load_models(settings.PROFILES["full"].models)
        fitted = {each.name: models.fitted(each) for each in models.memory_classes}
        offloaded = {name: (each.offload_self_check, each.offload_generators) for name, each in fitted.items()}
        both, neither = (True, True), (False, False)
        assert offloaded == {"80gb": neither, "48gb": (True, False), "24gb": both, "16gb": both}


class TestResolve:
    @pytest.fixture
    def machine(self, monkeypatch):
        """Pretends a machine with or without a GPU and the full-size weights."""

        def pretend(gpu: bool, absent: list[str], gib: float = 24, built: bool = True) -> None:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
            monkeypatch.setattr(settings, "gpu_memory", lambda gpus: int(gib * 2**30) if gpu else None)
            monkeypatch.setattr(weights, "missing", lambda models: absent)
            monkeypatch.setattr(settings, "_choose_gpus", lambda asked: (0,) if gpu else ())
            monkeypatch.setattr(gsplat_build, "is_built", lambda: built)

        return pretend

    @pytest.mark.parametrize("asked", [{"profile": "tiny"}, {}])
    @pytest.mark.parametrize(("built", "device", "gpus"), [(True, "cuda", (0,)), (False, "cpu", ())])
    def test_the_tiny_profile_takes_the_gpu_only_where_gsplat_is(self, machine, asked, built, device, gpus):
        machine(True, ["flux is not here"], built=built)
        resolved = Settings.resolve(asked)
        assert (resolved.profile, resolved.device, resolved.gpus) == ("tiny", device, gpus)
        assert ("gsplat is not built" in resolved.profile_reason) is not built

    @pytest.mark.parametrize(
        ("gpu", "absent", "profile", "words"),
        [
            (True, [], "full", "all full-size weights are there"),
            (True, ["flux is not here"], "tiny", "flux is not here"),
            (False, [], "tiny", "no CUDA GPU"),
        ],
    )
    def test_auto_says_why(self, machine, gpu, absent, profile, words):
        machine(gpu, absent)
        resolved = Settings.resolve({})
        assert resolved.profile == profile
        assert words in resolved.profile_reason
        assert resolved.config == settings.PROFILES[profile].config
        assert resolved.image_config.name == {"full": "image_fast.yaml", "tiny": "tiny_lgm.yaml"}[profile]

    @pytest.mark.parametrize(
        ("gib", "name", "precision", "max_batch"),
        [
            (79.2, "80gb", "bfloat16", 4),
            (44.4, "48gb", "bfloat16, T5 nf4 and bfloat16", 4),  # an L40S
            (39.5, "24gb", "nf4 and bfloat16", 4),
            (24, "24gb", "nf4 and bfloat16", 4),
            (21.9, "24gb", "nf4 and bfloat16", 4),  # an L4
            (16, "16gb", "nf4 and bfloat16", 1),
            (15.6, "16gb", "nf4 and bfloat16", 1),  # an RTX 4080
        ],
    )
    def test_the_class_follows_the_memory(self, machine, gib, name, precision, max_batch):
        machine(True, [], gib)
        resolved = Settings.resolve({})
        assert (resolved.profile, resolved.memory_class) == ("full", name)
        assert f"{gib:.2f} GiB" in resolved.memory_reason
        assert resolved.models.text_to_image.precision == precision
        assert resolved.models.max_batch == max_batch
        assert resolved.models.background.precision == "float16"

    def test_memory_can_be_less_than_the_card_has(self, machine):
        machine(True, [], gib=79.2)
        assert Settings.resolve({}, memory=16 * 2**30).memory_class == "16gb"

    def test_a_class_can_be_asked_for(self, machine):
        machine(True, [], gib=8)
        resolved = Settings.resolve({"memory_class": "16gb"})
        assert (resolved.profile, resolved.memory_class, resolved.models.max_batch) == ("full", "16gb", 1)
        assert "asked for" in resolved.memory_reason

    def test_too_little_memory_means_tiny_unless_full_is_asked_for(self, machine):
        machine(True, [], gib=11.9)
        resolved = Settings.resolve({})
        assert (resolved.profile, resolved.memory_class) == ("tiny", None)
        assert "11.90 GiB" in resolved.profile_reason
        assert "15" in resolved.profile_reason
        with pytest.raises(SettingsError, match=r"models_full\.yaml: the GPU has 11\.90 GiB of memory, at least 15"):
            Settings.resolve({"profile": "full"})

    @pytest.mark.parametrize(
        ("profile", "words"),
        [("full", "'1tb': must be one of 80gb, 48gb, 24gb, 16gb"), ("tiny", "'1tb': the file has no memory classes")],
    )
    def test_an_unknown_class_is_refused(self, machine, profile, words):
        machine(True, [])
        with pytest.raises(SettingsError, match=f"models_{profile}.yaml: memory_class: {words}"):
            Settings.resolve({"profile": profile, "memory_class": "1tb"})

    @pytest.mark.parametrize("more", [{}, {"models": settings.PROFILES["full"].models}])
    def test_full_without_a_gpu_is_refused(self, machine, more):
        machine(False, ["flux is not here"])
        with pytest.raises(SettingsError, match="full needs a CUDA GPU, and torch finds none"):
            Settings.resolve({"profile": "full", **more})

    def test_full_without_weights_is_refused(self, machine):
        machine(True, ["flux is not here"])
        with pytest.raises(SettingsError, match="flux is not here"):
            Settings.resolve({"profile": "full"})

    def test_values_override(self, machine, tmp_path):
        machine(False, [])
        config = tmp_path / "config.yaml"
        config.write_text("iters: 7")
        resolved = Settings.resolve({"profile": "tiny", "config": str(config), "flux_steps": "2", "port": None})
        options: Any = resolved.options
        assert (options.iters, resolved.models.text_to_image.steps, resolved.port) == (7, 2, 10006)

    def test_a_cap_on_gaussians_holds_from_the_start(self, machine, tmp_path):
        machine(False, [])
        of_tiny: Any = Settings.resolve({"profile": "tiny", "max_gaussians": "9000"})
        assert (of_tiny.options.max_gaussians, of_tiny.image_options.max_gaussians) == (9000, 9000)
        tiny = {"profile": "tiny", "config": CONFIGS / "tiny_mv_fast.yaml"}
        resolved: Any = Settings.resolve({**tiny, "max_gaussians": "9000"}).options
        assert (resolved.max_gaussians, resolved.num_pts) == (9000, 9000)
        resolved = Settings.resolve({**tiny, "max_gaussians": "500000"}).options
        assert (resolved.max_gaussians, resolved.num_pts) == (500_000, 14_000)
        more = tmp_path / "more.yaml"
        more.write_text("generator: lgm\nviews_from: picture_and_words\nmin_gaussians: 20000\n")
        with pytest.raises(
            SettingsError, match=r"^max_gaussians: 9000: min_gaussians 20000 is over max_gaussians 9000$"
        ):
            Settings.resolve({"profile": "tiny", "config": more, "max_gaussians": "9000"})

    def test_a_clusters_service_needs_no_gpu_and_no_weights(self, machine):
        machine(False, ["flux is not here"])
        own = Settings.resolve({"cluster": "10.0.0.1:6379"})
        assert (own.profile, own.device, own.memory_class, own.gpus) == ("full", "cluster", None, ())
        assert own.options.generator == "dreamgaussian"
        assert Settings.resolve({"cluster": "10.0.0.1:6379", "profile": "tiny"}).profile == "tiny"

    @pytest.mark.parametrize("values", [{"gpus": "0"}, {"profile_trace": "trace"}])
    def test_what_is_for_one_machine_is_refused_for_a_cluster(self, values):
        with pytest.raises(SettingsError, match=f"{next(iter(values))}: is for one machine"):
            Settings.resolve({"cluster": "10.0.0.1:6379", **values})

    def test_a_clusters_engine_resolves_what_its_own_machine_is(self, machine, tmp_path):
        machine(True, [], gib=24)
        values = {"cluster": "10.0.0.1:6379", "cluster_token_file": tmp_path, "profile": "auto", "max_queue": 3}
        there = settings.resolve_elsewhere(values, tmp_path)
        assert (there.profile, there.device, there.memory_class) == ("full", "cuda", "24gb")

    def test_a_clusters_machine_does_not_fall_back_to_tiny(self, machine, tmp_path):
        """Splats of the tiny models are worth nothing beside the others'."""
        machine(True, ["flux is not here"])
        with pytest.raises(SettingsError, match="flux is not here"):
            settings.resolve_elsewhere({"cluster": "10.0.0.1:6379", "profile": "auto"}, tmp_path)

    def test_files_of_the_code_are_taken_from_where_the_code_is(self, machine, tmp_path):
        machine(False, [])
        values = {"profile": "tiny", "config": tmp_path / "configs" / "tiny_mv_fast.yaml"}  # not there
        assert settings.resolve_elsewhere(values, tmp_path).config == CONFIGS / "tiny_mv_fast.yaml"

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"max_gaussians": 6999}, ("max_gaussians", "6999", "7000", "validators reject")),
            ({"max_gaussians": 2_000_001}, ("max_gaussians", "2000001", "2000000")),
            ({"port": 0}, ("port", "0", "1")),
            ({"port": 65536}, ("port", "65536", "65535")),
            ({"validation_threshold": 1.5}, ("validation_threshold", "1.5", "1")),
            ({"flux_steps": 51}, ("flux_steps", "51", "50")),
            ({"profile": "huge"}, ("profile", "huge", "tiny")),
            ({"prot": 1}, ("prot",)),
        ],
    )
    def test_bad_argument_names_key_value_and_limit(self, values, words):
        with pytest.raises(SettingsError) as error:
            Settings.resolve(values)
        assert all(word in str(error.value) for word in words), str(error.value)
