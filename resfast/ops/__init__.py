"""Operators ``torch.ops.resfast.*``: one file for the face of each, one for each of its kernels."""
