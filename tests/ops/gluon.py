"""Runs Gluon kernels without a GPU, as Triton's interpreter cannot: their source, with NumPy in place of the chip.

Every warp group is a thread, and barriers of shared memory count as the chip's do. What is asynchronous happens as late
as it may: matmuls and stores read their operands when they are waited for. Registers, layouts and proxies are not
modelled.
"""

import ast
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PATIENCE = 20.0
"""Seconds that a barrier may keep a warp group waiting before that is called a deadlock."""


def load(paths: list[Path], kernel: str, seed: int = 0, **names: Any) -> Callable:
    """The function `kernel` of some files: call it with Pointers, Boxes, numbers, and `programs=`.

    `names`: what the files import and is none of Gluon's, nor in another of them; constants in place of theirs.
    """
    tree = _Rewrite().visit(ast.parse("\n".join(path.read_text() for path in paths)))
    tree.body = [n for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom | ast.ClassDef)]
    for n in tree.body:
        if isinstance(n, ast.FunctionDef):
            n.returns = None
            if not n.decorator_list:  # wrappers are not run
                n.body = [ast.Pass()]
            for argument in n.args.args + n.args.kwonlyargs:
                argument.annotation = None
    machine = _Machine(seed)
    scope = machine.names() | names
    exec(compile(ast.fix_missing_locations(tree), kernel, "exec"), scope)
    scope |= names

    def launch(*args: Any, programs: int, **constants: Any) -> None:
        machine.run(programs, lambda: scope[kernel](*args, **constants))

    return launch


