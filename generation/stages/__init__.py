"""One stage each: text to image, background removal, self-check."""
