"""Configs of generators and models files: what they may say, and how what is wrong in them is named."""

import logging
from pathlib import Path

import pytest

from generation import settings, weights
from generation.generators.dreamgaussian.options import DreamGaussianOptions
from generation.generators.kinds import load_models
from generation.schema.options import Models, SettingsError
from generation.settings import CONFIGS, Settings

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
