"""Triton kernels of fastdiff, imported as `fastdiff.kernels`.

One file per op, named as the op is in `fastdiff/ops/`, holding its @triton.jit kernels and one launcher with exactly
the op's signature; the other files hold what several ops share, or a part of a long one. `fastdiff/ops/<op>.py` names
the launcher in its `Op(...)` record, "fastdiff.kernels.<op>:<op>", and it is imported only when the op is bound to the
"triton" backend: importing fastdiff never imports Triton.
"""

# setup.py maps this folder to fastdiff.kernels. Run from the repository's root it could also be found as `kernels`,
# the name of a package on PyPI, and would be taken for that one.
if __name__ != "fastdiff.kernels":
    raise ImportError(
        "fastdiff.kernels: this folder of Triton kernels cannot be imported under another name "
        f"(got {__name__!r}); import fastdiff.kernels, after `pip install -e .`; "
        "for the PyPI package `kernels`, run from another folder"
    )
