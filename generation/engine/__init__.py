"""The engine: its thread loads the pipeline and owns the device. Admission, batching, deadlines, cancellation."""
