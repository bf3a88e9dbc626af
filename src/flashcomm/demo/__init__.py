"""`flashcomm demo`: the bundled model over ranks of this machine, every codec side by side."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
