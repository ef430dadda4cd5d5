"""Admission, batching, deadlines, cancellation; owns the device thread."""
