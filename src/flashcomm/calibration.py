"""Calibrations: the reach of each feature, for every sum of one model, on each rank and in total; kept in a file.

    flashcomm calibrate MODEL --tp 4 --out model.calibration
    compress(model, "int4g128+keep64", calibration="model.calibration")

`flashcomm.integrations.transformers.calibrate` makes one; the codecs that need it are in `flashcomm.codecs.calibrated`.

Source: Towards Low-bit Communication for TP LLM Inference (arXiv 2411.07942): moving averages over real text.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from flashcomm.codecs import Codec, Features, parse

_FORMAT = "flashcomm-calibration-1"


class MovingReach:
    """Moving averages of the smallest and the largest value of each feature, over batches of one sum's input.

    Args:
        gamma: weight of a new batch; the first batch starts the averages.

    >>> reach = MovingReach(gamma=0.5)
    >>> reach.add(torch.tensor([[1.0, -4.0], [3.0, 0.0]]))
    >>> reach.add(torch.tensor([[1.0, 0.0]]))
    >>> reach.result().tolist()
    [2.0, 2.0]
    """

    def __init__(self, gamma: float = 0.01):
        self.gamma = gamma
        self._low_and_high: torch.Tensor | None = None

    def add(self, x: torch.Tensor):
        """Add a batch, [tokens, features]."""
        new = torch.stack([x.amin(0), x.amax(0)]).float()
        old = self._low_and_high
        self._low_and_high = new if old is None else (1 - self.gamma) * old + self.gamma * new

    def result(self) -> torch.Tensor:
        """fp32 [features]: the larger magnitude of the two averages."""
        assert self._low_and_high is not None
        return self._low_and_high.abs().amax(0)


class Calibration:
    """The `Features` of every sum of one model, by the name of the module whose output is summed.

    Args:
        features: those of each sum, by the name of its module.
        origin: model and text that were calibrated, in words; kept in the file.

    >>> calibration = Calibration({"mlp": Features(torch.ones(3, 64))})
    >>> str(calibration.bind("int4g32+keep64", "mlp", rank=1, ranks=2))
    'int4g32+keep64'
    """

    def __init__(self, features: Mapping[str, Features], origin: str = ""):
        self.features, self.origin = dict(features), origin

    def bind(self, codec: "str | Codec", module: str, *, rank: int, ranks: int) -> Codec:
        """Bind `codec` to the sum of one module, as `rank` encodes it. Codecs that need no calibration are not changed.

        Raises:
            ValueError: a module that was not calibrated, or a calibration on another number of ranks.
        """
        codec = parse(codec)
        if not codec.unbound:
            return codec
        known = self.features.get(module)
        if known is None:
            raise ValueError(f"module {module!r} was not calibrated. Calibrated: {', '.join(sorted(self.features))}")
        if known.ranks != ranks:
            raise ValueError(
                f"this calibration is of {known.ranks} ranks and the group has {ranks}: "
                f"run 'flashcomm calibrate MODEL --tp {ranks}'"
            )
        return codec.bind(known, rank)

    def save(self, path: "str | Path"):
        """Write a safetensors file, bf16: about 2 bytes per module, rank and feature."""
        from safetensors.torch import save_file

        # One entry of metadata: the order of several would differ from process to process.
        tensors = {name: features.reach.to(torch.bfloat16) for name, features in self.features.items()}
        save_file(tensors, str(path), metadata={_FORMAT: self.origin})

    @classmethod
    def load(cls, path: "str | Path") -> "Calibration":
        """Read what `save` wrote.

        Raises:
            ValueError: a file that cannot be read or is not a calibration.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if _FORMAT in metadata:
                    features = {name: Features(file.get_tensor(name).float()) for name in file.keys()}  # noqa: SIM118
                    return cls(features, metadata[_FORMAT])
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the calibration {str(path)!r}: {error}") from error
        raise ValueError(f"{str(path)!r} is not a calibration: make one with 'flashcomm calibrate MODEL'")
