"""NumPy's .npy files of strangers: arrays of numbers and dictionaries of them, and nothing that runs.

A pickle in such a file may name any function. Here it gets stand-ins for the few names that arrays of numbers need.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any

import numpy as np

from ovam_core.errors import InputError

MAX_ROWS = 256  # arrays of a dictionary


def read_npy(data: bytes, name: str) -> np.ndarray | dict[str, np.ndarray]:
    """The array of numbers of a .npy file, of one or two dimensions, or a dictionary of them, as `np.save` pickles one.

    data: the file's bytes. name: what to call it in errors. Raises InputError for anything else, before it is made.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = readers[version](file)
    except Exception:  # a literal_eval of a stranger's header has many ways to fail
        raise InputError(f"'{name}' is not a whole NumPy file (.npy).") from None
    if not dtype.hasobject:
        return _array(shape, fortran, dtype, data[file.tell() :], name)
    try:
        content = _NumbersOnly(file).load()
    except pickle.UnpicklingError as error:
        raise InputError(f"'{name}' is refused: {' '.join(str(error).split()).rstrip('.')}.") from None
    except Exception:
        raise InputError(f"'{name}' is not a whole NumPy file of a dictionary of arrays.") from None
    content = getattr(content, "value", content)
    if not isinstance(content, dict) or not content:
        raise InputError(f"'{name}' holds neither an array nor a dictionary of arrays of numbers.")
    if len(content) > MAX_ROWS or not all(isinstance(x, str) for x in content):
        raise InputError(f"'{name}' must hold at most {MAX_ROWS} arrays, each under the name of its class.")
    values = {key: getattr(stub, "value", None) for key, stub in content.items()}
    arrays = {key: value for key, value in values.items() if isinstance(value, np.ndarray)}
    if len(arrays) < len(values):
        raise InputError(f"'{name}' holds something other than arrays of numbers.")
    return arrays


def _array(shape: Any, fortran: bool, dtype: np.dtype, raw: bytes, name: str) -> np.ndarray:
    """Checked before anything is allocated: the header's shape is a stranger's."""
    if dtype.kind not in "fiu" or not isinstance(raw, bytes) or len(shape) > 2 or min(shape, default=1) < 1:
        raise InputError(f"'{name}' must hold arrays of numbers of one or two dimensions.")
    if math.prod(shape) * dtype.itemsize != len(raw):
        raise InputError(f"'{name}' is not whole: its numbers do not fill the shape {list(shape)}.")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


class _Dtype:
    """Stands for numpy.dtype while unpickling: remembers its code and byte order."""

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|O8?", code):
            raise pickle.UnpicklingError("it holds something other than numbers")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


class _Array:
    """Stands for numpy.ndarray and its maker while unpickling. `value`: the array, or an object array's one content.

    NumPy's own `__setstate__` is C code that trusts what it is given; this one does not.
    """

    def __init__(self, *_: Any):
        self.value: Any = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        if dtype.code.startswith("O"):  # np.save wraps a dictionary in an array of one object
            self.value = raw[0] if shape == () and len(raw) == 1 else None
        else:
            self.value = _array(shape, bool(fortran), np.dtype(dtype.order + dtype.code), raw, "the pickle")


# The names that a pickled array of numbers needs, of NumPy 1 and 2.
KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
}


class _NumbersOnly(pickle.Unpickler):
    """Gives harmless stand-ins for the names of KNOWN, and refuses every other."""

    def find_class(self, module: str, name: str) -> type:
        try:
            return KNOWN[module, name]
        except KeyError:
            wanted = f"{module}.{name}"[:80]
            raise pickle.UnpicklingError(f"it asks for {wanted!a}, and only arrays of numbers are read") from None
