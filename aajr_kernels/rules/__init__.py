"""How torch functions act on a Dual. Importing this package registers every rule with the runtime.

========================  ==================================================================================
module                    functions
========================  ==================================================================================
``structural``            views, shapes, joins, casts, creation
``pointwise``             arithmetic, unary mathematics, comparisons
``reductions``            sums, moments, extrema, norms, scans, softmax family
``matmul``                products
``indexing``              reads and writes by index
``layers``                convolution, embedding, dropout, normalisation, activations, losses, pooling
``composites``            attention and torch's Python composites
``fallback``              the allow-list of the generic rule, and what is barred from it
``inplace``               in-place forms of all of the above
========================  ==================================================================================
"""

from . import indexing, inplace, matmul, pointwise, reductions, structural

__all__ = ["indexing", "inplace", "matmul", "pointwise", "reductions", "structural"]

inplace.register()
