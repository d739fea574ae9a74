"""The GPU runs without a GPU: real compilation, real host paths, a device that computes nothing."""
