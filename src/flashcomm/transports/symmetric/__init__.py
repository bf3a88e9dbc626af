"""GPU memory that peers write to: all-reduces in one launch."""
