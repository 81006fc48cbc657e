"""Triton kernels of fastdiff, imported as `fastdiff.kernels`.

One file per op, named as the op is in `fastdiff/ops/`, holding its @triton.jit kernels and one launcher with exactly the
op's signature. `fastdiff/ops/<op>.py` names the launcher in its `Op(...)` record, as "fastdiff.kernels.<op>:<op>", and
imports it only when the op is bound to the "triton" backend: importing fastdiff never imports Triton.
"""

# setup.py maps this folder to fastdiff.kernels. Run from the repository's root it could also be found as plain `kernels`,
# the name of a package on PyPI, which would then get this one in place of the one that it asked for.
if __name__ != "fastdiff.kernels":
    raise ImportError(
        f"{__name__}: this folder holds fastdiff's Triton kernels (got the import name {__name__!r}); its import name is "
        "fastdiff.kernels; install fastdiff (`pip install -e .`) and import that, or run from another folder to import "
        "the package `kernels` from PyPI"
    )
