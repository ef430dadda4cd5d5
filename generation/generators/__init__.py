"""The 3D generators: each is a folder here and an entry in ``kinds``. Their protocol is in ``base``."""
