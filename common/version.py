"""The version of this software: releases are listed in CHANGELOG.md."""

VERSION = "0.2.0"
