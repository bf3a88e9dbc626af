"""Cut the layers of a decoder into pipeline stages, as vLLM cuts them.

Source: `get_pp_indices` of vLLM 0.32, without its environment variable.
"""


def layers_of_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Number of layers of each pipeline stage, in order.

    Layers that are left over go to the stages before the last one, which has the product with the vocabulary too.

    Args:
        layers: of the model.
        stages: 1 or more.

    Raises:
        ValueError: stages without a layer.

    >>> layers_of_stages(32, 4), layers_of_stages(30, 4)
    ((8, 8, 8, 8), (7, 8, 8, 7))
    """
    if not 1 <= stages <= layers:
        raise ValueError(f"{stages} pipeline stages of {layers} layers: give 1 to {layers}, so that each has a layer")
    each, left = divmod(layers, stages)
    return tuple(each + (stages - 1 - left <= stage < stages - 1) for stage in range(stages))
