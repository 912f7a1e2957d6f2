"""Triton's interpreter, a third faster."""

import os

import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang

    def _patch_once(fn):
        # It looks through all of the language at each call of a function in a kernel, although the kernel's start has
        # replaced everything already.
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return _patch(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_once
