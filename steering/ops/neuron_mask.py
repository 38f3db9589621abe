"""Zero, set or scale MLP neurons, as those of a relation are switched off (Liu et al. 2025, arXiv 2502.17355)."""

from steering.ops.mask import IndexMask


class NeuronMask(IndexMask):
    name = "neuron_mask"
    kinds = ("neuron_set",)
    sites = ("mlp_act",)
    index_name = "neurons"


OPERATION = NeuronMask()
