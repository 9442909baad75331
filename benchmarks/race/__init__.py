"""Others' training scripts against our recipes, on the same device and images."""
