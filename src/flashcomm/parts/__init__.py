"""Parts of one forward pass that take turns at the sums over ranks: the core of every overlap."""
