"""Shampoo, SOAP and KL-Shampoo in plain NumPy, written from their papers.

Each class has `step(g)`, from the gradient of one tensor to the direction of the update. Matrices
are dense, moments are kept in the coordinates of the tensor, and nothing is cut or merged: see
`Blocks` and `Merged`, which do that around a class.
"""

import itertools
from collections.abc import Callable

import numpy as np


def unfolded(g: np.ndarray, dim: int) -> np.ndarray:
    """The matrix whose rows are the slices of a tensor along a dimension."""
    return np.moveaxis(g, dim, 0).reshape(g.shape[dim], -1)


def multiplied(g: np.ndarray, matrix: np.ndarray, dim: int) -> np.ndarray:
    """The product of a matrix with a tensor along a dimension."""
    return np.moveaxis(np.tensordot(matrix, g, axes=(1, dim)), 0, dim)


def power(a: np.ndarray, exponent: float, ridge: float, relative: bool = True) -> np.ndarray:
    values, vectors = np.linalg.eigh(a)
    values = np.maximum(values, 0)
    values = values + ridge * (values.max() if relative else 1)
    return (vectors * values**exponent) @ vectors.T


def descending(a: np.ndarray) -> np.ndarray:
    """Eigenvectors, that of the largest eigenvalue first."""
    return np.linalg.eigh(a)[1][:, ::-1]


def chosen(shape, longest, one_sided):
    """The dimensions with a matrix."""
    dims = [i for i, size in enumerate(shape) if longest is None or size <= longest]
    return [min(dims, key=lambda i: shape[i])] if one_sided and dims else dims


class Shampoo:
    """Gupta, Koren & Singer (2018), Algorithm 2, with moving averages that are corrected for their
    start (Shi et al. 2023, Algorithm 2).

    `bases` takes the roots in an eigenbasis that is followed by QR steps.
    """

    def __init__(
        self,
        shape,
        *,
        decay=0.99,
        every=1,
        statistics_every=1,
        exponent=None,
        ridge=1e-6,
        relative=True,
        longest=None,
        one_sided=False,
        diagonal=False,
        early=False,
        bases=False,
    ):
        self.dims = chosen(shape, longest, one_sided)
        self.thin = [i for i in range(len(shape)) if i not in self.dims] if diagonal else []
        self.exponent = exponent or 1 / (2 * max(len(self.dims) + len(self.thin), 1))
        self.decay, self.every, self.statistics_every = decay, every, statistics_every
        self.ridge, self.relative, self.early, self.bases = ridge, relative, early, bases
        self.moments = {i: np.zeros((shape[i], shape[i])) for i in self.dims}
        self.squares = {i: np.zeros(shape[i]) for i in self.thin}
        self.roots, self.q = {}, {}
        self.t = self.measured = 0

    def step(self, g):
        weight = 1 if self.decay == 1 else 1 - self.decay
        if self.t % self.statistics_every == 0:
            self.measured += 1
            for i in self.dims:
                rows = unfolded(g, i)
                self.moments[i] = self.decay * self.moments[i] + weight * rows @ rows.T
            for i in self.thin:
                square = (unfolded(g, i) ** 2).sum(axis=1)
                self.squares[i] = self.decay * self.squares[i] + weight * square
        correction = 1 if self.decay == 1 else 1 - self.decay**self.measured
        early = self.early and self.t < self.every and bin(self.t).count("1") == 1
        if self.t % self.every == 0 or early:
            for i in self.dims:
                self.roots[i] = self.root(i, self.moments[i] / correction)
        for i in self.dims:
            g = multiplied(g, self.roots[i], i)
        for i in self.thin:
            values = self.squares[i] / correction
            values = values + self.ridge * (values.max() if self.relative else 1)
            g = multiplied(g, np.diag(values**-self.exponent), i)
        self.t += 1
        return g

    def root(self, i, a):
        if not self.bases:
            return power(a, -self.exponent, self.ridge, self.relative)
        if i not in self.q:
            self.q[i] = descending(a)
        else:
            self.q[i], _ = orthogonal_step(a, self.q[i])
        values = np.diag(self.q[i].T @ a @ self.q[i])
        values = values + self.ridge * (values.max() if self.relative else 1)
        return (self.q[i] * values**-self.exponent) @ self.q[i].T


