"""scripts.tools.contact_sheet: what it makes of files that hold no splat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from generation.splats import ply
from generation.splats.gaussians import Gaussians
from scripts.tools import contact_sheet


def ball() -> bytes:
    count = 40
    generator = torch.Generator().manual_seed(1)
    return ply.write(
        Gaussians(
            means=torch.randn(count, 3, generator=generator) * 0.2,
            quats=torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(count, 1),
            log_scales=torch.full((count, 3), -3.0),
            logit_opacities=torch.full((count,), 4.0),
            sh=torch.zeros(count, 1, 3),
        )
    )


def test_an_empty_file_among_others_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ball.ply").write_bytes(ball())
    (tmp_path / "held_back.ply").write_bytes(b"")
    names = [str(tmp_path / name) for name in ("sheet.png", "held_back.ply", "ball.ply")]
    monkeypatch.setattr("sys.argv", ["contact_sheet", *names])
    contact_sheet.main()
    said = capsys.readouterr()
    assert "held_back.ply: empty, left out" in said.err
    assert said.out == f"{tmp_path}/sheet.png: ball.ply, a row each, from eight sides\n"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 1.2 * contact_sheet.SIZE  # one row


def test_empty_files_alone_make_no_sheet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held_back.ply").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["contact_sheet", str(tmp_path / "sheet.png"), str(tmp_path / "held_back.ply")])
    with pytest.raises(SystemExit) as ended:
        contact_sheet.main()
    assert ended.value.code == 2
    assert "no splat among these files" in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()
