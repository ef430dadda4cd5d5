import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from generation import settings, weights
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.kinds import load_models
from generation.schema.options import Models, SettingsError
from generation.settings import CONFIGS, Settings
from generation.splats.rasterize import gsplat_build
from scripts.ops.download_weights import profile_entries

# The keys of upstream's configs/text_mv.yaml and their values, in an order of our own.
UPSTREAM = """
input:
prompt:
mesh:
load:
save_path: ???
outdir: logs
mesh_format: obj
negative_prompt: "ugly, blurry"
elevation: 0
ref_size: 256
density_thresh: 1
lambda_sd: 1
lambda_zero123: 0
mvdream: True
batch_size: 1
iters: 500
iters_refine: 50
anneal_timestep: True
radius: 2.5
fovy: 49.1
train_geo: False
invert_bg_prob: 0.5
gui: False
force_cuda_rast: False
H: 800
W: 800
num_pts: 5000
sh_degree: 0
position_lr_init: 0.001
position_lr_final: 0.00002
position_lr_delay_mult: 0.02
position_lr_max_steps: 300
feature_lr: 0.01
opacity_lr: 0.05
scaling_lr: 0.005
rotation_lr: 0.005
percent_dense: 0.01
density_start_iter: 0
density_end_iter: 3000
densification_interval: 50
opacity_reset_interval: 700
densify_grad_threshold: 0.01
geom_lr: 0.0001
texture_lr: 0.2
"""


# What image.yaml and image_sai.yaml have in place of some of these.
UPSTREAM_IMAGE = {
    "negative_prompt": "", "mvdream": "False", "lambda_sd": "0", "lambda_zero123": "1", "radius": "2",
    "position_lr_max_steps": "500", "density_start_iter": "100", "densification_interval": "100",
    "stable_zero123": "False", "warmup_rgb_loss": "True",
}  # fmt: skip


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_upstream_config_loads_with_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        options = DreamGaussianOptions.load(write(tmp_path, UPSTREAM))
    assert options == DreamGaussianOptions(negative_prompt="ugly, blurry")  # the defaults are upstream's
    (record,) = caplog.records
    assert all(key in record.getMessage() for key in ("iters_refine", "save_path", "texture_lr", "H"))
    assert "num_pts" not in record.getMessage()


@pytest.mark.parametrize("stable", [False, True], ids=["image.yaml", "image_sai.yaml"])
def test_upstream_image_config_loads_with_one_warning(tmp_path, caplog, stable):
    own = UPSTREAM_IMAGE | ({"stable_zero123": "True", "warmup_rgb_loss": "False"} if stable else {})
    kept = [line for line in UPSTREAM.strip().splitlines() if line.partition(":")[0] not in own]
    text = "\n".join([*kept, *(f"{key}: {value}" for key, value in own.items())])
    with caplog.at_level(logging.WARNING):
        options = DreamGaussianOptions.load(write(tmp_path, text))
    assert options == DreamGaussianOptions(
        mvdream=False, lambda_sd=0, lambda_zero123=1, stable_zero123=stable, warmup_rgb_loss=not stable, radius=2,
        position_lr_max_steps=500, density_start_iter=100, densification_interval=100,
    )  # fmt: skip
    (record,) = caplog.records
    assert "zero123" not in record.getMessage()
    assert "texture_lr" in record.getMessage()
    guidance = "stable_zero123" if stable else "zero123"
    assert list(load_models(settings.PROFILES["full"].models).needed(options)) == [
        "text_to_image", "background", guidance, "clip",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iters: 10001", ("iters", "10001", "10000")),
        ("iters: 0", ("iters", "0", "1")),
        ("ref_size: 8", ("ref_size", "8", "16")),
        ("iters: many", ("iters", "many", "integer")),
        ("lambda_sd: .nan", ("lambda_sd", "nan", "finite")),
        ("init: cube", ("init", "cube", "'ball' or 'views'")),
        ("background: 1.5", ("background", "1.5", "1")),
        ("- iters", ("keys with values",)),
        ("iters: [", ("can not be read as YAML",)),
    ],
)
def test_bad_option_names_file_key_value_and_limit(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as error:
        DreamGaussianOptions.load(path)
    assert str(path) in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_config_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml"):
        DreamGaussianOptions.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "path", [*sorted(CONFIGS.glob("*_mv_*.yaml")), CONFIGS / "image_fast.yaml"], ids=lambda path: path.name
)
def test_own_configs_use_known_keys_only(path, caplog):
    DreamGaussianOptions.load(path)
    assert not caplog.records


