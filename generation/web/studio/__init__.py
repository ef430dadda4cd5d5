"""Studio: a page to make splats, watch them being made and turn them; and to see what the miner earns."""
