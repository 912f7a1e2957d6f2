"""Makes triton's interpreter a third faster, when it is imported.

The interpreter replaces the language's functions when a kernel starts, and looks through the complete language again at
each call of a function in the kernel, although there is nothing left to replace.
"""

import os
from typing import Any

import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _patch_lang = interpreter._patch_lang

    def _patch_once(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return _patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _patch_once
