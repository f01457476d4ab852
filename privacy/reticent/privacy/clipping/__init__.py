"""Clipped sums of per-example gradients: flat or per-layer bounds, hooks or ghost norms.

========================  ====================================================================
module                    what it holds
========================  ====================================================================
:mod:`.sums`              :class:`ClippedGradients`: the guarantee, micro-batches, masks
:mod:`.own`               :class:`OwnGradients`: the same where every owner has its own weights
:mod:`.own_layers`        the layers of chains, applied with each owner's weights
:mod:`.bounds`            how long one example's gradient may be, tensor by tensor
:mod:`.terms`             gradients of single examples, as rows or as outer products
:mod:`.hooks`             any model: rows, from Opacus' hooks
:mod:`.ghost`             plain chains of layers: norms without the gradients, one backward pass
:mod:`.layers`            the layers of such chains, forward and backward
:mod:`.recurrent`         LSTM and GRU in such chains
========================  ====================================================================
"""

from .ghost import chain_of
from .own import OwnGradients, own_chain_of
from .sums import ClippedGradients, Loss

__all__ = ["ClippedGradients", "Loss", "OwnGradients", "chain_of", "own_chain_of"]
