"""Where weights come from: local folders, Hub repositories, LoRA adapters. Headers are read, never tensors."""
