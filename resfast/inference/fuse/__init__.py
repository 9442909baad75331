"""A trained network as a graph of fused convolutions: :func:`fuse`.

The network is traced with ``torch.fx``, or with ``torch.export`` if its control flow depends on the
data, and in-place operations are replaced by out-of-place ones, so that operations can be
reordered. Each convolution is then fused with the operations after it, if nothing else reads the
values in between: the batch norm (folded into the weights, Jacob et al., arXiv:1712.05877, section
3.2), the addition of a residual and the activation. A max pool is moved after an increasing norm
or activation, which then directly follows the convolution, and a norm before an average pool. Norms
that no convolution before them can take in become part of the layers after them, or of one
operation with what surrounds them.
"""

from resfast.inference.fuse.model import FusedModel
from resfast.inference.fuse.nodes import DTYPES
from resfast.inference.fuse.pipeline import fuse
from resfast.inference.fuse.report import FusionReport

__all__ = ["DTYPES", "FusedModel", "FusionReport", "fuse"]