def test_own_configs_are_as_fast_as_they_say():
    assert DreamGaussianOptions.load(CONFIGS / "text_mv_fast.yaml").iters == 250
    assert DreamGaussianOptions.load(CONFIGS / "text_mv_ultra_fast.yaml").iters == 150
    assert DreamGaussianOptions.load(CONFIGS / "image_fast.yaml").iters == 250


@pytest.mark.parametrize("profile", ["full", "tiny"])
def test_models_files_name_checkpoints_that_exist(profile):
    models = load_models(settings.PROFILES[profile].models)
    needed = ["text_to_image", "background", "mvdream", "clip"]
    assert list(models.needed(DreamGaussianOptions())) == needed
    full = {"zero123", "stable_zero123", "imagedream", "trellis", "dinov2", "image_clip", "lpips"}
    others = {"lgm", "quality"} | (full if profile == "full" else set())
    assert set(models.stages) - set(needed) == others
    for choice in models.stages.values():
        if profile == "full":
            assert weights.lookup(choice).is_downloaded
        else:
            assert Path(choice.model).is_absolute()


@pytest.mark.parametrize(
    ("options", "guidances"),
    [
        ({}, {"mvdream"}),
        ({"lambda_zero123": 1}, {"mvdream", "zero123"}),
        ({"lambda_zero123": 1, "lambda_sd": 0}, {"zero123"}),
        ({"lambda_zero123": 1, "lambda_sd": 0, "stable_zero123": True}, {"stable_zero123"}),
        ({"lambda_zero123": 1, "lambda_sd": 0, "init": "views"}, {"mvdream", "zero123"}),
        ({"lambda_sd": 0}, set()),
    ],
)
def test_only_the_guidances_in_use_are_needed(options, guidances):
    models = load_models(settings.PROFILES["full"].models)
    needed = models.needed(DreamGaussianOptions(**options))
    assert set(needed) - {"text_to_image", "background", "clip"} == guidances


def test_a_guidance_without_a_checkpoint_is_named(tmp_path):
    config = write(tmp_path, "lambda_zero123: 1")
    why = r"lambda_zero123 is 1\.0, but the models file has no zero123 \(.*models_tiny\.yaml; profile tiny: .* asked"
    with pytest.raises(SettingsError, match=why):
        Settings.resolve({"profile": "tiny", "config": config})


@pytest.mark.parametrize("key", ["prompt_template", "mvdream_template"])
@pytest.mark.parametrize("template", ["a thing", "{prompt} {prompt}", "{view}"])
def test_a_template_must_have_its_place(tmp_path, key, template):
    with pytest.raises(SettingsError, match=rf"{key}.*exactly once"):
        DreamGaussianOptions.load(write(tmp_path, f"{key}: '{template}'"))


@pytest.mark.parametrize("profile", ["full", "tiny"])
def test_a_models_file_of_before_says_where_its_template_went(tmp_path, caplog, profile):
    text = settings.PROFILES[profile].models.read_text()
    assert "prompt_template" not in text
    before = text.replace("  steps: 4\n", '  steps: 4\n  prompt_template: "{prompt}, from slightly above"\n')
    with caplog.at_level(logging.WARNING):
        models = Models.load(write(tmp_path, before))
    assert models.text_to_image.steps == 4
    (record,) = caplog.records
    assert "config.yaml: text_to_image.prompt_template has no effect" in record.getMessage()
    assert "generator's config" in record.getMessage()


@pytest.mark.parametrize(
    ("elevation", "view"),
    [
        (0, "at eye level"), (-4, "at eye level"), (-5, "from slightly above"), (-20, "from slightly above"),
        (-60, "from high above"), (-90, "from high above"), (20, "from slightly below"), (90, "from far below"),
    ],
)  # fmt: skip
def test_text_to_image_is_asked_for_what_the_elevation_says(elevation, view):
    asked = DreamGaussianOptions(elevation=elevation).picture_prompt("a red cube")
    assert asked.startswith("a red cube, ")
    assert f"front view {view}, plain white background" in asked


OF_DREAMGAUSSIAN = [path for path in sorted(CONFIGS.glob("*fast.yaml")) if not path.name.startswith("trellis")]


