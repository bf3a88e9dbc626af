"""The checks of `tools/gpu_check.py`: functions without arguments that note what they find."""
