"""The validators' frame for splats: camera orbit, box size, view size."""

from __future__ import annotations

import math

VIEW_SIZE = 518  # pixels
ELEVATION, RADIUS, FOVY = 15.0, 2.5, 49.1  # degrees, world units, degrees
BOX_SIDE = 1.5  # world units: the longest side of a splat's bounding box
#: pixels per world unit at the centre of a view
PIXELS = VIEW_SIZE / (2 * math.tan(math.radians(FOVY) / 2)) / RADIUS
