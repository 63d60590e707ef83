"""Random calls of the codebook matmul, and an oracle of them in float64 NumPy, written from the docstring."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from rounding import epsilon, of_sum

from pallas_kernels.codebook_matmul import codebook_matmul


@dataclasses.dataclass(frozen=True)
class Problem:
    """x [m, d_in], a codebook [n, g], an index, dy [m, d_out], drawn from `seed`; `step_bits`: of a trellis index."""

    m: int
    d_in: int
    d_out: int
    n: int
    g: int
    axis: str
    dtype: str = "float32"
    codebook_dtype: str = ""
    seed: int = 0
    step_bits: int | None = None

    @property
    def pieces(self):
        """The shape of the codes."""
        return (self.d_in, -(-self.d_out // self.g)) if self.axis == "out" else (-(-self.d_in // self.g), self.d_out)

    def arrays(self):
        rng = np.random.default_rng(self.seed)
        x = jnp.asarray(rng.normal(size=(self.m, self.d_in)), self.dtype)
        codebook = jnp.asarray(rng.normal(size=(self.n, self.g)), self.codebook_dtype or self.dtype)
        if self.step_bits is None:
            index = rng.integers(0, self.n, self.pieces).astype(np.uint8 if self.n <= 256 else np.uint16)
        else:
            index = self.streams(rng)
        dy = jnp.asarray(rng.normal(size=(self.m, self.d_out)), self.dtype)
        return x, codebook, jnp.asarray(index), dy

    def streams(self, rng):
        """Returns words uint32 of random bits, also where a stream has no bits: nothing may depend on those."""
        along = 1 if self.axis == "out" else 0
        bits = int(np.log2(self.n)) + (self.pieces[along] - 1) * self.step_bits
        shape = (self.pieces[0], -(-bits // 32)) if self.axis == "out" else (-(-bits // 32), self.pieces[1])
        return rng.integers(0, 2**32, shape, dtype=np.uint32)

    def codes(self, index):
        """Returns the codes [pieces] of an index, NumPy; those of a stream from one Python integer a line."""
        if self.step_bits is None:
            return np.asarray(index)
        lines = np.asarray(index) if self.axis == "out" else np.asarray(index).T
        length = self.pieces[1 if self.axis == "out" else 0]
        streams = [sum(int(word) << 32 * place for place, word in enumerate(line)) for line in lines]
        codes = [[(stream >> self.step_bits * j) % self.n for j in range(length)] for stream in streams]
        return np.array(codes) if self.axis == "out" else np.array(codes).T

    @property
    def static(self):
        trellis = {} if self.step_bits is None else {"step_bits": self.step_bits}
        return {"shape": (self.d_in, self.d_out), "axis": self.axis} | trellis


@dataclasses.dataclass(frozen=True)
class Oracle:
    """y, dx and d_codebook in float64, and the sums of absolute terms of d_codebook."""

    y: np.ndarray
    dx: np.ndarray
    d_codebook: np.ndarray
    d_codebook_terms: np.ndarray

    @classmethod
    def of(cls, problem, x, codebook, index, dy):
        p = problem
        rounded = np.asarray(codebook.astype(x.dtype), np.float64)
        x, dy, index = np.asarray(x, np.float64), np.asarray(dy, np.float64), p.codes(index)
        w = np.empty((p.d_in, p.d_out))
        d_codebook, terms = np.zeros((2, p.n, p.g))
        gradient, absolute = x.T @ dy, np.abs(x).T @ np.abs(dy)
        for i in range(p.d_in):
            for o in range(p.d_out):
                if p.axis == "out":
                    code, t = index[i, o // p.g], o % p.g
                else:
                    code, t = index[i // p.g, o], i % p.g
                w[i, o] = rounded[code, t]
                d_codebook[code, t] += gradient[i, o]
                terms[code, t] += absolute[i, o]
        return cls(x @ w, dy @ w.T, d_codebook, terms)


def relative(found, expected, scale):
    return np.max(np.abs(np.asarray(found, np.float64) - expected) / np.maximum(scale, 1e-30))


def run(problem, arrays, **options):
    @jax.jit
    def call(x, codebook, index, dy):
        y, pull = jax.vjp(lambda x, c: codebook_matmul(x, c, index, **problem.static, **options), x, codebook)
        return y, *pull(dy)

    return call(*arrays)


def check(problem, arrays, results):
    oracle = Oracle.of(problem, *arrays)
    y, dx, d_codebook = results
    assert y.dtype == dx.dtype == arrays[0].dtype
    assert d_codebook.dtype == arrays[1].dtype
    # Sums are float32; what is rounded to the dtype of x, y or the codebook is rounded once.
    assert relative(y, oracle.y, np.abs(oracle.y).max()) <= of_sum(problem.d_in, result=problem.dtype)
    assert relative(dx, oracle.dx, np.abs(oracle.dx).max()) <= of_sum(problem.d_out, result=problem.dtype)
    codes = max((problem.dtype, problem.codebook_dtype or problem.dtype), key=epsilon)
    terms = problem.m + problem.m * problem.d_in * problem.d_out // problem.n  # a product over m; its sums over a code
    assert relative(d_codebook, oracle.d_codebook, oracle.d_codebook_terms) <= of_sum(terms, result=codes)


def random_problem(seed):
    rng = np.random.default_rng(seed)
    g = int(rng.choice([1, 2, 3, 4, 5, 6, 8, 9, 16, 18, 32]))
    dtype = ("float32", "bfloat16", "float16")[seed % 3]
    return Problem(
        m=int(rng.choice([1, 3, 16, 17, 70])),
        d_in=int(rng.integers(1, 150)),
        d_out=int(rng.integers(1, 150)),
        n=int(rng.choice([1, 7, 256, 700])),
        g=g,
        axis=("out", "in")[seed // 3 % 2],
        dtype=dtype,
        codebook_dtype=str(rng.choice([dtype, "float32", "float16"])),
        seed=seed,
    )


def random_trellis(seed):
    """A problem whose index is a trellis index; its window has 1 to 12 bits."""
    rng = np.random.default_rng(seed)
    window, dtype = int(rng.integers(1, 13)), ("float32", "bfloat16", "float16")[seed % 3]
    return Problem(
        m=int(rng.choice([1, 3, 17, 70])),
        d_in=int(rng.integers(1, 300)),
        d_out=int(rng.integers(1, 300)),
        n=2**window,
        g=int(rng.integers(1, 5)),
        axis=("out", "in")[seed // 3 % 2],
        dtype=dtype,
        codebook_dtype=str(rng.choice([dtype, "float32"])),
        seed=seed,
        step_bits=int(rng.integers(1, window + 1)),
    )
