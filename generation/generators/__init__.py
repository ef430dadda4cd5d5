"""Methods that make Gaussians from words and a picture: a folder each."""