class _Rewrite(ast.NodeTransformer):
    """What Triton's scalars have and Python's lack: `.to`, division that rounds to zero, values that never alias."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return ast.Call(ast.Name("_to", ast.Load()), [node.func.value, *node.args], [])
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        name = {ast.FloorDiv: "_div", ast.Mod: "_mod"}.get(type(node.op))
        return ast.Call(ast.Name(name, ast.Load()), [node.left, node.right], []) if name else node

    def visit_AugAssign(self, node):
        read = ast.parse(ast.unparse(node.target), mode="eval").body
        return self.visit(ast.Assign([node.target], ast.BinOp(read, node.op, node.value)))


class Pointer:
    """Addresses of elements of one array; an access outside of it is an error."""

    def __init__(self, memory: np.ndarray, at: Any = 0):
        self.memory, self.at = memory, at
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, np.asarray(self.at, np.int64) + offset)

    def read(self, mask: Any, other: Any) -> np.ndarray:
        at, mask = np.broadcast_arrays(self.at, True if mask is None else mask)
        self.inside(at, mask)
        return np.where(mask, self.memory.reshape(-1)[np.where(mask, at, 0)], np.asarray(other, self.memory.dtype))

    def write(self, value: Any, mask: Any) -> None:
        at, mask, value = np.broadcast_arrays(self.at, True if mask is None else mask, value)
        self.inside(at, mask)
        self.memory.reshape(-1)[at[mask]] = value[mask]

    def inside(self, at: np.ndarray, mask: np.ndarray) -> None:
        if (mask & ((at < 0) | (at >= self.memory.size))).any():
            raise IndexError(f"an address outside of {self.memory.shape}")


class Boxes:
    """What stands for a tensor map: a matrix, of which the copy engine brings and takes boxes; zeros lie around it."""

    layout = None

    def __init__(self, matrix: np.ndarray, box: list[int]):
        self.matrix, self.block_shape, self.dtype = matrix, box, matrix.dtype
        self.block_type = SimpleNamespace(nbytes=box[0] * box[1] * matrix.itemsize)

    def at(self, corner: list[int]) -> np.ndarray:
        """The part of a box that is within the matrix."""
        (row, column), (high, across) = map(int, corner), self.block_shape
        if row < 0 or column < 0:
            raise IndexError(f"a box at {row}, {column}")
        return self.matrix[row : row + high, column : column + across]


class _Shared:
    def __init__(self, view: np.ndarray):
        self.view, self.dtype, self.shape = view, view.dtype, view.shape

    def index(self, i: int) -> "_Shared":
        if not 0 <= i < len(self.view):
            raise IndexError(f"buffer {i} of {len(self.view)}")
        return _Shared(self.view[int(i)])

    def permute(self, order: tuple) -> "_Shared":
        return _Shared(self.view.transpose(order))

    def slice(self, first: int, length: int, dim: int) -> "_Shared":
        assert dim == 0 and first + length <= len(self.view)
        return _Shared(self.view[first : first + length])

    def store(self, value: Any) -> None:
        self.view[...] = value

    def load(self, layout: Any) -> np.ndarray:
        return self.view.copy()


class _Product:
    """A matmul under way: it reads shared memory when it is waited for."""

    def __init__(self, a: Any, b: _Shared, acc: Any):
        self.a, self.b, self.acc, self.value = a, b, acc, None

    def finish(self) -> None:
        a = self.a.view if isinstance(self.a, _Shared) else self.a
        acc = self.acc.value if isinstance(self.acc, _Product) else self.acc
        self.value = acc + a.astype(np.float32) @ self.b.view.astype(np.float32)


class _Bar:
    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, count: int = 0, expected: int = 0) -> None:
        self.pending -= count
        self.bytes += expected
        if self.pending < 0:
            raise RuntimeError("more arrivals than a barrier counts")
        if self.pending == self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


class _Constant(int):
    value = property(int)


class _Machine:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.here = threading.local()
        self.changed = threading.Condition()
        self.failed: list[BaseException] = []

    def run(self, programs: int, work: Callable[[], None]) -> None:
        def one(program: int) -> None:
            self.here.program, self.here.programs, self.here.pending = program, programs, []
            work()

        self.side_by_side([lambda p=p: one(p) for p in range(programs)])
        if self.failed:
            raise self.failed[0]

    def side_by_side(self, jobs: list[Callable[[], None]]) -> None:
        def guarded(job: Callable[[], None]) -> None:
            try:
                job()
            except BaseException as error:
                with self.changed:
                    self.failed.append(error)
                    self.changed.notify_all()

        threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def specialize(self, parts: list, warps: list, registers: list) -> None:
        where = self.here.program, self.here.programs

        def one(function: Callable, args: tuple) -> None:
            self.here.program, self.here.programs = where
            self.here.pending, self.here.stores = [], []
            function(*args)
            assert not self.here.pending, "a matmul that nobody waited for"
            assert not self.here.stores, "a store that nobody waited for"

        self.side_by_side([lambda part=part: one(*part) for part in parts])

    def switch(self) -> None:
        if self.random.random() < 0.3:
            time.sleep(self.random.random() * 2e-4)

    def arrive(self, bar: _Shared, count: int = 0, expected: int = 0) -> None:
        self.switch()
        with self.changed:
            bar.view[0].arrive(count, expected)
            self.changed.notify_all()

    def wait(self, bar: _Shared, parity: int) -> None:
        self.switch()
        with self.changed:
            passed = self.changed.wait_for(lambda: self.failed or bar.view[0].phase % 2 != parity, PATIENCE)
        if self.failed:
            raise RuntimeError("another warp group failed")
        if not passed:
            raise TimeoutError(f"deadlock: a barrier of {bar.view[0].count} in phase {bar.view[0].phase}")

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> _Shared:
        if dtype == "barrier":
            view = np.empty(shape, object)
        else:
            view = np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 1 << 30, dtype)
        return _Shared(view)

    def init(self, bar: _Shared, count: int) -> None:
        bar.view[0] = _Bar(count)

    def box(self, boxes: Boxes, corner: list[int], bar: _Shared, to: _Shared) -> None:
        part = boxes.at(corner)
        to.view[...] = 0
        to.view[: part.shape[0], : part.shape[1]] = part
        self.arrive(bar, expected=-boxes.block_type.nbytes)

    def store_box(self, boxes: Boxes, corner: list[int], source: _Shared) -> None:
        self.here.stores.append((boxes.at(corner), source))

    def store_wait(self, outstanding: int) -> None:
        stores = self.here.stores
        while len(stores) > outstanding:
            part, source = stores.pop(0)
            part[...] = source.view[: part.shape[0], : part.shape[1]]

    def multiply(self, a: Any, b: _Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> _Product:
        product = _Product(a, b, acc if use_acc else 0)
        self.here.pending.append(product)
        return product

    def finish(self, outstanding: int, deps: tuple) -> Any:
        pending = self.here.pending
        while len(pending) > outstanding:
            self.switch()
            pending.pop(0).finish()
        found = tuple(d if d.value is None else d.value for d in deps)  # a product under way is no array yet
        return found[0] if len(deps) == 1 else found

    def add(self, at: Pointer, value: int, sem: str, scope: str) -> int:
        self.switch()
        with self.changed:
            old = int(at.read(None, 0))
            at.write(old + value, None)
        return old

    def names(self) -> dict[str, Any]:
        gl = SimpleNamespace(
            constexpr=_Constant, int32=np.int32, int64="barrier", float32=np.float32, bfloat16=np.float32,
            float16=np.float32, barrier=lambda: None, warp_specialize=self.specialize, atomic_add=self.add,
            allocate_shared_memory=self.allocate, static_range=range, to_tensor=int,
            program_id=lambda axis: self.here.program, num_programs=lambda axis: self.here.programs,
            load=lambda at, mask=None, other=0: at.read(mask, other),
            store=lambda at, value, mask=None: at.write(value, mask),
            arange=lambda a, b, layout: np.arange(a, b, dtype=np.int32),
            full=lambda shape, value, dtype, layout: np.full(shape, value, dtype),
            zeros=lambda shape, dtype, layout: np.zeros(shape, dtype),
            convert_layout=lambda x, layout: x, where=np.where, minimum=np.minimum, maximum=np.maximum, exp2=np.exp2,
            exp=np.exp, reshape=np.reshape, permute=np.transpose, split=lambda x: (x[..., 0], x[..., 1]),
            sum=lambda x, axis: x.sum(axis, dtype=x.dtype), max=lambda x, axis: x.max(axis),
            min=lambda x, axis: x.min(axis), SwizzledSharedLayout=_layout, SliceLayout=_layout, BlockedLayout=_layout,
            NVMMADistributedLayout=_layout, DotOperandLayout=_layout,
            NVMMASharedLayout=SimpleNamespace(get_default_for=_layout),
            shared_memory_descriptor=SimpleNamespace(
                reinterpret=lambda memory, dtype, shape, layout: _Shared(memory.view.reshape(shape))
            ),
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            MBarrierLayout=_layout, init=self.init, wait=self.wait, arrive=self.arrive,
            expect=lambda bar, size: self.arrive(bar, 1, size),
        )  # fmt: skip
        gather = lambda to, at, mask: to.store(at.read(mask, 0))  # noqa: E731
        copies = SimpleNamespace(async_load=gather, mbarrier_arrive=lambda bar: self.switch())
        return {
            "gl": gl, "mbarrier": mbarrier, "async_copy": copies,
            "tma": SimpleNamespace(async_load=self.box, async_store=self.store_box, store_wait=self.store_wait),
            "gluon": SimpleNamespace(jit=_jit, constexpr_function=_jit), "fence_async_shared": lambda: None,
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.finish, "_to": _to, "_div": _div, "_mod": _mod,
        }  # fmt: skip


def _layout(*args: Any, **kwargs: Any) -> None:
    return None


def _jit(function: Callable | None = None, **options: Any) -> Callable:
    return function or (lambda f: f)


def _to(x: Any, dtype: Any) -> Any:
    return np.asarray(x).astype(np.int64 if isinstance(dtype, str) else dtype)


def _div(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // b if a >= 0 else -(-a // b)
    return np.where(np.asarray(a) >= 0, np.abs(a) // b, -(np.abs(a) // b)).astype(np.result_type(a))


def _mod(a: Any, b: Any) -> Any:
    return a - _div(a, b) * b