class LowRankShampoo:
    """Shampoo of a matrix whose first factor is held as QMQᵀ + τ(I − QQᵀ): the moving average of LQ
    is kept from one refresh to the next, and then a Nyström approximation of L made of it (Tropp et
    al. 2017, without their shift), with the trace of L. Starts from a given Q.
    """

    def __init__(self, shape, basis, *, decay=0.99, every=1, ridge=1e-6):
        self.decay, self.every, self.ridge, self.t = decay, every, ridge, 0
        self.q, self.sketch, self.trace = basis, np.zeros(basis.shape), 0.0
        self.right = np.zeros((shape[1], shape[1]))

    def step(self, g):
        weight = 1 - self.decay
        self.sketch = self.decay * self.sketch + weight * g @ (g.T @ self.q)
        self.trace = self.decay * self.trace + weight * np.sum(g * g)
        self.right = self.decay * self.right + weight * g.T @ g
        if self.t % self.every == 0:
            correction = 1 - self.decay ** (self.t + 1)
            half = np.linalg.solve(np.linalg.cholesky(self.q.T @ self.sketch), self.sketch.T).T
            self.q, r = np.linalg.qr(half)
            m, (n, k) = r @ r.T, half.shape
            tail = (self.trace - np.trace(m)) / (n - k)
            self.sketch = self.q @ m
            ridge = self.ridge * np.linalg.eigvalsh(m)[-1]
            core = power(m + ridge * np.eye(k), -0.25, 0) * correction**0.25
            outside = (correction / (tail + ridge)) ** 0.25
            self.left = outside * (np.eye(n) - self.q @ self.q.T) + self.q @ core @ self.q.T
            self.right_root = power(self.right / correction, -0.25, self.ridge)
        self.t += 1
        return self.left @ g @ self.right_root


def orthogonal_step(a, q, sort=True):
    """Vyas et al. (2024), Algorithm 4, with the columns sorted first as in the authors' code."""
    order = np.argsort(-np.diag(q.T @ a @ q)) if sort else np.arange(len(a))
    return np.linalg.qr(a @ q[:, order])[0], order


class Soap:
    """Vyas et al. (2024), Algorithm 3; the first call begins the moments and returns zeros, as in
    the authors' code. The mean is in the coordinates of the tensor.

    `sorted` counts the refreshes that changed the order of columns; without `permute` the squares
    stay in the old order.
    """

    def __init__(
        self,
        shape,
        *,
        b1=0.95,
        b2=0.95,
        decay=None,
        eps=1e-8,
        every=10,
        longest=None,
        one_sided=False,
        permute=True,
    ):
        self.dims = chosen(shape, longest, one_sided)
        self.b1, self.b2, self.eps, self.every = b1, b2, eps, every
        self.decay = b2 if decay is None else decay
        self.permute, self.sorted, self.t = permute, 0, 0
        self.mean, self.square = np.zeros(shape), np.zeros(shape)
        self.moments = {i: np.zeros((shape[i], shape[i])) for i in self.dims}
        self.q = {}

    def project(self, g, back=False):
        for i in self.dims:
            g = multiplied(g, self.q[i] if back else self.q[i].T, i)
        return g

    def measure(self, g):
        for i in self.dims:
            rows = unfolded(g, i)
            self.moments[i] = self.decay * self.moments[i] + (1 - self.decay) * rows @ rows.T

    def step(self, g):
        if self.t == 0:
            self.measure(g)
            self.q = {i: descending(self.moments[i]) for i in self.dims}
            self.t = 1
            return np.zeros_like(g)
        self.mean = self.b1 * self.mean + (1 - self.b1) * g
        self.square = self.b2 * self.square + (1 - self.b2) * self.project(g) ** 2
        step = self.project(self.mean) / (np.sqrt(self.square) + self.eps)
        step = step * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        step = self.project(step, back=True)
        self.measure(g)
        if self.t % self.every == 0:
            for i in self.dims:
                self.q[i], order = orthogonal_step(self.moments[i], self.q[i])
                self.sorted += not np.array_equal(order, np.arange(len(order)))
                if self.permute:
                    self.square = np.take(self.square, order, axis=i)
        self.t += 1
        return step


