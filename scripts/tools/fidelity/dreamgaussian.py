"""DreamGaussian's cameras and learning rates."""

from __future__ import annotations

import importlib

import torch

from generation.generators.dreamgaussian.schedule import position_lr
from generation.splats.cameras import orbit
from scripts.tools.fidelity.comparison import Comparison, borrowed

ANGLES = [(-80.0, -170.0), (-30.0, 0.0), (0.0, 0.0), (0.0, 90.0), (15.0, 135.0), (45.0, -60.0), (79.0, 179.0)]


def cameras(comparison: Comparison) -> None:
    """Angles with the authors' sign of elevation: negative looks down."""
    with borrowed(comparison.authors / "dreamgaussian", "scipy", "scipy.spatial", "scipy.spatial.transform"):
        module = importlib.import_module("cam_utils")
        theirs = torch.stack([torch.from_numpy(module.orbit_camera(e, a, 2.0)) for e, a in ANGLES])
        focal = module.OrbitCamera(256, 256, r=2.0, fovy=49.1).intrinsics
    elevations, azimuths = (torch.tensor(column) for column in zip(*ANGLES, strict=True))
    ours = orbit(-elevations, azimuths, 2.0, 49.1, 256, 256)
    comparison.add(f"DreamGaussian orbit cameras, {len(ANGLES)} poses", theirs, ours.camera_to_world)
    K = ours.Ks[0]
    comparison.add(
        "their focal lengths and centre", torch.from_numpy(focal), torch.stack([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
    )
    comparison.golden("orbit", {"angles": torch.tensor(ANGLES), "poses": theirs})


def learning_rates(comparison: Comparison) -> None:
    unused = ("diff_gaussian_rasterization", "simple_knn", "simple_knn._C", "mesh", "mesh_utils", "kiui")
    with borrowed(comparison.authors / "dreamgaussian", *unused):
        make = importlib.import_module("gs_renderer").get_expon_lr_func
        schedule = make(lr_init=0.001, lr_final=0.00002, lr_delay_mult=0.02, max_steps=300)
        theirs = torch.tensor([schedule(step) for step in range(1, 501)])
    ours = torch.tensor([position_lr(step, 0.001, 0.00002, 300) for step in range(1, 501)])
    comparison.add("DreamGaussian learning rate of positions, 500 steps", theirs, ours)
    comparison.golden("learning_rate", {"rates": theirs[::20]})
