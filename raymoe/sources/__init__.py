"""The sources of weights: local folders, Hub repositories, object stores, LoRA adapters.

Headers are read, never tensors.
"""
