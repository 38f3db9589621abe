"""From the ways in which a request names layers to the numbers of layers of the loaded model."""

from steering.artifacts.payload import Payload
from steering.language.errors import InvalidSpec
from steering.language.layers import LayerDepth, LayerRange, Layers
from steering.models.facts import ModelFacts


def explicit_layers(layers: Layers, facts: ModelFacts) -> list[int]:
    """Layer numbers in the order given, checked against the model."""
    if layers == "all":
        return list(range(facts.num_layers))
    if isinstance(layers, LayerRange):
        if layers.stop > facts.num_layers:
            facts.check_layer(layers.stop - 1, ("layers", "stop"))
        if layers.start < -facts.num_layers:
            facts.check_layer(layers.start, ("layers", "start"))
        start, stop = (n + facts.num_layers if n < 0 else n for n in (layers.start, layers.stop))
        found = list(range(start, stop, layers.step))
        if not found:
            raise InvalidSpec("the range holds no layer", param="layers")
        return found
    if isinstance(layers, LayerDepth):
        low, high = layers.depth
        found = [n for n in range(facts.num_layers) if low <= n / facts.num_layers < high]
        if not found:
            raise InvalidSpec(f"no layer of {facts.num_layers} lies in depth [{low}, {high})",
                              param=("layers", "depth"))
        return found
    found = [facts.check_layer(n, ("layers", i)) for i, n in enumerate(layers)]
    if len(set(found)) < len(found):
        raise InvalidSpec("a layer is named twice", param="layers")
    return found


def layers_with_numbers(layers: Layers | None, payload: Payload, facts: ModelFacts) -> list[int]:
    """Layers to act at. "all", depth and no layers at all mean those that the artifact has numbers for."""
    held = [facts.check_layer(n, "layers") for n in payload.layers]
    if layers is None or layers == "all":
        return held
    found = explicit_layers(layers, facts)
    if isinstance(layers, LayerDepth):
        found = [n for n in found if n in payload.layers]
    missing = [n for n in found if n not in payload.layers]
    if missing or not found:
        raise InvalidSpec(f"there are no numbers for layer {missing[0]}" if missing else "no layer is left",
                          param="layers", fix=f"Layers with numbers: {', '.join(map(str, held))}.")
    return found
