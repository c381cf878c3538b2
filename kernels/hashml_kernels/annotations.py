"""jaxtyping's names, or stand-ins where it is not installed.

The kernels and their bench run on any machine that has jax and numpy, as it is; where jaxtyping is
there too (it comes with hashml), annotations are real and the tests check them.
"""

from typing import TYPE_CHECKING, Any

from jax import Array as Array

if TYPE_CHECKING:
    from jaxtyping import Bool as Bool
    from jaxtyping import Float as Float
    from jaxtyping import Int as Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:

        class _Unchecked:
            def __class_getitem__(cls, _: Any) -> type[Array]:
                return Array

        Bool = Float = Int = _Unchecked
