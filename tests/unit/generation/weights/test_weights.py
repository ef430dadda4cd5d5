import errno
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from generation.schema.options import ModelChoice
from generation.weights import WeightsError, local_folder, lookup
from generation.weights.loading import download_command
from generation.weights.registry import REGISTRY, wanted

WEIGHTS = save({"w": np.zeros(3, dtype="float32")})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache of the standard layout; returns a function that puts files of an entry into it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def put(entry, files: dict[str, bytes]):
        root = tmp_path / f"models--{entry.repo.replace('/', '--')}"
        commit = entry.revision if entry.pinned else "0" * 40
        if not entry.pinned:
            (root / "refs").mkdir(parents=True)
            (root / "refs" / entry.revision).write_text(commit)
        for name, content in files.items():
            path = root / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return root / "snapshots" / commit

    return put


def test_every_entry_is_complete():
    for name, entry in REGISTRY.items():
        assert entry.name == name
        assert entry.licence
        assert entry.size_gb is None or entry.size_gb > 0
        assert entry.repo and entry.files if entry.url is None else entry.url.startswith("https://") and entry.size
        assert entry.pinned or entry.revision == "main"
        for file, digest in entry.sha256:
            assert wanted([file], entry.files) == [file]
            assert re.fullmatch(r"[0-9a-f]{64}", digest)
    use = REGISTRY["clip-convnext-large-d"].clip
    assert use is not None
    assert use.cosine_scale == 0.35


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(WeightsError, match=r"'flux'.*birefnet"):
        lookup(ModelChoice(model="flux"))


def test_a_chosen_revision_replaces_the_registrys():
    entry = lookup(ModelChoice(model="birefnet", revision="a" * 40))
    assert entry.revision == "a" * 40
    assert entry.repo == REGISTRY["birefnet"].repo


def test_absent_weights_say_how_to_get_them(hub):
    with pytest.raises(WeightsError, match=r"rmbg-2.0 is not on this machine.*--only rmbg-2.0 .*licence"):
        local_folder(REGISTRY["rmbg-2.0"])


@pytest.mark.parametrize("name", ["birefnet", "mvdream-sd2.1"])  # pinned, and by the name of a branch
def test_cached_weights_are_found(hub, name):
    entry = REGISTRY[name]
    folder = hub(entry, {pattern.replace("*", "model.safetensors"): WEIGHTS for pattern in entry.files})
    assert local_folder(entry) == folder


def test_incomplete_weights_are_named(hub):
    entry = REGISTRY["birefnet"]
    hub(entry, {"config.json": b"", "birefnet.py": b"", "BiRefNet_config.py": b""})
    with pytest.raises(WeightsError, match=r"lacks model\.safetensors"):
        local_folder(entry)


def test_an_absent_shard_is_named(hub):
    entry = REGISTRY["flux.1-schnell"]
    files = {pattern.replace("*", "model.safetensors"): WEIGHTS for pattern in entry.files}
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files["transformer/model.safetensors.index.json"] = json.dumps(index).encode()
    files["transformer/model-00001-of-00002.safetensors"] = WEIGHTS
    hub(entry, files)
    with pytest.raises(WeightsError, match=r"lacks transformer/model-00002-of-00002\.safetensors;"):
        local_folder(entry)


@pytest.mark.parametrize(
    ("cut", "words"), [(4, "cut short"), (len(WEIGHTS) - 1, "by its header it should have"), (30, "cut short")]
)
def test_truncated_weights_are_named(hub, cut, words):
    entry = REGISTRY["birefnet"]
    files = dict.fromkeys(entry.files, b"{}")
    hub(entry, files | {"model.safetensors": WEIGHTS[:cut]})
    with pytest.raises(WeightsError, match=rf"birefnet: model\.safetensors .*{words}.*--only birefnet"):
        local_folder(entry)


def test_a_config_without_weights_is_named(hub):
    entry = REGISTRY["mvdream-sd2.1"]
    files = {pattern.replace("*", "model.safetensors"): WEIGHTS for pattern in entry.files}
    del files["unet/model.safetensors"]
    hub(entry, files | {"unet/config.json": b"{}"})
    with pytest.raises(WeightsError, match=r"lacks unet/\*\.safetensors"):
        local_folder(entry)


@pytest.mark.parametrize("name", ["flux1-schnell.safetensors", "vae/model.fp16.safetensors"])
@pytest.mark.parametrize("damage", ["dangling", "cut short"])
def test_files_that_no_download_brings_are_not_looked_at(hub, name, damage):
    """A repository's other copies of its weights: whoever put them there, nothing here repairs them."""
    entry = REGISTRY["flux.1-schnell"]
    folder = hub(entry, {pattern.replace("*", "model.safetensors"): WEIGHTS for pattern in entry.files})
    if damage == "dangling":
        (folder / name).symlink_to("../../blobs/nothing")
    else:
        (folder / name).write_bytes(WEIGHTS[:30])
    assert local_folder(entry) == folder


