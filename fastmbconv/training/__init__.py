"""Training EfficientNet on pictures: the paper's recipe, resumable bit for bit, on one process or many.

Needs the `train` extra. The command `fastmbconv train` is a thin layer over `Config` and `Trainer`.
"""