class SubspaceSoap:
    """SOAP with the leading eigenvectors of each dimension that has a start in `starts` (the other
    ones have all), written with complete bases: of the squares in the coordinates that are left,
    each has the mean. Bases are those of a Nyström approximation, as of `LowRankShampoo`; a new
    coordinate has the square that it would have if the old ones were not correlated.
    """

    def __init__(self, shape, starts, *, b1=0.95, b2=0.95, decay=None, eps=1e-8, every=10):
        self.b1, self.b2, self.eps, self.every = b1, b2, eps, every
        self.decay = b2 if decay is None else decay
        self.mean, self.square, self.t = np.zeros(shape), np.zeros(shape), 0
        self.thin, self.q = dict(starts), {}
        self.moments = {
            i: np.zeros(self.thin[i].shape if i in self.thin else (n, n))
            for i, n in enumerate(shape)
        }

    def project(self, g, back=False):
        for i, q in self.q.items():
            g = multiplied(g, q if back else q.T, i)
        return g

    def measure(self, g):
        for i in self.moments:
            rows = unfolded(g, i)
            moment = rows @ rows.T
            moment = moment @ self.thin[i] if i in self.thin else moment
            self.moments[i] = self.decay * self.moments[i] + (1 - self.decay) * moment

    def shared(self, squares):
        for i, q in self.thin.items():
            inside, outside = np.split(squares, [q.shape[1]], axis=i)
            outside = np.broadcast_to(outside.mean(axis=i, keepdims=True), outside.shape)
            squares = np.concatenate([inside, outside], axis=i)
        return squares

    def turn(self, first):
        for i, a in self.moments.items():
            if i not in self.thin:
                self.q[i], order = (
                    (descending(a), np.arange(len(a))) if first else orthogonal_step(a, self.q[i])
                )
                self.square = np.take(self.square, order, axis=i)
                continue
            half = np.linalg.solve(np.linalg.cholesky(self.thin[i].T @ a), a.T).T
            q, r = np.linalg.qr(half)
            core = r @ r.T
            v = descending(core) if first else orthogonal_step(core, np.eye(len(core)))[0]
            self.thin[i], self.moments[i] = q @ v, q @ core @ v
            complete = np.linalg.qr(self.thin[i], mode="complete")[0]
            complete[:, : v.shape[1]] = self.thin[i]
            if not first:
                self.square = multiplied(self.square, (complete.T @ self.q[i]) ** 2, i)
            self.q[i] = complete
        self.square = self.shared(self.square)

    def step(self, g):
        if self.t == 0:
            self.measure(g)
            self.turn(True)
            self.t = 1
            return np.zeros_like(g)
        self.mean = self.b1 * self.mean + (1 - self.b1) * g
        square = self.shared(self.project(g) ** 2)
        self.square = self.b2 * self.square + (1 - self.b2) * square
        step = self.project(self.mean) / (np.sqrt(self.square) + self.eps)
        step = step * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        self.measure(g)
        step = self.project(step, back=True)
        if self.t % self.every == 0:
            self.turn(False)
        self.t += 1
        return step


