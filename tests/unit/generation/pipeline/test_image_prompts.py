"""Requests of pictures."""

import torch
from PIL import Image

from tests.support.sculptor import Scene, ask, told
from tests.support.standins import ball


class TestImagePrompts:
    def test_skip_text_to_image_and_guide_without_words(self, pipeline, sculptor, monkeypatch):
        prompts: list[str] = []
        begin = sculptor.begin
        monkeypatch.setattr(sculptor, "begin", lambda subject: told(prompts, subject.words, begin(subject)))
        picture = Image.new("RGB", (90, 60), "white")
        picture.paste((0, 0, 255), (20, 10, 70, 50))
        (asset,) = pipeline.generate([ask(None, image=picture)])
        assert asset.report.score > 0.9
        assert prompts == [""]

    def test_what_a_validator_opens_is_compared(self, pipeline):
        """Where the picture is upright only with its metadata, say, that is not what validators look at."""
        picture, target = Image.new("RGB", (90, 60), "white"), Image.new("RGB", (90, 60), "white")
        picture.paste((0, 0, 255), (20, 10, 70, 50))
        target.paste((255, 0, 0), (20, 10, 70, 50))
        (asset,) = pipeline.generate([ask(None, image=picture, target=target)])
        assert asset.report.score < 0.6
        assert asset.ply == b""
        (asset,) = pipeline.generate([ask(None, image=target, target=target)])
        assert asset.report.score > 0.9

    def test_what_the_sender_cut_out_is_not_matted(self, pipeline, sculptor, monkeypatch):
        """White on white, and half as transparent as glass: the alpha says where it is."""
        cutouts: list[torch.Tensor] = []
        begin = sculptor.begin
        monkeypatch.setattr(sculptor, "begin", lambda subject: told(cutouts, subject.cutout, begin(subject)))
        monkeypatch.setattr(pipeline.background, "remove", None)
        monkeypatch.setattr(Scene, "gaussians", lambda scene: ball())
        for alpha in (255, 60):
            picture = Image.new("RGBA", (90, 60), (255, 0, 0, 0))
            picture.paste((250, 250, 250, alpha), (20, 10, 70, 50))
            picture.putpixel((5, 5), (0, 0, 0, alpha // 4))  # what is left of a shadow
            pipeline.generate([ask(None, image=picture)])
            (cutout,) = cutouts
            cutouts.clear()
            rows, columns = torch.nonzero(cutout[3] > alpha / 510, as_tuple=True)
            assert (int(columns.max() - columns.min()) + 1, int(rows.max() - rows.min()) + 1) == (51, 41)
            assert torch.allclose(cutout[3, 32, 32], torch.tensor(alpha / 255))
            assert torch.allclose(cutout[:3, 32, 32], torch.tensor(250 / 255))

    def test_cut_out_pictures_and_others_go_together(self, pipeline):
        opaque = Image.new("RGBA", (90, 60), "white")
        opaque.paste((0, 0, 255), (20, 10, 70, 50))
        cut_out = Image.new("RGBA", (90, 60))
        cut_out.paste((255, 0, 0), (20, 10, 70, 50))
        first, second, third = pipeline.generate([ask(None, image=opaque), ask(None, image=cut_out), ask("green")])
        assert first.report.score > 0.9
        assert second.ply
        assert third.ply

    def test_nothing_in_it_is_told_before_anything_is_optimised(self, pipeline, sculptor):
        for picture in (Image.new("RGBA", (40, 40)), Image.new("RGB", (40, 40), "white")):
            (asset,) = pipeline.generate([ask(None, image=picture)])
            assert asset.ply == b""
            assert asset.report.hopeless
        assert sculptor.batches == []
