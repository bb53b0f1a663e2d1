"""All ops. Adding one: a class in a module here (imported below), its code in each target's codegen."""

from ..op import OPS
from .attention import Append, Attend
from .elementwise import Add, Clamp, ElementwiseOp, GeluTanh, Mul, Scale, Shift, Sigmoid, Silu, Softcap
from .experts import Combine, ExpertLinear
from .linear import Embed, Linear, MatrixOp, Reorder, Select
from .norm import HeadNorm, RmsNorm
from .output import Commit, Guess, Sample
from .rope import Rope, RopeAngles
from .route import GroupLimit, Normalize, Softmax, TopK

__all__ = [
    "OPS", "Add", "Append", "Attend", "Clamp", "Combine", "Commit", "ElementwiseOp", "Embed", "ExpertLinear",
    "GeluTanh", "GroupLimit", "Guess", "HeadNorm", "Linear", "MatrixOp", "Mul", "Normalize", "Reorder", "RmsNorm",
    "Rope", "RopeAngles", "Sample", "Scale", "Select", "Shift", "Sigmoid", "Silu", "Softcap", "Softmax", "TopK",
]  # fmt: skip
