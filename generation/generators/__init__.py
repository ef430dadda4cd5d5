"""The 3D methods. Each is a folder here and an entry in ``kinds``; what all of them are, says ``base``."""