def test_a_dangling_link_is_named(hub):
    entry = REGISTRY["mvdream-sd2.1"]
    folder = hub(entry, {pattern.replace("*", "model.safetensors"): WEIGHTS for pattern in entry.files})
    (folder / "unet" / "other.safetensors").symlink_to("../../blobs/nothing")
    with pytest.raises(WeightsError, match=r"mvdream-sd2\.1: unet/other\.safetensors can not be read.*--only mvdream"):
        local_folder(entry)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"weight_map": 1}', b'{"weight_map": {"a": 1}}', b"\xff"])
def test_an_index_that_is_none_is_named(hub, content):
    entry = REGISTRY["flux.1-schnell"]
    files = {pattern.replace("*", "model.safetensors"): WEIGHTS for pattern in entry.files}
    hub(entry, files | {"vae/model.safetensors.index.json": content})
    with pytest.raises(WeightsError, match=r"flux.*: vae/model\.safetensors\.index\.json can not .*--only flux"):
        local_folder(entry)


def test_a_header_without_numbers_is_named(hub):
    entry = REGISTRY["birefnet"]
    header = b'{"w": {"data_offsets": [0, "end"]}}'
    hub(entry, dict.fromkeys(entry.files, b"{}") | {"model.safetensors": len(header).to_bytes(8, "little") + header})
    with pytest.raises(WeightsError, match=r"birefnet: model\.safetensors can not be read.*--only birefnet"):
        local_folder(entry)


def test_weights_that_may_not_be_read_are_named(hub, monkeypatch):
    entry = REGISTRY["birefnet"]
    hub(entry, dict.fromkeys(entry.files, b"{}") | {"model.safetensors": WEIGHTS})
    usual = Path.open

    def refuse(self, *arguments, **options):
        if self.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(WeightsError, match=r"birefnet: model\.safetensors .*Permission denied.*--only birefnet"):
        local_folder(entry)


def test_download_command_names_another_revision():
    assert "--revision" not in download_command(REGISTRY["birefnet"])
    assert download_command(replace(REGISTRY["birefnet"], revision="main")).endswith("--only birefnet --revision main")


class TestCard:
    def test_may_have_floors_of_its_own_for_alignment(self, tmp_path):
        def use(**more: float):
            card = {"name": "mine", "licence": "MIT", "cosine_scale": 0.5, **more}
            (tmp_path / "card.json").write_text(json.dumps(card))
            return lookup(ModelChoice(model=str(tmp_path))).clip

        assert (use().min_alignment, use().min_image_alignment) == (0.3, 0.3)
        assert use(min_alignment=0.6, min_image_alignment=0.0).min_alignment == 0.6
        with pytest.raises(WeightsError, match=r"min_alignment: 1\.5 is outside of 0 to 1"):
            use(min_alignment=1.5)

    def choice(self, tmp_path, card) -> ModelChoice:
        (tmp_path / "card.json").write_text(card if isinstance(card, str) else json.dumps(card))
        return ModelChoice(model=str(tmp_path))

    def test_is_read(self, tmp_path):
        entry = lookup(self.choice(tmp_path, {"name": "small", "licence": "MIT", "cosine_scale": 0.7, "seed": 1}))
        use = entry.clip
        assert use is not None
        assert (entry.name, entry.licence, use.cosine_scale) == ("small", "MIT", 0.7)
        assert local_folder(entry) == tmp_path
        assert not entry.pinned

    def test_without_cosine_scale_is_no_clip(self, tmp_path):
        assert lookup(self.choice(tmp_path, {"name": "small", "licence": "MIT"})).clip is None

    def test_can_stand_for_a_registry_entry(self, tmp_path):
        """A copy of the published files, on a disk of one's own: licence and use are the registry's."""
        choice = self.choice(tmp_path, {"of": "clip-convnext-large-d"})
        entry = lookup(choice)
        assert entry.clip == REGISTRY["clip-convnext-large-d"].clip
        assert entry.licence == "MIT"
        with pytest.raises(WeightsError, match=r"lacks open_clip_config\.json.*copy its folder again"):
            local_folder(entry)
        (tmp_path / "open_clip_config.json").write_text("{}")
        (tmp_path / "open_clip_model.safetensors").write_bytes(WEIGHTS)
        assert local_folder(entry) == tmp_path

    @pytest.mark.parametrize(
        "card", ["{", {"of": "nothing"}, "[]", {"name": "small"}, {"name": "a", "licence": "b", "cosine_scale": "x"}]
    )
    def test_unusable(self, tmp_path, card):
        with pytest.raises(WeightsError, match=r"card\.json"):
            lookup(self.choice(tmp_path, card))

    @pytest.mark.parametrize("scale", [0, -1, 1.1, float("nan")])
    def test_scale_out_of_range(self, tmp_path, scale):
        with pytest.raises(WeightsError, match="cosine_scale"):
            lookup(self.choice(tmp_path, {"name": "a", "licence": "b", "cosine_scale": scale}))

    def test_absent(self, tmp_path):
        with pytest.raises(WeightsError, match=r"card\.json"):
            lookup(ModelChoice(model=str(tmp_path)))
