"""The frame in which validators look at splats, and how large it is in their views."""

from __future__ import annotations

import math

VIEW_SIZE = 518  # pixels
ELEVATION, RADIUS, FOVY = 15.0, 2.5, 49.1  # degrees, world units, degrees
BOX_SIDE = 1.5  # world units: the longest side of a splat's bounding box
#: pixels of a world unit in the middle of the frame
PIXELS = VIEW_SIZE / (2 * math.tan(math.radians(FOVY) / 2)) / RADIUS
