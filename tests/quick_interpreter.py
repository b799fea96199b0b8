"""Triton's interpreter without what it does again at every call of a helper: a third of its time.

Before a kernel runs, it puts functions of its own into the modules of the language, and takes them out after.
A helper that the kernel calls finds them there, and searches all names of these modules anew.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Let a module whose functions are the interpreter's already be as it is."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_what_is_not(function: Any) -> Any:
        modules = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_what_is_not
