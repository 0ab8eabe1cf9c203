"""Array kernels: no names, no files, nothing that knows what a matrix stands for.

Shapes: ``B`` is ``(..., d_out, r)``, ``A`` is ``(..., r, d_in)``; bases have orthonormal columns.
"""

from lora_analysis.linalg.arrays import (
    EPS,
    is_array,
    is_tensor,
    is_torch_module,
    missing_values,
    stored_values,
    to_numpy,
)
from lora_analysis.linalg.dense import (
    DENSE_SVD_LIMIT,
    gram_seconds,
    gram_svd,
    leading_singular_values,
    leading_svd,
    thin_left_product,
    thin_product,
    whole_svd,
)
from lora_analysis.linalg.factored import (
    FactoredSVD,
    column_signs,
    factored_singular_values,
    factored_svd,
    kronecker_svd,
    tall_svd,
)
from lora_analysis.linalg.joint import JointSVD, joint_gram, joint_svd
from lora_analysis.linalg.krylov import DenseSVD, Operator, krylov_svd
from lora_analysis.linalg.modified import modified_svd
from lora_analysis.linalg.overlaps import (
    cumulative_overlap,
    haar_frame,
    overlap_grid,
    principal_angles,
)

__all__ = [
    "DENSE_SVD_LIMIT",
    "EPS",
    "DenseSVD",
    "FactoredSVD",
    "JointSVD",
    "Operator",
    "column_signs",
    "cumulative_overlap",
    "factored_singular_values",
    "factored_svd",
    "gram_seconds",
    "gram_svd",
    "haar_frame",
    "is_array",
    "is_tensor",
    "is_torch_module",
    "joint_gram",
    "joint_svd",
    "kronecker_svd",
    "krylov_svd",
    "leading_singular_values",
    "leading_svd",
    "missing_values",
    "modified_svd",
    "overlap_grid",
    "principal_angles",
    "stored_values",
    "tall_svd",
    "thin_left_product",
    "thin_product",
    "to_numpy",
    "whole_svd",
]