class KLShampoo:
    """Lin et al. (2025): KL-Shampoo with QR steps and eigenvalues that are moving averages; the
    first call begins the factors, with nothing whitened, and returns zeros.
    """

    def __init__(
        self, shape, *, b1=0.9, b2=0.98, eps=1e-8, initial=0.1, limit=4000, every=10, longest=None
    ):
        self.shape, self.dims = shape, chosen(shape, longest, False)
        self.b1, self.b2, self.eps, self.every, self.limit = b1, b2, eps, every, limit
        self.mean, self.t = np.zeros(shape), 0
        self.factors = {i: np.zeros((shape[i], shape[i])) for i in self.dims}
        self.values = {i: np.full(shape[i], initial) for i in self.dims}
        self.q = {}

    def inverse_root(self, i):
        return (self.q[i] * self.values[i] ** -0.5) @ self.q[i].T

    def moment(self, g, i):
        """GᵢS⁻¹Gᵢᵀ over the number of columns of Gᵢ, with S for all dimensions but i."""
        for j in self.dims:
            if j != i and self.q:
                g = multiplied(g, self.inverse_root(j), j)
        rows = unfolded(g, i)
        return rows @ rows.T / rows.shape[1]

    def step(self, g):
        moments = {i: self.moment(g, i) for i in self.dims}
        for i in self.dims:
            self.factors[i] = self.b2 * self.factors[i] + (1 - self.b2) * moments[i]
        if self.t == 0:
            self.q = {i: descending(self.factors[i]) for i in self.dims}
            self.t = 1
            return np.zeros_like(g)
        self.mean = self.b1 * self.mean + (1 - self.b1) * g
        step, scale = self.mean, np.ones(self.shape)
        for i in self.dims:
            step = multiplied(step, self.q[i].T, i)
            scale = multiplied(scale, np.diag(self.values[i] ** 0.5), i)
        step = step / (scale + self.eps)
        for i in self.dims:
            step = multiplied(step, self.q[i], i)
        for i in self.dims:
            new = np.diag(self.q[i].T @ moments[i] @ self.q[i])
            self.values[i] = self.b2 * self.values[i] + (1 - self.b2) * new
            if self.limit is not None:
                root = max(10, min(self.shape[i], self.limit))
                self.values[i] = np.maximum(self.values[i], root**-2.0)
        if self.t % self.every == 0:
            for i in self.dims:
                self.q[i], _ = orthogonal_step(self.factors[i], self.q[i], sort=False)
        self.t += 1
        return step


class Blocks:
    """Cuts dimensions into blocks of a size, the last of which may be shorter; each block has a
    rule of its own, made by `rule(shape)`. Dimensions longer than `longest` are not cut.
    """

    def __init__(self, shape, size: int, rule: Callable, longest=None):
        cuts = []
        for extent in shape:
            step = extent if longest is not None and extent > longest else size
            cuts.append([slice(at, min(at + step, extent)) for at in range(0, extent, step)])
        self.places = list(itertools.product(*cuts))
        self.rules = [rule(tuple(s.stop - s.start for s in place)) for place in self.places]

    def step(self, g):
        out = np.empty_like(g)
        for place, rule in zip(self.places, self.rules, strict=True):
            out[place] = rule.step(g[place])
        return out


class Merged:
    """A rule of tensors of another shape, of as many entries."""

    def __init__(self, shape, rule: Callable):
        self.shape, self.rule = shape, rule(shape)

    def step(self, g):
        return self.rule.step(g.reshape(self.shape)).reshape(g.shape)


class Grafted:
    """Agarwal et al. (2020): the direction of one rule with the norm of another's."""

    def __init__(self, rule, magnitude):
        self.rule, self.magnitude = rule, magnitude

    def step(self, g):
        step = self.rule.step(g)
        return step * np.linalg.norm(self.magnitude.step(g)) / np.linalg.norm(step)


class Elementwise:
    """Adam, RMSProp (Adam without momentum), Adagrad from `initial`, or SGD."""

    def __init__(self, kind, *, b1=0.9, b2=0.999, eps=1e-8, initial=0.1):
        self.kind, self.b1, self.b2, self.eps = kind, b1 if kind == "adam" else 0, b2, eps
        self.mean, self.square, self.total, self.t = 0.0, 0.0, initial, 0

    def step(self, g):
        self.t += 1
        if self.kind == "sgd":
            return g
        if self.kind == "adagrad":
            self.total = self.total + g * g
            return g / np.sqrt(self.total + self.eps)
        self.mean = self.b1 * self.mean + (1 - self.b1) * g
        self.square = self.b2 * self.square + (1 - self.b2) * g * g
        mean = self.mean / (1 - self.b1**self.t)
        return mean / (np.sqrt(self.square / (1 - self.b2**self.t)) + self.eps)
