"""How torch functions act on a Dual. Importing this module registers every rule.

========================  ==================================================================================
module                    functions
========================  ==================================================================================
``structural``            views, shapes, joins
``creation``              casts, and tensors made like a Dual
``pointwise``             arithmetic, unary mathematics, comparisons
``reductions``            sums, moments, extrema, norms, scans, softmax family
``matmul``                products
``indexing``              reads and writes by index
``normalisation``         layer, RMS, group, instance and batch norm
``layers``                embedding, dropout, activations, pooling
``losses``                cross-entropy and other losses, distances
``convolution``           convolution in one to three dimensions and its transpose
``composites``            attention and torch's Python composites
``complex``               complex numbers, Fourier transforms
``linalg``                solutions, determinants, decompositions
``copies``                splits by axis, ``as_strided``, and the copies of views
``fallback``              the allow-list of the generic rule, and what is barred from it
``guards``                places where a Dual would silently lose its derivative
``functions``             autograd Functions of models, by name
``sharded``               Duals that are sharded over processes
``inplace``               in-place forms of all of the above
``torch_check``           values and gradients on an untested torch, at the first ``dual()``
========================  ==================================================================================
"""

# ruff: noqa: F401
from . import structural, creation, pointwise, reductions, matmul, indexing  # isort: skip
from . import normalisation, layers, losses, convolution, composites, fallback, linalg, complex  # isort: skip
from . import copies, guards, functions, sharded, inplace, torch_check  # isort: skip

# Order matters above: activations replace the pointwise rules of the same name, the fallback covers functions without a
# rule, and the in-place forms are generated from all of them.
copies.register()
complex.register()
inplace.register()