@pytest.mark.parametrize("path", OF_DREAMGAUSSIAN, ids=lambda path: path.name)
def test_own_configs_ask_for_the_view_that_they_place_the_picture_at(path):
    options = DreamGaussianOptions.load(path)
    asked, mvdream = options.picture_prompt("a red cube"), options.mvdream_prompt("a red cube")
    if path.name.startswith("tiny"):  # as its models were trained, which see everything from 20 degrees above
        assert (asked, mvdream) == ("a red cube", "a red cube")
    else:
        assert ("eye level" in asked, "above" in asked, options.elevation) == (True, False, 0)
        assert mvdream == "a red cube, 3d asset"
    assert options.mvdream_prompt("") == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{min_ver: 10, max_ver: -10}", ("min_ver 10", "max_ver -10")),
        ("{elevation: -90, min_ver: -5, max_ver: 5}", ("elevation -90", "min_ver -5", "max_ver 5")),
        ("{elevation: 90, min_ver: -5, max_ver: 5}", ("elevation 90", "min_ver -5", "max_ver 5")),
        ("{density_start_iter: 200, density_end_iter: 100}", ("density_start_iter 200", "density_end_iter 100")),
        ("density_start_iter: 3001", ("density_start_iter 3001", "density_end_iter 3000")),
        ("{num_pts: 50000, max_gaussians: 40000}", ("num_pts 50000", "max_gaussians 40000")),
        ("num_pts: 600000", ("num_pts 600000", "max_gaussians 500000")),
        ("{position_lr_init: 0.001, position_lr_final: 0.01}", ("position_lr_final 0.01", "position_lr_init 0.001")),
        ("{init: views, mvdream: false}", ("init views", "mvdream false")),
        ("lambda_views: 1", ("lambda_views 1", "init ball")),
        ("stable_zero123: true", ("stable_zero123 true", "lambda_zero123 0")),
        ("{lambda_sd: 0, lambda_reference: 0}", ("lambda_sd", "lambda_zero123", "lambda_reference", "lambda_views")),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_both_names(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as error:
        DreamGaussianOptions.load(path)
    assert str(path) in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "{position_lr_init: 0}",  # places that stay
        "{density_start_iter: 0, density_end_iter: 0}",  # no density control
        "{num_pts: 40000, max_gaussians: 40000}",
        "{init: views, lambda_sd: 0, lambda_views: 1}",
        "{elevation: -90}",
        "{lambda_sd: 0}",
    ],
)
def test_what_only_looks_like_a_contradiction_loads(tmp_path, text):
    DreamGaussianOptions.load(write(tmp_path, text))


@pytest.mark.parametrize(
    "line", ["max_batch: 2", "  quantization: nf4", "  quantization_t5: nf4", "  offload_t5: true"]
)
def test_what_memory_classes_say_is_not_said_beside_them(tmp_path, line):
    text = settings.PROFILES["full"].models.read_text()
    text = text.replace("  steps: 4\n", f"  steps: 4\n{line}\n") if line.startswith(" ") else f"{line}\n{text}"
    with pytest.raises(SettingsError, match=rf"{line.split(':')[0].strip()}: memory_classes say that"):
        Models.load(write(tmp_path, text))


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


def test_cards_behind_a_driver_that_is_too_old_are_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    resolved = Settings.resolve({"profile": "tiny"})
    assert (resolved.device, resolved.gpus) == ("cpu", ())


@pytest.mark.parametrize(
    ("asked", "count", "words"),
    [
        ("2", 2, "'2'.* are 2, numbered from 0"),
        ("0", 0, "'0'.* are none that CUDA can use"),
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
        [("full", "'1tb': must be one of 80gb, 48gb, 24gb, 16gb"), ("tiny", "'1tb': there are none")],
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
        config = write(tmp_path, "iters: 7")
        resolved = Settings.resolve({"profile": "tiny", "config": str(config), "flux_steps": "2", "port": None})
        options: Any = resolved.options
        assert (options.iters, resolved.models.text_to_image.steps, resolved.port) == (7, 2, 10006)

    def test_a_cap_on_gaussians_holds_from_the_start(self, machine):
        machine(False, [])
        of_tiny: Any = Settings.resolve({"profile": "tiny", "max_gaussians": "9000"}).options
        assert of_tiny.max_gaussians == 9000
        tiny = {"profile": "tiny", "config": CONFIGS / "tiny_mv_fast.yaml"}
        resolved: Any = Settings.resolve({**tiny, "max_gaussians": "9000"}).options
        assert (resolved.max_gaussians, resolved.num_pts) == (9000, 9000)
        resolved = Settings.resolve({**tiny, "max_gaussians": "500000"}).options
        assert (resolved.max_gaussians, resolved.num_pts) == (500_000, 14_000)

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
