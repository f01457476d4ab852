"""Clipped sums of per-example gradients: flat or per-layer bounds, ways to compute them.

========================  ====================================================================
module                    what it holds
========================  ====================================================================
:mod:`.sums`              :class:`ClippedGradients`: the guarantee, micro-batches, masks
:mod:`.own`               :class:`OwnGradients`: the same where every owner has its own weights
:mod:`.own_layers`        the layers of chains, applied with each owner's weights
:mod:`.functional`        :class:`FunctionalGradients`: the same of any student, on any device
:mod:`.functional_trial`  whether that is right, on random inputs
:mod:`.vmapped`           tables and recurrent layers for its ``vmap``
:mod:`.bounds`            how long one example's gradient may be, tensor by tensor
:mod:`.choice`            which way a student's gradients are computed
:mod:`.terms`             gradients of single examples, as rows or as outer products
:mod:`.positions`         gradients of layers that are used at many positions of each example
:mod:`.hooks`             any model: rows, from Opacus' hooks
:mod:`.ghost`             plain chains of layers: norms without the gradients, one backward pass
:mod:`.layers`            the layers of such chains, forward and backward
:mod:`.recurrent`         LSTM and GRU in such chains
:mod:`.graph`             known layers joined in any way: one recorded pass
:mod:`.trial`             whether that is right, and whether examples mix, on random inputs
========================  ====================================================================
"""

from .choice import method_of
from .functional import FunctionalGradients
from .functional_trial import unfit
from .ghost import chain_of
from .own import OwnGradients, own_chain_of
from .sums import ClippedGradients, Loss

__all__ = [
    "ClippedGradients",
    "FunctionalGradients",
    "Loss",
    "OwnGradients",
    "chain_of",
    "method_of",
    "own_chain_of",
    "unfit",
]
