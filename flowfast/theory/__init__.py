"""The theorems of arXiv 2606.03820 as objects that run: networks that are built, not trained, beside their bounds."""
