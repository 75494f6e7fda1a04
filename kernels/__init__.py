"""Triton kernels. They import torch and triton only; `flowfast/_triton.py` is the only module that imports them."""
